"""Compare ways of fine-tuning on many languages: a grid of runs, then tables with intervals.

    python scripts/study.py --config configs/study/sib200.yaml [key=value ...]

The same command runs what is missing. ``--help`` lists every setting.
"""

from jaxmoo.commands.main import run

if __name__ == "__main__":
    raise SystemExit(run("study", prog="study.py"))
