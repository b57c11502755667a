"""What an evaluation leaves on disk, and what is made of it when it is damaged."""

from __future__ import annotations

import json
import random

from damage import damages
from jaxmoo.commands.evaluate import main
from jaxmoo.errors import CheckpointError, ConfigError
from jaxmoo.evaluate.compare import compare
from jaxmoo.evaluate.results import LanguageResult, ResultStore, read_results

IDENTITY = {"weights": "abc", "data": "digest"}


def stored(path):
    columns = {"nats": [1.5, 2.5], "tokens": [3, 4], "bytes": [9, 8], "correct": [0, 1]}
    result = LanguageResult("digest", ["a", "b"], columns, {"corpus_chrf": 30.0})
    store = ResultStore(path)
    store.store("ja", IDENTITY, result)
    store.finish({"ja": result}, ["ja"], [], model="tuned")
    return store


def test_of_200_damages_to_an_evaluation_none_is_a_traceback(tmp_path):
    store = stored(tmp_path / "results.json")
    chance, refused = random.Random(0), 0
    for file in (store.output, next(store.directory.iterdir())):
        good = file.read_bytes()
        whole = json.loads(good)

        def replaced(whole=whole):
            key, value = chance.choice(list(whole)), chance.choice([None, 3, "x", [], {"a": 1}])
            return whole | {key: value}

        for content in damages(good, chance, replaced):
            file.write_bytes(content)
            try:
                compare(*[read_results(store.output)] * 2, resamples=100, seed=0)
                store.stored("ja", IDENTITY)
            except (CheckpointError, ConfigError) as error:
                refused += 1
                assert str(tmp_path) in str(error) or "results" in str(error)
        file.write_bytes(good)
    assert refused > 100
    assert read_results(store.output).languages["ja"].scores()["examples"] == 2


def test_an_output_that_cannot_be_written_is_found_before_a_model_is_looked_for(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    data = ["--data", str(tmp_path / "{language}.jsonl"), "--languages", "ja"]
    output = tmp_path / "file" / "results.json"
    assert main(["--model", "no/where/at/all", *data, "--output", str(output)]) == 2
    message = capsys.readouterr().err
    assert "--output: " in message and str(tmp_path / "file") in message
