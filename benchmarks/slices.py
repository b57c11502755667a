"""What slices of TPUs send to each other in a step, counted in the traced program.

    python benchmarks/slices.py
    python benchmarks/slices.py --chip 4xv5p:4x4x8 --batch-size 64

Each step is that of `jaxmoo train` with a replica in each slice, and stands beside ordinary
fine-tuning of the same tokens. Nothing is compiled, so it takes seconds; the devices are described
by the compiler for TPUs (`pip install 'jaxmoo[plan-tpu]'`).
"""

from __future__ import annotations

import argparse
import os

import jax
from common import bullets, environment, markdown, ratio

from jaxmoo.config import load_config
from jaxmoo.engine.cost import BETWEEN, traced_collective_bytes
from jaxmoo.sizes import format_size
from jaxmoo.train.chips import Slice, slice_of
from jaxmoo.train.gradient_source import make_gradients, ordinary, ordinary_gradients
from jaxmoo.train.planning import abstract_step, shape_of

PLAIN = "plain"
STEPS = {
    PLAIN: [],
    "`mean_then_resolve`, exact": [],
    "`mean_then_resolve`, `sketch:16384`": ["resolve.gram=sketch:16384"],
    "`pooled_gram`": ["resolve.replicas=pooled_gram"],
    "`resolve_then_mean`": ["resolve.replicas=resolve_then_mean"],
}


def sent(place: Slice, name: str, flags: argparse.Namespace) -> tuple[int, int]:
    """Bytes that each device sends in one step, between slices and within its own."""
    changes = [f"data.batch_size={flags.batch_size}", f"mesh.data={place.number}", *STEPS[name]]
    config, gradients = load_config(flags.config, changes), make_gradients
    if name == PLAIN:
        config, gradients = ordinary(config), ordinary_gradients
    shape = shape_of(flags.model)
    step = abstract_step(config, shape, gradients, devices=place.devices())
    counted = traced_collective_bytes(step.function.trace(*step.arguments).jaxpr, step.slices)
    between = sum(count for kind, count in counted.items() if BETWEEN in kind)
    return between, sum(counted.values()) - between


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chip", default="2xv5e:16x16", help="several slices (2xv5e:16x16)")
    parser.add_argument("--model", default="Llama-3.1-8B", help="published model or directory")
    parser.add_argument("--config", default="llama-3.1-8b", help="the settings (llama-3.1-8b)")
    parser.add_argument("--batch-size", type=int, default=64, help="rows per language (64)")
    flags = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    place = slice_of(flags.chip)
    found = {name: sent(place, name, flags) for name in STEPS}
    rows = [["step", "between slices", "of plain", "within a slice", "of plain"]]
    for name, counts in found.items():
        cells = [
            (format_size(count), ratio(count / plain, 3))
            for count, plain in zip(counts, found[PLAIN], strict=True)
        ]
        rows.append([name, *cells[0], *cells[1]])
    print(bullets(environment(os.cpu_count() or 1, ["jax"])))
    print(f"\nSent per device and step, {place.name}, {flags.model}:\n")
    print(markdown(rows))


if __name__ == "__main__":
    main()
