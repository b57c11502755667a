"""Per-language examples: sources, the held-out split, tokenising, packing, mixture, batches."""

from jaxmoo.data.batches import LanguageBatches, batch_spec, count_tokens
from jaxmoo.data.corpus import Corpus, LanguageReport, load_corpus
from jaxmoo.data.example import Example
from jaxmoo.data.load import RunData, load_data, make_batches
from jaxmoo.data.mixture import shares
from jaxmoo.data.sources.reading import load_examples
from jaxmoo.data.sources.records import (
    MissingLanguageError,
    Origin,
    RecordStream,
    SequenceStream,
)
from jaxmoo.data.sources.source import Source, open_source
from jaxmoo.data.split import deduplicate, split_examples
from jaxmoo.data.table import text_table
from jaxmoo.data.tokenization.tokenize import Tokenized, tokenize, tokenize_all

__all__ = [
    "Corpus",
    "Example",
    "LanguageBatches",
    "LanguageReport",
    "MissingLanguageError",
    "Origin",
    "RecordStream",
    "RunData",
    "SequenceStream",
    "Source",
    "Tokenized",
    "batch_spec",
    "count_tokens",
    "deduplicate",
    "load_corpus",
    "load_data",
    "load_examples",
    "make_batches",
    "open_source",
    "shares",
    "split_examples",
    "text_table",
    "tokenize",
    "tokenize_all",
]
