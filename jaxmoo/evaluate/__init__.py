"""Measures of a model on held-out text, and comparisons of models by them."""

from jaxmoo.evaluate.compare import Comparison, compare
from jaxmoo.evaluate.nll import LanguageScore, evaluate_nll, example_nats
from jaxmoo.evaluate.results import Results, read_results
from jaxmoo.evaluate.summary import Summary, before_after_table, summarise

__all__ = [
    "Comparison",
    "LanguageScore",
    "Results",
    "Summary",
    "before_after_table",
    "compare",
    "evaluate_nll",
    "example_nats",
    "read_results",
    "summarise",
]
