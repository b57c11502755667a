"""Measures of a model on held-out text."""

from jaxmoo.evaluate.nll import LanguageScore, evaluate_nll
from jaxmoo.evaluate.summary import Summary, before_after_table, summarise

__all__ = ["LanguageScore", "Summary", "before_after_table", "evaluate_nll", "summarise"]
