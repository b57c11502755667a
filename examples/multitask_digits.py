"""Four tasks on scikit-learn's handwritten digits, one small shared network, conflicts resolved.

Is the digit odd, at least 5, prime, drawn with a loop? One trunk, one head per task. Compares ways
to combine the four gradients in the same optax chain: every method gets the same learning rates to
choose from (by validation accuracy), the same splits, initial weights and batches, and the
differences to the plain mean are paired by seed.

    python examples/multitask_digits.py
"""

from __future__ import annotations

import argparse
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.stats import t as student
from sklearn.datasets import load_digits

import jaxmoo

TASKS = {
    "odd": (1, 3, 5, 7, 9),
    "at least 5": (5, 6, 7, 8, 9),
    "prime": (2, 3, 5, 7),
    "loop": (0, 6, 8, 9),
}
K = len(TASKS)
LEARNING_RATES = (3e-3, 1e-2, 3e-2, 1e-1)
BLOCKS = {
    "trunk": lambda path: path.split(".")[0],  # the whole trunk is one block
    "layer": "layer",
    "leaf": "leaf",
}
TRAIN, VALIDATION = 500, 400  # of 1,797; the rest is for testing

Params = dict[str, Any]


class Split(NamedTuple):
    """Images [n, 64] and labels [n, K] of one seed."""

    train: tuple[jax.Array, jax.Array]
    validation: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]


def load() -> tuple[np.ndarray, np.ndarray]:
    """Images [1797, 64] in [0, 1] and binary labels [1797, K]."""
    digits = load_digits()
    labels = np.stack([np.isin(digits.target, positive) for positive in TASKS.values()], axis=1)
    return (digits.data / 16).astype(np.float32), labels.astype(np.float32)


def split(key: jax.Array, images: jax.Array, labels: jax.Array) -> Split:
    order = jax.random.permutation(key, len(images))
    parts = jnp.split(order, [TRAIN, TRAIN + VALIDATION])
    return Split(*((images[part], labels[part]) for part in parts))


def init(key: jax.Array, width: int) -> Params:
    """A trunk of two layers and one linear head per task."""
    keys = jax.random.split(key, 3)
    dense = jax.nn.initializers.lecun_normal()
    return {
        "trunk": {
            "dense_0": {"kernel": dense(keys[0], (64, width)), "bias": jnp.zeros(width)},
            "dense_1": {"kernel": dense(keys[1], (width, width)), "bias": jnp.zeros(width)},
        },
        "heads": {"kernel": dense(keys[2], (width, K)).T, "bias": jnp.zeros(K)},
    }


def features(params: Params, images: jax.Array) -> jax.Array:
    for layer in params["trunk"].values():
        images = jax.nn.relu(images @ layer["kernel"] + layer["bias"])
    return images


def loss_fn(params: Params, batch: dict[str, jax.Array]) -> jax.Array:
    """Mean logistic loss of one task; ``batch["task"]`` says which."""
    heads = params["heads"]
    hidden = features(params, batch["images"])
    logits = hidden @ heads["kernel"][batch["task"]] + heads["bias"][batch["task"]]
    return optax.sigmoid_binary_cross_entropy(logits, batch["labels"]).mean()


