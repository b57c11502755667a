"""Per-language examples: sources, the held-out split, tokenising, packing, mixture, batches."""

from jaxmoo.data.batches import LanguageBatches, batch_spec, count_tokens
from jaxmoo.data.corpus import Corpus, LanguageReport, load_corpus
from jaxmoo.data.example import Example
from jaxmoo.data.languages import LANGUAGE_NAMES, language_name
from jaxmoo.data.mixture import shares
from jaxmoo.data.sources import load_examples
from jaxmoo.data.split import deduplicate, split_examples
from jaxmoo.data.stream_corpus import stream_corpus
from jaxmoo.data.table import text_table
from jaxmoo.data.tokenize import Tokenized, tokenize, tokenize_all

__all__ = [
    "LANGUAGE_NAMES",
    "Corpus",
    "Example",
    "LanguageBatches",
    "LanguageReport",
    "Tokenized",
    "batch_spec",
    "count_tokens",
    "deduplicate",
    "language_name",
    "load_corpus",
    "load_examples",
    "shares",
    "split_examples",
    "stream_corpus",
    "text_table",
    "tokenize",
    "tokenize_all",
]
