"""Score a model language by language, or compare two such results.

    python scripts/evaluate.py --model runs/quickstart --output tuned.json
    python scripts/evaluate.py --compare base.json tuned.json

``--help`` lists everything; the same command resumes an interrupted evaluation.
"""

from jaxmoo.commands.main import run

if __name__ == "__main__":
    raise SystemExit(run("evaluate", prog="evaluate.py"))
