"""Show the data of a run as training will see it; no weights are read.

    python scripts/data.py --config configs/quickstart.yaml [section.key=value ...]

``--help`` lists what can be chosen.
"""

from jaxmoo.commands.main import run

if __name__ == "__main__":
    raise SystemExit(run("data", prog="data.py"))
