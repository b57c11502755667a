"""Fine-tune one language model on many languages, conflicts between them resolved per block.

    python scripts/train.py --config configs/quickstart.yaml [section.key=value ...]

The same command resumes an interrupted run. ``--help`` lists every setting.
"""

from jaxmoo.commands.train import main

if __name__ == "__main__":
    raise SystemExit(main())
