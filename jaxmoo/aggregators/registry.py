"""Aggregators by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxmoo.aggregators.aligned_mtl import aligned_mtl
from jaxmoo.aggregators.base import Aggregator
from jaxmoo.aggregators.cagrad import cagrad
from jaxmoo.aggregators.conflict_free import config
from jaxmoo.aggregators.constant import constant
from jaxmoo.aggregators.cr_mogm import cr_mogm
from jaxmoo.aggregators.dualproj import dualproj
from jaxmoo.aggregators.excess_mtl import excess_mtl
from jaxmoo.aggregators.fairgrad import fairgrad
from jaxmoo.aggregators.graddrop import graddrop
from jaxmoo.aggregators.gradvac import gradvac
from jaxmoo.aggregators.imtl_g import imtl_g
from jaxmoo.aggregators.krum import krum
from jaxmoo.aggregators.mean import mean, sum
from jaxmoo.aggregators.mgda import mgda
from jaxmoo.aggregators.moco import moco
from jaxmoo.aggregators.modo import modo
from jaxmoo.aggregators.nash_mtl import nash_mtl
from jaxmoo.aggregators.parameters import build
from jaxmoo.aggregators.pcgrad import pcgrad
from jaxmoo.aggregators.random_weights import random
from jaxmoo.aggregators.sdmgrad import sdmgrad
from jaxmoo.aggregators.trimmed_mean import trimmed_mean
from jaxmoo.aggregators.unit_mean import unit_mean
from jaxmoo.aggregators.upgrad import upgrad
from jaxmoo.errors import ConfigError

_FACTORIES: dict[str, Callable[..., Aggregator]] = {
    factory.__name__: factory
    for factory in (
        mean,
        sum,
        constant,
        random,
        unit_mean,
        mgda,
        cagrad,
        pcgrad,
        gradvac,
        upgrad,
        dualproj,
        imtl_g,
        aligned_mtl,
        config,
        nash_mtl,
        fairgrad,
        sdmgrad,
        modo,
        moco,
        cr_mogm,
        excess_mtl,
        graddrop,
        trimmed_mean,
        krum,
    )
}


def names() -> tuple[str, ...]:
    """Names of all aggregators.

    Returns:
      The names :func:`get` takes.

    Example:
      >>> "mgda" in names()
      True
    """
    return tuple(_FACTORIES)


def get(name: str | Aggregator, **options: Any) -> Aggregator:
    """An aggregator by name.

    Args:
      name: one of :func:`names`, or an aggregator, which is returned as it is.
      **options: parameters of the method's factory.

    Returns:
      The aggregator.

    Raises:
      ConfigError: if the name or an option is unknown, or an option is out of range.

    Example:
      >>> get("cagrad", c=0.4)
      Aggregator(cagrad)
      >>> get("cagard")
      Traceback (most recent call last):
      jaxmoo.errors.ConfigError: Unknown aggregator 'cagard'. Did you mean 'cagrad'? ...
    """
    if isinstance(name, Aggregator):
        if options:
            raise ConfigError(
                f"Options {sorted(options)} cannot change the ready-made {name!r}: give them to "
                "its factory."
            )
        return name
    return build("aggregator", _FACTORIES, name, options)
