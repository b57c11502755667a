"""Analyse a training run beside the model it began with, and write a report.

    python scripts/analyze.py runs/quickstart [--parallel 'sentences/{language}.txt'] \\
        [--single runs/en runs/es ...]

``--help`` lists what can be chosen; docs/analysis.md explains every measure.
"""

from jaxmoo.commands.main import run

if __name__ == "__main__":
    raise SystemExit(run("analyze", prog="analyze.py"))
