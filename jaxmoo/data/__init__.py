"""Per-language examples: sources, the held-out split, tokenising and batches."""

from jaxmoo.data.batches import LanguageBatches
from jaxmoo.data.corpus import Corpus, LanguageReport, load_corpus
from jaxmoo.data.example import Example
from jaxmoo.data.languages import LANGUAGE_NAMES, language_name
from jaxmoo.data.sources import load_examples
from jaxmoo.data.split import deduplicate, split_examples
from jaxmoo.data.table import text_table
from jaxmoo.data.tokenize import Tokenized, tokenize, tokenize_all

__all__ = [
    "LANGUAGE_NAMES",
    "Corpus",
    "Example",
    "LanguageBatches",
    "LanguageReport",
    "Tokenized",
    "deduplicate",
    "language_name",
    "load_corpus",
    "load_examples",
    "split_examples",
    "text_table",
    "tokenize",
    "tokenize_all",
]
