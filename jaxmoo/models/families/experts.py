"""What a ``config.json`` says of a mixture of experts, the same in all families that have one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxmoo.models.checks import check_flag, check_number, check_size


def read_experts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Read how many experts there are, how many a token reads, and what their balance adds.

    The number of experts has two names, of which transformers 5 writes ``num_local_experts``.

    Args:
      config: the parsed ``config.json``, after a family's defaults.

    Returns:
      Fields of :class:`~jaxmoo.models.DecoderConfig`.

    Raises:
      ConfigError: a value is of another type or out of range.
    """
    number = config.get("num_experts", config.get("num_local_experts"))
    asked = check_flag("output_router_logits", config.get("output_router_logits", False))
    balance = check_number("router_aux_loss_coef", config["router_aux_loss_coef"], 0)
    return {
        "num_experts": check_size("num_experts", number),
        "num_experts_per_tok": check_size("num_experts_per_tok", config["num_experts_per_tok"]),
        # transformers adds it to the loss only where it is asked for the router's logits.
        "router_aux_loss_coef": balance if asked else 0.0,
    }
