"""What an aggregator is, and how one is found by name.

An aggregator turns the Gram matrix ``G = J J^T`` of one block's gradients into weights ``w``; the
block's update is ``J^T w``. A method's own file, in :mod:`jaxmoo.aggregators.methods`, holds only
its mathematics; what all have in common is done in :mod:`jaxmoo.aggregators.weighing`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from jaxmoo.errors import ConfigError
from jaxmoo.registry import Registry

State = Any  # a pytree of arrays
Factory = TypeVar("Factory", bound=Callable[..., Any])


def stateless(num_objectives: int) -> State:
    """Return the empty state of an aggregator that keeps none.

    Args:
      num_objectives: ignored.

    Returns:
      ``()``.
    """
    del num_objectives
    return ()


@dataclasses.dataclass(frozen=True, eq=False)
class Aggregator:
    """One conflict-resolution method with its parameters.

    Attributes:
      name: the method's name.
      weigh: ``(gram [K, K], active [K], preference [K], state, key) -> (weights [K], state)`` for
        one block. ``gram`` is float32 or float64, as are the state's numbers; it is finite, zero on
        inactive rows, with a largest diagonal in [1, 2) and a positive diagonal on every active
        row; ``preference`` is zero on inactive rows and sums to 1 (all zero when nothing is
        active); ``key`` is what ``draw`` made of it, where there is one. Call it through
        :func:`weigh_block` or :func:`weigh_blocks`, which establish this.
      init: ``num_objectives -> state`` of one block, ``()`` when the method keeps none.
      combine: ``(jacobian [K, n], active [K], preference [K], uniform [n]) -> [n]`` of a
        coordinate-wise rule, which replaces ``J^T w``; None for a method that is a function of the
        Gram matrix. Inactive rows are zero; ``uniform`` is None unless the rule is stochastic.
      reads_gram: whether the weights depend on more of the Gram matrix than which rows are zero or
        non-finite.
      compares_steps: whether ``weigh`` compares Gram matrices of different steps, and therefore
        reads them as they are, not divided by a power of two.
      stochastic: whether the method draws random numbers and therefore needs a key.
      draw: ``(key, num_objectives) -> [K, K]`` makes all that ``weigh`` draws, so that the rest
        of it can be a kernel; None: ``weigh`` gets the key itself.
      cross_gram: whether ``weigh`` expects ``J1 J2^T`` of two independent batches.
      unit_scale: whether K equal gradients g give g (before ``summed``). False for a published
        scale, which also switches off the identity for a single objective.
      summed: whether the weights are multiplied by the number of objectives present.
      gram_degree: the degree h of the weights in G, ``w(s G) = s^h w(G)``; 0 unless a published
        scale is asked for.
      importance: fixed importances ``[K]`` that multiply the caller's preferences; None: ones.
      elementary: whether a kernel can take the whole of ``weigh``: it keeps no state, draws what
        it draws beforehand, reads no arrays but its arguments, and is made of elementary
        operations, solvers and :mod:`jaxmoo.kernels.linear`.
    """

    name: str
    weigh: Callable[..., tuple[jax.Array, State]]
    init: Callable[[int], State] = stateless
    combine: Callable[..., jax.Array] | None = None
    reads_gram: bool = True
    compares_steps: bool = False
    stochastic: bool = False
    draw: Callable[[jax.Array, int], jax.Array] | None = None
    cross_gram: bool = False
    unit_scale: bool = True
    summed: bool = False
    gram_degree: Any = 0.0
    importance: tuple[float, ...] | None = None
    elementary: bool = False

    def __repr__(self) -> str:
        return f"Aggregator({self.name})"


_registry = Registry("aggregator", Aggregator)


def register(factory: Factory) -> Factory:
    """Let a method be found by its name, by :func:`get` and so in a configuration.

    For a method of your own; see ``docs/own-method.md``. In a configuration of a training run,
    ``resolve.aggregator: package.module:function`` needs no registration.

    Args:
      factory: a function of the method's options that returns an :class:`Aggregator`; its name is
        the method's.

    Returns:
      The factory, which now gives the same object for the same options.
    """
    return _registry.register(factory)


def names() -> tuple[str, ...]:
    """Names of all aggregators.

    Returns:
      The names :func:`get` takes.

    Example:
      >>> "mgda" in names()
      True
    """
    return _registry.names


def get(name: str | Aggregator, **options: Any) -> Aggregator:
    """An aggregator by name.

    Args:
      name: one of :func:`names`; ``"package.module:object"``, from where another factory or an
        aggregator is imported; or an aggregator, which is returned as it is.
      **options: parameters of the method's factory.

    Returns:
      The aggregator.

    Raises:
      ConfigError: if the name or an option is unknown, an option is out of range, or what is
        imported is not there or no aggregator.

    Example:
      >>> get("cagrad", c=0.4)
      Aggregator(cagrad)
      >>> get("cagard")
      Traceback (most recent call last):
      jaxmoo.errors.ConfigError: Unknown aggregator 'cagard'. Did you mean 'cagrad'? ...
    """
    return _registry.get(name, **options)


def missing_key(aggregator: Aggregator) -> ConfigError:
    """The error of calling a stochastic method without a key.

    Args:
      aggregator: the method.

    Returns:
      The error to raise.
    """
    return ConfigError(
        f"Aggregator {aggregator.name!r} is stochastic: expected key=jax.random.key(seed), "
        "found None. Pass a key, a new one at every step."
    )
