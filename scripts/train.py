"""Fine-tune one language model on many languages, conflicts between them resolved per block.

    python scripts/train.py --config configs/quickstart.yaml [section.key=value ...]

The same command resumes an interrupted run. ``--help`` lists every setting.
"""

from jaxmoo.commands.main import run

if __name__ == "__main__":
    raise SystemExit(run("train", prog="train.py"))
