"""Measures of a model on held-out text, and comparisons of models by them.

:func:`evaluate` scores a model on every language and writes what it finds; :func:`read_results`
and :func:`compare` read it again. :class:`Evaluator` is what scores, here and while a model is
trained.
"""

from jaxmoo.evaluate.compare import Comparison, compare
from jaxmoo.evaluate.evaluation import Evaluation, evaluate
from jaxmoo.evaluate.evaluator import Evaluator
from jaxmoo.evaluate.nll import Likelihoods, evaluate_nll, likelihoods
from jaxmoo.evaluate.results import Results, read_results
from jaxmoo.evaluate.summary import Summary, before_after_table, summarise
from jaxmoo.runs.scores import LanguageScore

__all__ = [
    "Comparison",
    "Evaluation",
    "Evaluator",
    "LanguageScore",
    "Likelihoods",
    "Results",
    "Summary",
    "before_after_table",
    "compare",
    "evaluate",
    "evaluate_nll",
    "likelihoods",
    "read_results",
    "summarise",
]
