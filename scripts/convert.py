"""Convert models between Hugging Face directories and Orbax checkpoints; compare and describe them.

    python scripts/convert.py from-hf SRC OUT
    python scripts/convert.py to-hf SRC OUT [--step N] [--dtype bfloat16]
    python scripts/convert.py verify A B
    python scripts/convert.py inspect DIR

``--help``, also after a command, lists what can be chosen.
"""

from jaxmoo.commands.main import run

if __name__ == "__main__":
    raise SystemExit(run("convert", prog="convert.py"))
