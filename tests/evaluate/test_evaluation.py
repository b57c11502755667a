"""``jaxmoo evaluate`` from its command line to its files, against transformers."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from devices import run_together
from jaxmoo.commands.compare import main as compare
from jaxmoo.commands.evaluate import main
from jaxmoo.commands.train import main as train

COLUMNS = ["--columns", "prompt=text", "completion=topic", "group=id"]


@pytest.fixture(scope="module")
def arguments(chat_model, topics):
    """A function: the command line of a whole evaluation into a file."""

    def make(output, *more, data=topics, model=chat_model):
        command = ["--model", model, "--data", data, "--languages", "en", "ja", "--unseen", "uk"]
        command += [*COLUMNS, "--choices", "replies", "--generate", "8", "--batch-size", "4"]
        return list(map(str, [*command, "--output", output, *more]))

    return make


@pytest.fixture(scope="module")
def results(arguments, tmp_path_factory):
    """Where a finished evaluation lies."""
    output = tmp_path_factory.mktemp("results") / "results.json"
    assert main(arguments(output)) == 0
    return output


@pytest.fixture(scope="module")
def oracle(chat_model):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(chat_model, dtype=torch.float32)


def examples(topics, language):
    lines = Path(topics.replace("{language}", language)).read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def prompt(text):
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def log_likelihoods(oracle, tokenizer, before, after):
    """Of every token of a text, given those before it."""
    import torch

    ids = tokenizer(before + after, return_tensors="pt")["input_ids"]
    start = len(tokenizer(before)["input_ids"])
    with torch.no_grad():
        logits = torch.log_softmax(oracle(ids).logits.double(), -1)
    return [logits[0, t - 1, ids[0, t]].item() for t in range(start, ids.shape[1])]


def test_likelihoods_and_bits_per_byte_are_those_of_transformers(
    results, topics, oracle, tokenizer
):
    found = json.loads(results.read_text())["languages"]
    for language in ("en", "ja", "uk"):
        nats = tokens = n_bytes = 0
        for example in examples(topics, language):
            answer = example["topic"] + "<|im_end|>"
            values = log_likelihoods(oracle, tokenizer, prompt(example["text"]), answer)
            nats -= sum(values)
            tokens += len(values)
            n_bytes += len(example["topic"].encode())
        np.testing.assert_allclose(found[language]["nll"], nats / tokens, atol=1e-4)
        expected = nats / math.log(2) / n_bytes
        np.testing.assert_allclose(found[language]["bits_per_byte"], expected, atol=1e-4)


def test_choices_are_made_by_likelihood_over_length(results, topics, oracle, tokenizer):
    stored = json.loads((results.with_name("results.examples") / "ja.json").read_text())
    labels = sorted({e["topic"] for e in examples(topics, "ja")})
    correct, plain = [], []
    for example, nats in zip(examples(topics, "ja"), stored["columns"]["choice_nats"], strict=True):
        # White space that ends the prompt is scored with the choice.
        before = prompt(example["text"]).rstrip()
        sums = [sum(log_likelihoods(oracle, tokenizer, before, "\n" + c)) for c in labels]
        np.testing.assert_allclose(nats, np.negative(sums), atol=1e-4)
        right = labels.index(example["topic"])
        correct.append(
            int(np.argmax([s / len(c) for s, c in zip(sums, labels, strict=True)]) == right)
        )
        plain.append(int(np.argmax(sums) == right))
    assert stored["columns"]["correct"] == correct
    assert stored["columns"]["correct_unnormalised"] == plain
    scores = json.loads(results.read_text())["languages"]["ja"]
    assert scores["accuracy"] == np.mean(correct)
    assert scores["accuracy_unnormalised"] == np.mean(plain)


def test_replies_are_those_that_transformers_generates(results, topics, oracle, tokenizer):
    for language in ("en", "ja"):
        stored = json.loads(
            (results.with_name("results.examples") / f"{language}.json").read_text()
        )
        for example, generated in zip(
            examples(topics, language), stored["columns"]["generated"], strict=True
        ):
            ids = tokenizer(prompt(example["text"]), return_tensors="pt")
            out = oracle.generate(**ids, do_sample=False, max_new_tokens=8)
            text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
            assert generated == text.strip()


def test_summaries_are_of_languages_not_examples(results):
    found = json.loads(results.read_text())
    languages, summary = found["languages"], found["summary"]
    for name in ("nll", "bits_per_byte", "accuracy", "exact_match", "chrf"):
        values = {code: languages[code][name] for code in ("en", "ja", "uk")}
        np.testing.assert_allclose(summary[name]["seen"], (values["en"] + values["ja"]) / 2)
        assert summary[name]["unseen"] == values["uk"]
        pick = max if name in ("nll", "bits_per_byte") else min
        assert summary[name]["worst"] == pick(values.values())
        assert values[summary[name]["worst_language"]] == summary[name]["worst"]


def test_the_same_command_goes_on_and_repeats_nothing(results, arguments, tmp_path, capsys):
    shutil.copytree(results.parent, tmp_path, dirs_exist_ok=True)
    output = tmp_path / "results.json"
    whole = output.read_text()
    output.unlink()
    # As if stopped in the third language; a mark in another shows that it is not done again.
    stored = tmp_path / "results.examples"
    (stored / "uk.json").unlink()
    marked = json.loads((stored / "en.json").read_text())
    marked["columns"]["nats"][0] += 1000
    (stored / "en.json").write_text(json.dumps(marked))
    assert main(arguments(output)) == 0
    assert "Already evaluated: en, ja." in capsys.readouterr().out
    before, after = json.loads(whole)["languages"], json.loads(output.read_text())["languages"]
    assert before["uk"] == after["uk"] and before["ja"] == after["ja"]
    assert after["en"]["nll"] > before["en"]["nll"] + 10

    # Another evaluation does not mix with it, and what is there stays.
    for more in (["--generate", "4"], ["--dtype", "bfloat16"], ["--max-examples", "3"]):
        assert main(arguments(output, *more)) == 2
        assert "holds results of another evaluation" in capsys.readouterr().err
    assert json.loads(output.read_text())["languages"] == after


@pytest.fixture(scope="module")
def dated(chat_model, topics, tmp_path_factory):
    """An evaluation of two examples by a template with a date and thoughts; its command line."""
    directory = tmp_path_factory.mktemp("dated")
    shutil.copytree(chat_model, directory / "model")
    template = (directory / "model" / "chat_template.jinja").read_text()
    thinking = (
        "{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}"
    )
    template = template.replace("{{ m['content'] }}", thinking)
    template = "It is {{ strftime_now('%d %b') }}. " + template
    (directory / "model" / "chat_template.jinja").write_text(template)
    command = ["--model", directory / "model", "--data", topics, "--languages", "en", "ja"]
    command += [*COLUMNS, "--choices", "replies", "--generate", "8", "--max-examples", "3"]
    command = [*map(str, [*command, "--output", directory / "results.json"])]
    assert main([*command, "--date", "2020-02-03"]) == 0
    return command


def test_replies_are_scored_and_generated_behind_what_the_template_puts_before_them(
    dated, topics, oracle, tokenizer
):
    stored = json.loads(
        Path(dated[-1]).with_name("results.examples").joinpath("en.json").read_text()
    )
    columns = stored["columns"]
    chosen = [e for e in examples(topics, "en") if e["id"] in stored["units"]]
    assert len(chosen) == 3
    labels = sorted({e["topic"] for e in chosen})
    for number, example in enumerate(chosen):
        before = f"It is 03 Feb. {prompt(example['text'])}<think>\n\n</think>"
        own = log_likelihoods(oracle, tokenizer, f"{before}\n\n", f"{example['topic']}<|im_end|>")
        assert columns["nats"][number] == pytest.approx(-sum(own), abs=1e-3)
        assert columns["tokens"][number] == len(own)
        sums = [sum(log_likelihoods(oracle, tokenizer, before, f"\n\n{c}")) for c in labels]
        assert columns["choice_nats"][number] == pytest.approx(np.negative(sums), abs=1e-3)
        ids = tokenizer(f"{before}\n\n", return_tensors="pt")
        out = oracle.generate(**ids, do_sample=False, max_new_tokens=8)
        text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert columns["generated"][number] == text.strip()


def test_an_evaluation_goes_on_with_the_date_it_began_with(dated):
    output = Path(dated[-1])
    first = json.loads(output.read_text())
    (output.with_name("results.examples") / "ja.json").unlink()
    assert main(dated) == 0
    assert json.loads(output.read_text()) == first and first["settings"]["date"] == "2020-02-03"
    assert main([*dated, "--date", "2020-02-04"]) == 2, "prompts of another day"
    assert main([*dated, "--date", "yesterday"]) == 2


def test_a_stored_date_that_is_none_is_damage(dated, capsys):
    file = Path(dated[-1]).with_name("results.examples") / "en.json"
    good = file.read_text()
    content = json.loads(good)
    for date in ("yesterday", 20200203):
        content["identity"]["date"] = date
        file.write_text(json.dumps(content))
        assert main(dated) == 2
        assert f"{file} is damaged (its date is {date!r})" in capsys.readouterr().err
    file.write_text(good)


def test_adapters_are_scored_on_the_model_they_name(chat_model, topics, tokenizer, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(chat_model, dtype=torch.float32)
    torch.manual_seed(0)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    # As trainers leave them: with a tokenizer, whose template is what was trained with.
    tokenizer.save_pretrained(tmp_path / "adapter")
    template = tmp_path / "adapter" / "chat_template.jinja"
    template.write_text("Topic: " + template.read_text())
    command = ["--model", tmp_path / "adapter", "--data", topics, "--languages", "en", *COLUMNS]
    command += ["--output", tmp_path / "results.json", "--max-examples", "2"]
    assert main(list(map(str, command))) == 0
    found = json.loads((tmp_path / "results.json").read_text())["languages"]["en"]
    stored = json.loads((tmp_path / "results.examples" / "en.json").read_text())
    assert found["examples"] == 2
    sums = {
        one["text"]: -sum(
            log_likelihoods(
                adapted, tokenizer, "Topic: " + prompt(one["text"]), one["topic"] + "<|im_end|>"
            )
        )
        for one in examples(topics, "en")
    }
    for nats in stored["columns"]["nats"]:
        assert min(abs(nats - one) for one in sums.values()) < 1e-3


@pytest.mark.slow
def test_results_do_not_depend_on_devices_or_processes(results, arguments, tmp_path):
    """Two processes with two devices each; the first begins where another evaluation stopped."""
    output = tmp_path / "{process}" / "results.json"
    first = tmp_path / "0" / "results.examples"
    first.mkdir(parents=True)
    shutil.copy(results.with_name("results.examples") / "en.json", first)
    command = ["-m", "jaxmoo", "evaluate", *arguments(output, "--mesh", "data=2")]
    said = run_together(command, devices=2)
    assert "Already evaluated: en." in said[0].stdout and "| worst" in said[0].stdout
    assert "worst" not in said[1].stdout, "the first process alone speaks"
    assert not (tmp_path / "1").exists(), "the first process alone writes"
    one, four = (
        json.loads(path.read_text()) for path in (results, tmp_path / "0" / "results.json")
    )
    assert one["weights"] == four["weights"]
    for code, scores in one["languages"].items():
        assert scores.pop("data") == four["languages"][code].pop("data")
        assert four["languages"][code] == pytest.approx(scores, rel=1e-5)
    columns = [
        json.loads(path.with_name("results.examples").joinpath("ja.json").read_text())["columns"]
        for path in (results, tmp_path / "0" / "results.json")
    ]
    for decision in ("generated", "correct", "correct_unnormalised"):
        assert columns[0][decision] == columns[1][decision]


@pytest.mark.slow
def test_a_run_is_scored_on_what_it_holds_out(chat_model, tmp_path, capsys):
    """As the run scores itself: split, order, limit, and unusable examples left out."""
    for language in ("en", "fa"):
        rows = [
            {"prompt": f"{language} {i}", "completion": "" if i % 7 == 0 else f"answer {i}"}
            for i in range(60)
        ]
        rows += [{"prompt": "shared", "completion": "the same"}]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{language}.jsonl").write_text(text)
    run, config = tmp_path / "run", tmp_path / "config.yaml"
    settings = {
        "output": str(run),
        "export": False,
        "report": False,
        "tensorboard": False,
        "model": {"source": str(chat_model), "trainable": r"^layers\.2\."},
        "data": {
            "source": str(tmp_path / "{language}.jsonl"),
            "seen": ["en"],
            "unseen": ["fa"],
            "held_out": 0.3,
            "max_held_out": 9,
            "sequence_length": 64,
        },
        "resolve": {"aggregator": "mean"},
        "optimizer": {"learning_rate": 0.01},
        "train": {"steps": 1},
    }
    config.write_text(yaml.safe_dump(settings))
    assert train(["--config", str(config)]) == 0
    expected = json.loads((run / "results.json").read_text())
    assert expected["after"]["en"]["nll"] != expected["before"]["en"]["nll"]

    for when, source in {"before": [chat_model, "--config", config], "after": [run]}.items():
        output = tmp_path / f"{when}.json"
        assert main(list(map(str, ["--model", *source, "--output", output]))) == 0
        found = json.loads(output.read_text())
        assert (found["seen"], found["unseen"]) == (["en"], ["fa"])
        for code, wanted in expected[when].items():
            scores = found["languages"][code]
            assert scores["examples"] == wanted["examples"]
            assert scores["nll"] == pytest.approx(wanted["nll"], rel=1e-5)
            assert scores["bits_per_byte"] == pytest.approx(wanted["bits_per_byte"], rel=1e-5)

    # What was not evaluated is, once: a model outside of runs on the examples of the other side.
    base = tmp_path / "base"
    shutil.copytree(chat_model, base)
    for a in (base, tmp_path / "before.json"):
        assert compare([str(a), str(run), "--output", str(tmp_path / "differences.json")]) == 0
        rows = json.loads((tmp_path / "differences.json").read_text())["nll"]
        for code in ("en", "fa"):
            for side, when in (("a", "before"), ("b", "after")):
                assert rows[code][side] == pytest.approx(expected[when][code]["nll"], rel=1e-5)
    assert (tmp_path / "base-held_out.json").exists() and (run / "held_out.json").exists()
    assert "Already evaluated: en, fa." in capsys.readouterr().out
    assert compare([str(base), str(base)]) == 2
    assert "outside of any training run" in capsys.readouterr().err
    assert compare([str(run), str(tmp_path / "none")]) == 2
    assert "There is no" in capsys.readouterr().err

    # On other data, a model is asked the same before and after it was trained: the run's sequence
    # length and columns are about its own.
    long = {"question": "q" * 90, "answer": "a long one"}
    (tmp_path / "long.jsonl").write_text(json.dumps(long | {"lang": "en"}) + "\n")
    same = [
        "--data",
        str(tmp_path / "long.jsonl"),
        "--language-column",
        "lang",
        "--languages",
        "en",
    ]
    same += ["--columns", "prompt=question", "completion=answer"]
    for model in (base, run):
        output = tmp_path / f"long {model.name}.json"
        assert main(["--model", str(model), *same, "--output", str(output)]) == 0
    assert compare([str(tmp_path / f"long {name}.json") for name in ("base", "run")]) == 0


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--languages", "en", "jp"], "has no language 'jp'. Available: .*ja"),
        (["--languages", "en", "en"], "named more than once: en"),
        (["--columns", "prompt=txt", "completion=topic"], "no column 'txt'.*Did you mean 'text'"),
        (["--columns", "text=text"], "data of en, ja, uk is plain text"),
        (["--columns", "question=text"], "--columns takes .*found 'question'"),
        (["--choices", "sports,travel"], "the reply 'politics' is none of its choices"),
        (["--choices", "sports"], "at least two different labels"),
        (["--choices", "column:options"], "no column 'options' for the choices"),
        (["--max-length", "257"], "the model reads at most 256 tokens"),
        (["--max-length", "20"], "no reply within 20 tokens.*--max-length"),
        (["--generate", "240"], "prompts with their new tokens exceed 256 tokens"),
        (["--max-examples", "0"], "--max-examples takes a positive number, found 0"),
        (["--output", "results.txt"], "ends in .json"),
        (["--step", "3"], "a step or base was given"),
        (["--mesh", "language=2"], "--mesh takes AXIS=N with an axis of data, fsdp, tensor"),
        (["--mesh", "data=3"], r"mesh: data \(3\) x .* but there are"),
    ],
)
def test_what_cannot_be_is_said_first(more, complaint, arguments, tmp_path, capsys):
    output = tmp_path / "results.json"
    command = arguments(output, *more)
    if more[0] == "--languages":
        command.remove("--unseen"), command.remove("uk")
    assert main(command) == 2
    error = capsys.readouterr().err
    assert re.search(complaint, error.replace("\n", " ")), error
    assert not output.exists() and not list(tmp_path.glob("*/*.json"))
