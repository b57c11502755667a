"""Models between Hugging Face format and our checkpoints, from the command line and from Python."""

from jaxmoo.convert.compare import Comparison, compare
from jaxmoo.convert.describe import describe
from jaxmoo.convert.models import from_hf, to_hf

__all__ = ["Comparison", "compare", "describe", "from_hf", "to_hf"]
