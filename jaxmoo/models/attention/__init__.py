"""Causal attention by the best implementation that a kind of devices has.

Three implementations compute the same thing, a file each:

- ``xla`` (`plain`): plain products and a softmax, on any device and in any precision; its scores
  take memory that grows with the square of the sequence.
- ``cudnn``: cuDNN's flash attention on NVIDIA GPUs, in half precision.
- ``tpu`` (`splash`): JAX's splash attention kernel on TPUs.
"""

from jaxmoo.models.attention.choice import IMPLEMENTATIONS, attend, choose_attention
from jaxmoo.models.attention.plain import attend_where
from jaxmoo.models.attention.windows import Window, Windows, size_of

__all__ = [
    "IMPLEMENTATIONS",
    "Window",
    "Windows",
    "attend",
    "attend_where",
    "choose_attention",
    "size_of",
]
