"""Corpora that are kept, and those that would be made anew, to be compared."""

from __future__ import annotations

import dataclasses

from data.tables import settings
from data.test_token_table import fields
from jaxmoo.data import corpus

LANGUAGES = ["en", "fa", "it", "de"]


def options(folder, cache, **changes):
    default = {"seen": ["en", "fa", "it"], "unseen": ["de"], "sequence_length": 96}
    default |= {"held_out": 0.3, "max_held_out": 8, "max_malformed": 0.1, "cache": str(cache)}
    default |= {"columns": {"group": "group"}}
    return settings(f"{folder}/{{language}}.jsonl", **(default | changes))


def load(data, tokenizer, **more):
    return corpus.load_corpus(data, tokenizer, **more)


def whole(found):
    """All of a corpus, to be compared."""
    return {
        "train": {code: [fields(one) for one in part] for code, part in found.train.items()},
        "held_out": {code: [fields(one) for one in part] for code, part in found.held_out.items()},
        "report": {code: one.to_dict() for code, one in found.report.items()},
        "complaints": sorted(found.complaints),
    }


def uncached(data, tokenizer):
    return whole(load(dataclasses.replace(data, cache="none"), tokenizer))


def entries(cache):
    return sorted(path.name for path in cache.iterdir())


def damage(file, how):
    if how == "missing":
        file.unlink()
    elif how == "cut":
        file.write_bytes(file.read_bytes()[: -file.stat().st_size // 2])
    else:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
