"""lm-evaluation-harness on an exported directory, without a hub; left out where it is absent.

Installing it takes about a minute, so the tests' own requirements are without it. In CI they fail
then.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from devices import ROOT, run_python
from jaxmoo.commands.evaluate import main

if not os.environ.get("CI"):
    pytest.importorskip("lm_eval")
import lm_eval

TASK = """
task: topics_{language}
dataset_path: json
dataset_kwargs:
  data_files: {file}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: [politics, sports, travel]
doc_to_target: topic
metric_list:
  - metric: acc
  - metric: acc_norm
"""
GROUP = """
group: topics
task:
  - group: seen
    task: [topics_en, topics_ja]
    aggregate_metric_list:
      - metric: acc_norm
        weight_by_size: false
"""


def test_both_choose_alike(chat_model, topics, tmp_path):
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for language in ("en", "ja"):
        file = topics.replace("{language}", language)
        (tasks / f"{language}.yaml").write_text(TASK.format(language=language, file=file))
    (tasks / "group.yaml").write_text(GROUP)
    out = tmp_path / "out.json"
    run_python(
        [
            "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "6",
            "--model_args", f"pretrained={chat_model},dtype=float32", "--apply_chat_template",
            "--include_path", tasks, "--tasks", "topics", "--output_path", out, "--log_samples",
        ],
        HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=str(tmp_path / "cache"),
    )  # fmt: skip
    (file,) = tmp_path.glob("out*.json")
    theirs = json.loads(file.read_text())["results"]

    output = tmp_path / "ours.json"
    command = ["--model", chat_model, "--data", topics, "--languages", "en", "ja"]
    command += ["--columns", "prompt=text", "completion=topic", "--choices", "replies"]
    assert main([*map(str, command), "--output", str(output)]) == 0
    ours = json.loads(output.read_text())
    for language in ("en", "ja"):
        found, expected = ours["languages"][language], theirs[f"topics_{language}"]
        assert found["accuracy"] == pytest.approx(expected["acc_norm,none"])
        assert found["accuracy_unnormalised"] == pytest.approx(expected["acc,none"])
        # Not only who wins: the likelihoods themselves.
        (samples,) = tmp_path.glob(f"samples_topics_{language}*.jsonl")
        stored = json.loads((tmp_path / f"ours.examples/{language}.json").read_text())
        for line, nats in zip(
            samples.read_text("utf-8").splitlines(), stored["columns"]["choice_nats"], strict=True
        ):
            answers = json.loads(line)["filtered_resps"]
            assert [-float(answer[0]) for answer in answers] == pytest.approx(nats, abs=1e-3)
    (seen,) = [v for name, v in theirs.items() if name.endswith("seen")]
    assert seen["acc_norm,none"] == pytest.approx(ours["summary"]["accuracy"]["seen"])


def test_the_benchmarks_we_name_exist():
    from lm_eval.tasks._index import TaskIndex

    def members(tasks):
        for task in tasks:
            yield from [task] if isinstance(task, str) else members(task["task"])

    installed = Path(lm_eval.__file__).parent / "tasks"
    kinds = ("belebele", "global_mmlu/default", "include/default", "mgsm/direct", "xcopa", "xnli")
    ours = ROOT / "configs" / "eval"
    known = TaskIndex.build([ours, *(installed / kind for kind in kinds)])
    groups = {file.stem: yaml.safe_load(file.read_text()) for file in ours.glob("*.yaml")}
    assert len(groups) == 7
    for name, group in groups.items():
        assert group["group"] == ("jaxmoo" if name == "all" else f"jaxmoo_{name}")
        assert [task for task in members(group["task"]) if task not in known] == []
