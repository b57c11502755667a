"""Records in four languages, a directory to keep their tokens in, and what is tokenised."""

from __future__ import annotations

import json

import pytest

from data.kept import LANGUAGES
from jaxmoo.data.tokenization import parallel


@pytest.fixture
def folder(tmp_path):
    """Three languages to train on and one more; of some examples the translation is held out."""
    for number, language in enumerate(LANGUAGES):
        rows = [
            {
                "prompt": f"{language} {i % 20}?\n",
                "completion": f"reply {i % 7} " * (1 + i % 5),
                "other": f"another {i}",
                "half": f"{i // 2}",
                "group": i if i % 2 else None,
            }
            for i in range(24 + 4 * number)
        ]
        rows[3]["completion"] = "<|im_end|> is spelled"
        lines = [json.dumps(row) for row in rows]
        lines[7] = "{no json"
        (tmp_path / f"{language}.jsonl").write_text("\n".join(lines))
    return tmp_path


@pytest.fixture
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def parts(monkeypatch):
    """The languages of the parts that are tokenised from here on."""
    found, tokenized = [], parallel.tokenized

    def noted(task, tokenizer):
        found.append(task.examples[0].language)
        return tokenized(task, tokenizer)

    monkeypatch.setattr(parallel, "tokenized", noted)
    return found