def accuracy(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Accuracy of every task [K]."""
    heads = params["heads"]
    logits = features(params, images) @ heads["kernel"].T + heads["bias"]
    return jnp.mean((logits > 0) == (labels > 0.5), axis=0)


def optimizer(
    method: str, blocks: str, match_norm: bool, learning_rate: jax.Array
) -> optax.GradientTransformationExtraArgs:
    """The whole use of jaxmoo: one link before Adam."""
    return optax.chain(
        jaxmoo.resolve_conflicts(
            # Every head is the business of one task; the method is for what the tasks share.
            {"heads": "mean", ".*": method},
            BLOCKS[blocks],
            match_norm=match_norm,
        ),
        optax.adam(learning_rate),
    )


def train(
    key: jax.Array,
    learning_rate: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    *,
    method: str,
    blocks: str,
    match_norm: bool,
    steps: int,
    batch_size: int,
    width: int,
) -> dict[str, jax.Array]:
    """Train once; accuracies [K] on validation and test data, and the share of conflicts."""
    keys = jax.random.split(key, 3)
    data = split(keys[0], images, labels)
    params = init(keys[1], width)
    tx = optimizer(method, blocks, match_norm, learning_rate)
    names = jaxmoo.blocks.partition(BLOCKS[blocks], params).names
    shared = np.array([not name.startswith("heads") for name in names])

    def step(carry, key):
        params, state = carry
        rows = jax.random.choice(key, TRAIN, (batch_size,), replace=False)
        images, labels = data.train[0][rows], data.train[1][rows]
        batch = {  # every array starts with the objective axis
            "images": jnp.broadcast_to(images, (K, *images.shape)),
            "labels": labels.T,
            "task": jnp.arange(K),
        }
        _, gradients = jaxmoo.stacked_value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(gradients, state, params)
        conflict = optax.tree.get(state, "conflict")[shared].mean()
        return (optax.apply_updates(params, updates), state), conflict

    carry = (params, tx.init(params))
    (params, _), conflict = jax.lax.scan(step, carry, jax.random.split(keys[2], steps))
    return {
        "validation": accuracy(params, *data.validation),
        "test": accuracy(params, *data.test),
        "conflict": conflict.mean(),
    }


def half_width(x: np.ndarray) -> float:
    """Half the width of the 95 % confidence interval of the mean over seeds."""
    return float(student.ppf(0.975, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=["mgda", "cagrad", "pcgrad", "upgrad"])
    parser.add_argument("--blocks", choices=BLOCKS, default="layer", help="blocks of the trunk")
    parser.add_argument("--match-norm", action="store_true", help="steps as long as the mean's")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--width", type=int, default=16, help="units of both layers of the trunk")
    options = parser.parse_args(arguments)
    if options.seeds < 2:
        parser.error("--seeds: intervals need at least 2 seeds")

    images, labels = map(jnp.asarray, load())
    keys = jax.random.split(jax.random.key(0), options.seeds)
    rates = jnp.array(LEARNING_RATES)
    baseline = None
    print(f"{'method':12}  rate   mean of tasks    worst task       minus mean (paired)  conflict")
    for method in ["mean", *options.methods]:
        run = functools.partial(
            train,
            method=method,
            blocks=options.blocks,
            match_norm=options.match_norm,
            steps=options.steps,
            batch_size=options.batch_size,
            width=options.width,
        )

        @jax.jit
        def every_run(run=run):  # all learning rates and seeds in one program
            return jax.lax.map(
                lambda rate: jax.lax.map(lambda key: run(key, rate, images, labels), keys), rates
            )

        result = jax.tree.map(np.asarray, every_run())
        best = result["validation"].mean((1, 2)).argmax()
        test = 100 * result["test"][best]  # [seeds, K]
        mean, worst = test.mean(1), test.min(1)
        baseline = mean if baseline is None else baseline
        gain = mean - baseline
        difference = f"{gain.mean():+.2f} ± {half_width(gain):.2f}" if method != "mean" else ""
        print(
            f"{method:12}  {LEARNING_RATES[best]:.0e}  {mean.mean():5.2f} ± {half_width(mean):.2f}"
            f"     {worst.mean():5.2f} ± {half_width(worst):.2f}     {difference:19}"
            f"  {result['conflict'][best].mean():.2f}"
        )
    print(
        f"\nTest accuracy in %, {options.seeds} seeds, 95 % intervals over seeds (new split, "
        f"weights and batches each).\n{options.steps} steps of {options.batch_size}; learning "
        f"rate chosen per method from {', '.join(map(str, LEARNING_RATES))} by validation.\n"
        "conflict: share of task pairs with opposed gradients in the trunk's blocks."
    )


if __name__ == "__main__":
    main()
