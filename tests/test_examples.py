"""The examples run."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from jaxmoo import aggregators

ROOT = Path(__file__).parents[1]


def load(name: str):
    """Import a script of ``examples/``."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_multitask_digits_compares_methods(capsys):
    load("multitask_digits").main(["--steps", "3", "--seeds", "2", "--methods", "pcgrad"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["method", "mean", "pcgrad"]
    assert re.search(r"[+-]\d+\.\d\d ± \d+\.\d\d", lines[2])


@pytest.mark.slow
def test_toy_trajectories_draws_a_small_picture(tmp_path, capsys):
    target = tmp_path / "toy.png"
    load("toy_trajectories").main(["--steps", "3", "--output", str(target)])
    assert target.read_bytes().startswith(b"\x89PNG")
    assert "mgda" in capsys.readouterr().out


def test_toy_front_is_stationary():
    """On the drawn front the shortest convex combination of the gradients vanishes."""
    import jax
    import jax.numpy as jnp

    toy = load("toy_trajectories")

    @jax.jit
    @jax.vmap
    def lengths(point):
        """Of the shortest combination, and of the longest gradient."""
        gradients = jax.jacrev(toy.losses)(point)
        shortest = aggregators.aggregate("mgda", gradients)
        return jnp.linalg.norm(shortest), jnp.linalg.norm(gradients, axis=1).max()

    shortest, longest = lengths(jnp.asarray(toy.pareto_front()[::8], jnp.float32))
    assert (shortest < 2e-2 * longest).all()
