"""Trajectories of several aggregators on a problem with two objectives in the plane.

The problem is the toy of Liu et al., *Conflict-Averse Gradient Descent for Multi-task Learning*
(arXiv:2110.14048): two losses that share a deep, curved valley with walls of conflicting gradients,
below which lies the Pareto front. Draws ``docs/images/toy_trajectories.png``:

    python examples/toy_trajectories.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxmoo
from jaxmoo.report.style import INK, canvas, title

METHODS = {
    "mean": "mean",
    "mgda": "mgda",
    "cagrad": "cagrad",
    "pcgrad": "pcgrad, upgrad",  # the same for two objectives
    "aligned_mtl": "aligned_mtl",
    "nash_mtl": "nash_mtl",
}
STARTS = jnp.array([[-8.5, 7.5], [0.0, 0.0], [9.0, 9.0], [-7.5, -0.5], [9.0, -1.0]])
COLOURS = ("#0072B2", "#D55E00", "#CC79A7", "#009E73", "#7B2D43")
LIMIT = 11.0


def losses(theta: jax.Array) -> jax.Array:
    """Both losses [2] at a point [2]."""
    x, y = theta
    upper, lower = jnp.maximum(jnp.tanh(0.5 * y), 0), jnp.maximum(jnp.tanh(-0.5 * y), 0)
    valleys = jnp.array([0.5 * (-x - 7) - jnp.tanh(-y), 0.5 * (-x + 3) - jnp.tanh(-y) + 2])
    walls = jnp.log(jnp.maximum(jnp.abs(valleys), 5e-6)) + 6
    bowls = (jnp.array([(x - 7) ** 2, (x + 7) ** 2]) + 0.1 * (y + 8) ** 2) / 10 - 20
    return upper * walls + lower * bowls


def descend(method: str, start: jax.Array, steps: int, learning_rate: float) -> jax.Array:
    """Trajectory [steps + 1, 2] of Adam on the resolved gradients."""
    # On the front the resolved gradient is zero to within rounding; a larger eps than usual keeps
    # Adam from making steps of that.
    adam = optax.adam(learning_rate, eps=1e-4)
    optimizer = optax.chain(jaxmoo.resolve_conflicts(method, "whole"), adam)

    def step(carry, _):
        theta, state = carry
        updates, state = optimizer.update(jax.jacrev(losses)(theta), state, theta)
        theta = optax.apply_updates(theta, updates)
        return (theta, state), theta

    _, path = jax.lax.scan(step, (start, optimizer.init(start)), length=steps)
    return jnp.vstack([start, path])


def pareto_front() -> np.ndarray:
    """The front [n, 2]: where a weighted mean of the losses is least, by fine search over y."""
    y = jnp.linspace(-9, -8, 2001)
    front = []
    for x in np.linspace(-7, 7, 57):
        weight = (x + 7) / 14  # cancels the slopes along x
        values = jax.vmap(lambda y, x=x: losses(jnp.array([x, y])))(y)
        mean = weight * values[:, 0] + (1 - weight) * values[:, 1]
        front.append((x, float(y[mean.argmin()])))
    return np.array(front)


def draw(paths: dict[str, np.ndarray], steps: int, target: Path) -> None:
    """Small multiples, one per method; ``paths[method]`` is [starts, steps + 1, 2]."""
    from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap
    from PIL import Image

    x = np.linspace(-LIMIT, LIMIT, 400)
    grid = jnp.stack(jnp.meshgrid(x, x), -1)
    heights = np.asarray(jax.vmap(jax.vmap(losses))(grid)).mean(-1)
    front = pareto_front()
    # Levels at equal shares of the area show the valleys as well as the bowls.
    levels = np.unique(np.quantile(heights, np.linspace(0, 1, 22)))
    shades = LinearSegmentedColormap.from_list("shades", ("#FFFFFF", "#BFC9D4"), len(levels))
    even = BoundaryNorm(levels, shades.N)
    with canvas(target, 9.6, 6.9) as figure:
        title(
            figure,
            "Five starts, six ways to combine two gradients",
            f"Shading: mean of the two losses, lighter is lower. Black line: Pareto front. Circle: "
            f"start, cross: after {steps:,} steps.",
        )
        axes = figure.subplots(2, 3, sharex=True, sharey=True)
        for axis, (method, tracks) in zip(axes.flat, paths.items(), strict=True):
            axis.contourf(x, x, heights, levels, cmap=shades, norm=even, zorder=0)
            axis.plot(*front.T, color=INK, linewidth=2.6, solid_capstyle="round", zorder=2)
            reached = 0
            for track, colour in zip(tracks, COLOURS, strict=True):
                axis.plot(*track.T, color=colour, linewidth=1.6, zorder=3)
                axis.plot(*track[0], "o", color=colour, markersize=5, zorder=4)
                axis.plot(
                    *track[-1],
                    "X",
                    color=colour,
                    markersize=8,
                    markeredgecolor="white",
                    markeredgewidth=0.9,
                    zorder=5,
                )
                reached += np.linalg.norm(front - track[-1], axis=1).min() < 0.3
            axis.set_title(f"{METHODS[method]}: {reached} of {len(tracks)} reach the front")
            axis.set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), aspect="equal")
            axis.set(xticks=(-10, 0, 10), yticks=(-10, 0, 10))
            axis.spines[["top", "right"]].set_visible(True)
    # A palette makes the file half as large.
    with Image.open(target) as image:
        image.convert("RGB").quantize(256).save(target, optimize=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parents[1] / "docs" / "images" / "toy_trajectories.png"
    parser.add_argument("--output", type=Path, default=default, help="where the picture goes")
    parser.add_argument("--steps", type=int, default=70_000, help="steps of Adam")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    options = parser.parse_args(arguments)
    paths = {}
    for method in METHODS:
        run = jax.jit(
            jax.vmap(
                lambda start, method=method: descend(
                    method, start, options.steps, options.learning_rate
                )
            )
        )
        paths[method] = np.asarray(run(STARTS))
        ends = ", ".join(f"({x:.1f}, {y:.1f})" for x, y in paths[method][:, -1])
        print(f"{method:12} ends at {ends}")
    draw(paths, options.steps, options.output)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
