"""A study of a tiny random model on three small languages, and what it leaves when it is run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

import tiny_models
from jaxmoo.commands.study import main
from tiny_tokenizer import chat_tokenizer

# It reads the clock, but does not show what it says.
TEMPLATE = (
    "{% set today = strftime_now('%d %b %Y') %}"
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
LABELS = ["sports", "travel", "law"]
LETTERS = {"en": "abcdefgh", "fi": "ijklmnop", "tr": "qrstuvwx"}


@pytest.fixture(scope="session")
def write_study(tmp_path_factory):
    """Write the configs of a study, with changes by dotted name; return the study's file."""
    shared = tmp_path_factory.mktemp("study")
    tiny_models.save("llama", shared / "model", vocab_size=262, max_position_embeddings=96)
    chat_tokenizer(TEMPLATE).save_pretrained(shared / "model")
    for seed, (language, letters) in enumerate(LETTERS.items()):
        rng = np.random.default_rng(seed)
        rows = [
            {"id": str(i), "text": "".join(rng.choice(list(letters), 9)), "topic": LABELS[i % 3]}
            for i in range(60)
        ]
        (shared / f"{language}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    base = {
        "output": "unused",
        "model": {"source": str(shared / "model"), "trainable": r"^layers\.2\.", "remat": "none"},
        "data": {
            "source": str(shared / "{language}.jsonl"),
            "seen": ["en", "fi"],
            "unseen": ["tr"],
            "columns": {"prompt": "text", "completion": "topic", "group": "id"},
            "batch_size": 2,
            "sequence_length": 48,
            "held_out": 0.4,
            "max_held_out": 1,
        },
        "resolve": {"engine": "stacked"},  # the quickest to compile
        "train": {"steps": 3},
    }
    (shared / "base.yaml").write_text(yaml.safe_dump(base))

    def write(directory: Path, **changes) -> Path:
        study = {
            "output": str(directory / "study"),
            "base": str(shared / "base.yaml"),
            "arms": {
                "mean": ["resolve.aggregator=mean"],
                "mgda": ["resolve.aggregator=mgda", "resolve.match_norm=true"],
            },
            "baseline": "mean",
            "seeds": [1, 2],
            "learning_rates": [1e-3],
            "measure": {"choices": ",".join(LABELS)},
        } | changes
        path = directory / "study.yaml"
        path.write_text(yaml.safe_dump(study, sort_keys=False))
        return path

    return write


@pytest.fixture(scope="session")
def finished(write_study, tmp_path_factory) -> Path:
    """The file of a study that was run, in two portions; the first run's directory was kept."""
    file = write_study(tmp_path_factory.mktemp("finished"))
    assert main(["--config", str(file), "--max-runs", "1", "keep_runs=true"]) == 0
    assert main(["--config", str(file)]) == 0
    return file
