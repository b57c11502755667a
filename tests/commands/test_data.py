"""``jaxmoo data``: what a run will be trained on, without its weights."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from jaxmoo.commands.data import main
from jaxmoo.config.training import load_config
from jaxmoo.data.load import load_data
from jaxmoo.hf import load_tokenizer


def without_weights(model, path):
    """A copy of a model's directory, which no weights are in."""
    shutil.copytree(model, path, ignore=shutil.ignore_patterns("*.safetensors"))
    return path


@pytest.fixture(scope="module")
def no_weights(tiny_model, tmp_path_factory):
    """The tiny model's directory without its weights."""
    return without_weights(tiny_model, tmp_path_factory.mktemp("no_weights") / "model")


@pytest.mark.slow
def test_the_quick_starts_data_is_shown(smollm2_dir, tmp_path, capsys):
    no_weights = without_weights(smollm2_dir, tmp_path / "model")
    arguments = ["--config", "configs/quickstart.yaml", "--out", str(tmp_path / "out")]
    arguments += ["--languages", "fa,de", f"model.source={no_weights}", "data.max_held_out=5"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "| de (unseen) |" in shown and shown.count("--- fa: ") == shown.count("--- de: ") == 3
    # The loss is on the reply and what ends it.
    spans = re.findall(r"<\|im_start\|>assistant\n(.*?)(?=\n--- |\n\nWritten)", shown, re.DOTALL)
    assert len(spans) == 6
    assert all(re.fullmatch("\u27e6.+\u27e7", span.strip(), re.DOTALL) for span in spans)

    config = load_config("configs/quickstart.yaml", [f"model.source={no_weights}"])
    data = load_data(config, no_weights, say=lambda _: None)
    numbers = json.loads((tmp_path / "out" / "data.json").read_text())
    assert list(numbers["languages"]) == [*config.data.seen, *config.data.unseen]
    for language, one in numbers["languages"].items():
        if language in config.data.unseen:
            assert "rows" not in one and one["held_out"] == 5
            continue
        examples = data.corpus.train[language]
        assert one["train"] == one["rows"] == len(examples)
        assert one["tokens"] == sum(len(example.tokens) for example in examples)
        assert one["targets"] == sum(example.loss_mask.sum() for example in examples)
        assert one["epochs"] == config.train.steps * 3 / len(examples)
        assert one["filled"] == one["tokens"] / (128 * one["rows"]) < one["filled_packed"] <= 1
    trained = [one for one in numbers["languages"].values() if "rows" in one]
    for share in ("share_of_corpus", "share_of_run"):
        assert sum(one[share] for one in trained) == pytest.approx(1)
    assert (tmp_path / "out" / "data.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_of_a_stream_the_first_records_are_shown_as_if_they_were_all(
    no_weights, write_config, tmp_path, capsys
):
    stream = {"data__streaming": True, "data__shuffle_buffer": 20, "data__unseen": []}
    config = str(write_config(model__source=str(no_weights), **stream))
    assert main(["--config", config, "--languages", "fa", "--examples", "2"]) == 0
    shown = capsys.readouterr().out
    assert "counts each language's first 20 records as if they were all" in shown
    assert shown.count("--- fa: ") == 2
    languages = json.loads((tmp_path / "run-data" / "data.json").read_text())["languages"]
    for one in languages.values():
        assert 0 < one["rows"] <= 20 and 0 < one["held_out"] <= 4
        assert one["epochs"] == 4 * 2 / one["rows"]


def test_a_chat_template_from_a_file_is_used(no_weights, write_config, tmp_path, capsys):
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}",
        "utf-8-sig",
    )
    config = str(write_config(model__source=str(no_weights)))
    assert main(["--config", config, "--languages", "it", f"data.chat_template={template}"]) == 0
    out = capsys.readouterr().out
    assert "[assistant]\u27e6 " in out and "\ufeff" not in out
    assert (tmp_path / "run-data" / "data.json").exists()
    assert load_tokenizer(no_weights).chat_template != template.read_text()


def test_a_template_that_ends_no_reply_is_noted(no_weights, write_config, tmp_path, capsys):
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}")
    config = str(write_config(model__source=str(no_weights), data__seen=["it"], data__unseen=[]))
    assert main(["--config", config, f"data.chat_template={template}"]) == 0
    assert "Note: The chat template ends no reply with a special token" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "cannot read"),
        ("{{ prompt }}", "is no chat template"),
        ("{% for m in messages %}", "template is broken, line 1"),
        ("{{ messages[0].content }}{{ raise_exception('no users') }}", "user.*no users"),
    ],
)
def test_unusable_templates_are_refused(
    text, complaint, no_weights, write_config, tmp_path, capsys
):
    template = tmp_path / "template.jinja"
    if text is not None:
        template.write_text(text)
    config = str(write_config(model__source=str(no_weights), data__seen=["it"], data__unseen=[]))
    assert main(["--config", config, f"data.chat_template={template}"]) == 2
    assert re.search(complaint, capsys.readouterr().err)
    assert not (tmp_path / "run-data").exists()


def test_a_language_that_is_not_in_the_run_is_refused(no_weights, write_config, capsys):
    config = str(write_config(model__source=str(no_weights)))
    assert main(["--config", config, "--languages", "jp"]) == 2
    assert "'jp' is not in the run; there are it, pt, es, fa, de" in capsys.readouterr().err


def test_help_tells_what_is_shown(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "--examples" in capsys.readouterr().out
