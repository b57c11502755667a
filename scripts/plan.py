"""What a training run will cost, before there are devices, weights or data.

    python scripts/plan.py --config configs/quickstart.yaml --devices 8 --device-memory 80GB \\
        --model Llama-3.1-8B [section.key=value ...]

Compiles the training step for so many virtual devices and prints, per device, memory by kind,
bytes sent and floating-point operations. ``--model`` is the name of a published model or a
directory with its config.json; by default it is the config's ``model.source``.
"""

from jaxmoo.commands.main import run

if __name__ == "__main__":
    raise SystemExit(run("plan", prog="plan.py"))
