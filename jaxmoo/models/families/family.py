"""What makes a family of models: how its ``config.json`` is read, and its names of tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxmoo.errors import ConfigError, shown
from jaxmoo.models.checks import check_size
from jaxmoo.models.rope import Rope

__all__ = ["Family", "LayerKind", "Names", "by_type", "layer_types", "pattern"]


@dataclass(frozen=True)
class LayerKind:
    """What a layer's attention does that another's of the same model may not.

    Attributes:
      window: number of tokens that a token attends to, itself included; None for all before it.
      rope: its rotary positions; None for none.

    Raises:
      ConfigError: a value is of another type or out of range.
    """

    window: int | None
    rope: Rope | None

    def __post_init__(self) -> None:
        if self.window is not None:
            check_size("sliding_window", self.window)


@dataclass(frozen=True)
class Names:
    """How a family's names of tensors differ from ours, which are mostly Llama's.

    Attributes:
      modules: a family's names by ours, for parts of a layer such as ``input_layernorm``.
      prefix: what a family puts before every name but the head's, in the place of ``model.``.
      head: its name of the head.
      fused: a family's matrices that hold several of ours, one below the other, by name.
      constants: tensors of every layer that never change, by name, and their values.
      others: the beginnings of names of what is not the text model, and what that is.
    """

    modules: Mapping[str, str] = field(default_factory=dict)
    prefix: str = "model."
    head: str = "lm_head"
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    constants: Mapping[str, float] = field(default_factory=dict)
    others: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
      read: from a ``config.json``, after `defaults`, to those fields of
        :class:`~jaxmoo.models.DecoderConfig` that are not the same in every family; ``rope``, a
        :class:`~jaxmoo.models.rope.Rope`, stands for both fields of the rotary positions. It
        refuses what would change the model's output and is not implemented.
      defaults: values that a ``config.json`` may leave out.
      names: of tensors in files.
      part: under which name a ``config.json`` has the text model's; None: it has no other.
    """

    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    names: Names = Names()
    part: str | None = None


_TYPES = ("full_attention", "sliding_attention")


def layer_types(config: Mapping[str, Any], default: Callable[[int], Sequence[str]]) -> list[str]:
    """Read which layers have a window, ``layer_types``.

    Args:
      config: the parsed ``config.json``.
      default: gives the types for a number of layers, where the config does not say.

    Returns:
      ``full_attention`` or ``sliding_attention`` for each layer.

    Raises:
      ConfigError: they are anything else.
    """
    layers = config.get("num_hidden_layers")
    found = config.get("layer_types")
    if found is None:
        return list(default(check_size("num_hidden_layers", layers)))
    if (
        not isinstance(found, list)
        or len(found) != layers
        or any(kind not in _TYPES for kind in found)
    ):
        raise ConfigError(
            f"layer_types must be a list of {' or '.join(_TYPES)}, one for each of the "
            f"{shown(layers)} layers, got {shown(found)}"
        )
    return found


def pattern(config: Mapping[str, Any], period: Any) -> list[str]:
    """Read the types of layers of a family in which every so many-th has no window.

    Args:
      config: the parsed ``config.json``.
      period: how many; some families say it in ``sliding_window_pattern``.
    """
    every = check_size("sliding_window_pattern", period)
    return layer_types(config, lambda n: [_TYPES[(i + 1) % every != 0] for i in range(n)])


def by_type(types: Sequence[str], near: LayerKind, far: LayerKind) -> tuple[LayerKind, ...]:
    """The kinds of layers of these types: `near` with a window, `far` without."""
    return tuple(near if kind == "sliding_attention" else far for kind in types)
