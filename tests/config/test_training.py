"""Reading settings: what is accepted, and what is said about what is not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from devices import run_python
from jaxmoo.config import schema
from jaxmoo.config.training import (
    Config,
    differences,
    help_text,
    load_config,
    schema_markdown,
    to_yaml,
    validate,
)
from jaxmoo.errors import ConfigError

USES_NO_DEVICE = """
import sys
import jax
from jaxmoo.config import load_config

for overrides in (
    ["resolve.weighting=famo"],
    ["resolve={weighting: static, weighting_options: {weights: [1, 2, 3]}}"],
    ["data.languages_per_step=2"],
):
    languages = ["data.seen=[en, es, fr]", "data.unseen=[]"]
    load_config(sys.argv[1], ["output=out", *languages, *overrides])
jax.config.update("jax_num_cpu_devices", 3)  # an error once a device was used
"""
QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"

MINIMAL = """\
output: runs/test
model:
  source: smollm2-135m-instruct
data:
  source: chatterbot
  seen: [en, es]
train:
  steps: 10
"""


@pytest.fixture
def load(tmp_path):
    """Load a YAML text (a complete one unless given) with overrides."""

    def load(*overrides: str, text: str = MINIMAL) -> Config:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, overrides)

    return load


# --- What is accepted ------------------------------------------------------------------------


def test_quickstart_is_valid():
    config = load_config(QUICKSTART)
    assert config.data.seen == ["en", "es", "it", "ja", "ko", "zh", "fa", "pt"]
    assert config.data.unseen == ["de", "fr", "nl", "id", "uk"]
    assert config.model.trainable == r"^layers\.(2[2-9])\."


def test_a_file_fills_in_the_typed_tree(load):
    config = load()
    assert isinstance(config, Config)
    assert config.data.seen == ["en", "es"]
    assert config.train.steps == 10
    assert config.optimizer.learning_rate == 1e-4  # a default


def test_overrides_apply_in_order_and_have_the_declared_type(load):
    config = load(
        "train.steps=20",
        "train.steps=30",
        "optimizer.learning_rate=1e-5",
        "optimizer.clip_norm=null",
        "data.unseen=[de, fr]",
        "mesh={language: 2}",
        "export=false",
        r"model.trainable=^layers\.(2[2-9])\.",
    )
    assert config.train.steps == 30
    assert config.optimizer.learning_rate == 1e-5
    assert config.optimizer.clip_norm is None
    assert config.data.unseen == ["de", "fr"]
    assert (config.mesh.language, config.mesh.fsdp) == (2, None)
    assert config.export is False
    assert config.model.trainable == r"^layers\.(2[2-9])\."


def test_an_override_mends_a_wrong_value_in_the_file(load):
    assert load("train.steps=5", text=MINIMAL.replace("10", "many")).train.steps == 5


def test_a_mapping_is_changed_by_entry_or_replaced_whole(load):
    text = MINIMAL + "resolve:\n  options: {c: 0.4}\n"
    assert load("resolve.options.c=0.3", text=text).resolve.options == {"c": 0.3}
    assert load("resolve.aggregator=mean", "resolve.options={}", text=text).resolve.options == {}
    assert load("resolve.preference.es=2").resolve.preference == {"es": 2.0}


def test_norwegian_is_a_language_and_1e_4_a_number(load):
    config = load("data.unseen=[no]", text=MINIMAL + "optimizer:\n  learning_rate: 1e-4\n")
    assert config.data.unseen == ["no"]
    assert config.optimizer.learning_rate == 1e-4


def test_settings_can_refer_to_each_other(load):
    config = load("output=runs/${resolve.aggregator}-${seed}", "seed=3")
    assert config.output == "runs/cagrad-3"


def test_an_empty_section_means_defaults(load):
    assert load(text=MINIMAL + "mesh:\n").mesh == Config().mesh


def test_yaml_round_trip(load, tmp_path):
    config = load(
        "data.seen=[en, no]",
        "data.codes={en: '1e3', no: 'off'}",
        "resolve.preference={no: 1.5}",
        "output='true'",
        r"model.trainable=^layers\.(2[2-9])\.",
        "optimizer.eps=1e-9",
    )
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config))
    assert load_config(again) == config


def test_a_tree_made_by_hand_is_checked_as_strictly(load):
    config = load()
    validate(config)
    wrong = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=0))
    with pytest.raises(ConfigError, match=r"data\.batch_size must be an integer, at least 1"):
        validate(wrong)
    with pytest.raises(ConfigError, match="output is missing"):
        validate(Config())


# --- What is not accepted --------------------------------------------------------------------

BAD_OVERRIDES = {
    # unknown keys, with the nearest one
    "optimizer.learning_rte=1": r"learning_rte is not a setting\. Did you mean 'learning_rate'",
    "learning_rate=1": r"Did you mean 'optimizer\.learning_rate'",
    "trian.steps=3": "trian is not a setting. Did you mean 'train'",
    "data.columns.mesages=a": "Did you mean 'messages'",
    "train={stpes: 3}": "Did you mean 'steps'",
    "train.steps.more=3": r"train\.steps is set as a whole",
    # wrong types: key, what was expected, what was found
    "train.steps=1.5": r"train\.steps must be an integer, at least 1, found 1\.5",
    "train.steps=many": "an integer.*found many",
    "train.steps=true": "an integer.*found true",
    "train.steps=": "an integer.*found null",
    "optimizer.b1=high": "must be a number.*found high",
    "export=maybe": "must be true or false, found maybe",
    "data.seen=en": r"must be a list such as \[en, fr\], found en",
    "data.seen=[en, null]": r"must be a list.*found \[en, null\]",
    "data.seen=[en, [es]]": "must be a list",
    "resolve.options=3": r"must be a mapping such as \{c: 0\.5\}, found 3",
    "resolve.preference={en: much}": "must be a mapping to numbers",
    "output=": "output must be text, found null",
    "output=''": "output must be text, found ''",
    "model=3": "model must be a section",
    # out of range
    "train.steps=0": "an integer, at least 1, found 0",
    "seed=-1": "at least 0",
    "data.held_out=0": "above 0 and below 1",
    "data.held_out=1": "above 0 and below 1",
    "data.max_held_out=0": "at least 1 or null",
    "data.sequence_length=1": "at least 2",
    "optimizer.learning_rate=0": "above 0",
    "optimizer.learning_rate=.nan": "above 0, found .nan",
    "optimizer.eps=.inf": "above 0, found .inf",
    "optimizer.b2=1": "below 1",
    "mesh.fsdp=0": "at least 1 or null",
    # unknown choices, with the nearest one
    "optimizer.decay=cosin": "constant, wsd, found cosin. Did you mean 'cosine'",
    "model.dtype=fp32": "one of float32, bfloat16",
    "model.remat=null": "one of full, dots, none, found null",
    "resolve.aggregator=cagard": "unknown method 'cagard'. Did you mean 'cagrad'",
    "resolve.options={d: 1}": r"resolve\.options do not suit cagrad.*d",
    "resolve.blocks=layers": "Unknown blocks 'layers'. Did you mean 'layer'",
    "resolve.blocks=bytes:many": "expected a positive size",
    "model.trainable=layers.(2": "not a regular expression",
    # contradictions
    "data.seen=[]": "name at least one language",
    "data.seen=[en, es, en]": "names en more than once",
    "data.unseen=[es]": "es in both data.seen and data.unseen",
    "data.seen=[en, e/s]": "letters, digits.*'e/s'",
    "resolve.preference={eng: 2}": "'eng', which is not in data.seen. Did you mean 'en'",
    "resolve.preference={en: 0}": r"resolve\.preference\.en must be above 0",
    "resolve.weighting=fano": "Unknown weighting 'fano'. Did you mean 'famo'",
    "resolve.weighting_options={x: 1}": "no effect without resolve.weighting",
    "resolve={weighting: famo, weighting_options: {gama: 1}}": "gama.*Did you mean 'gamma'",
    "resolve={weighting: static, weighting_options: {weights: [1]}}": "1 weights were given for 2",
    "resolve={weighting: static, weighting_options: {weights: [1, 0]}}": "a weight above 0",
    "optimizer.warmup_steps=11": "more than the 10 of train.steps",
    "optimizer.decay_steps=3": "no effect without optimizer.decay=wsd",
    "data.columns={messages: a, prompt: b}": "either messages or prompt and completion",
    "data.columns={text: a, prompt: b}": "or text: name columns of one kind",
    "data.max_malformed=1": "at least 0 and below 1",
    "data.streaming=true": "data.max_held_out must be set, for nobody knows all the examples",
    "data={streaming: true, max_held_out: 2, disjoint_replies: true}": "must be false, for nobody",
    "data={streaming: true, max_held_out: 2, languages_per_step: 1, sampling: {temperature: 2}}": (
        "temperature must be null"
    ),
    "data.languages_per_step=3": "is 3, but data.seen has 2 languages",
    "data.sampling.temperature=2": "no effect when every language takes part",
    "data={languages_per_step: 1, sampling: {weights: {eng: 2}}}": "'eng', which is not in data.s",
    "data={languages_per_step: 1, sampling: {weights: {en: 0}}}": "weights.en must be above 0",
    "data={languages_per_step: 1, sampling: {weights: {en: 1}, temperature: 1}}": "not both",
    # syntax
    "train.steps": "expected section.key=value",
    "data.seen=[en": "not YAML",
    "seed=${nothing.there}": "nothing.there",
    "seed=${": r"seed.*\$\{",
}


@pytest.mark.parametrize("override", BAD_OVERRIDES)
def test_bad_override(load, override):
    with pytest.raises(ConfigError, match=BAD_OVERRIDES[override]):
        load(override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("resolve.preference={en: 2}", "give data.sampling.weights instead"),
        ("resolve.weighting=famo", "resolve.weighting follows fixed languages"),
        ("resolve.aggregator=gradvac", "gradvac has or keeps numbers for each language"),
        ("resolve={aggregator: constant, options: {weights: [1, 2]}}", "constant has or keeps"),
    ],
)
def test_what_belongs_to_fixed_languages_is_refused_when_they_are_sampled(load, override, message):
    load(override)
    with pytest.raises(ConfigError, match=message):
        load("data.languages_per_step=1", override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("resolve.gram=sketch", "resolve.gram: expected 'exact' or 'sketch:N'"),
        ("resolve.aggregator=graddrop", "resolve.gram: graddrop works coordinate by coordinate"),
        ("resolve.replicas=pooled_gram", "found 'pooled_gram'. Use mean_then_resolve"),
        (
            "train={steps: 1, microbatches: 2, accumulation: accumulate_first}",
            "nothing is left to sketch",
        ),
        ("mesh.tensor=2", "Use mesh.tensor=1"),
    ],
)
def test_what_cannot_be_sketched_is_refused(load, override, message):
    load("resolve.gram=sketch:1024")
    if not override.startswith("resolve.gram"):
        load(override)
    with pytest.raises(ConfigError, match=message):
        load("resolve.gram=sketch:1024", override)


def test_one_objective_at_a_time_needs_sketches_in_the_backward_pass(load):
    load("resolve.gram=sketch:1024", "resolve.keep=one")
    for other in ("resolve.gram=exact", "resolve.engine=stacked"):
        with pytest.raises(ConfigError, match=r"resolve\.keep=one needs resolve\.gram=sketch:N"):
            load("resolve.gram=sketch:1024", "resolve.keep=one", other)


def test_errors_in_the_file_name_it_and_the_line(load):
    with pytest.raises(ConfigError, match=r"run\.yaml: line 8: train\.steps must be an integer"):
        load(text=MINIMAL.replace("10", "ten"))
    with pytest.raises(ConfigError, match=r"line 7: trani is not a setting.*'train'"):
        load("train.steps=1", text=MINIMAL.replace("train:", "trani:"))


def test_all_problems_are_told_at_once(load):
    with pytest.raises(ConfigError) as caught:
        load("seed=x", "modle.dtype=float32", text=MINIMAL.replace("steps: 10", "setps: 10"))
    for part in ("4 problems", "seed must be", "modle is not", "setps is not", "steps is missing"):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", ["output", "model.source", "data.seen", "train.steps"])
def test_missing_mandatory_setting(load, name):
    line = next(x for x in MINIMAL.splitlines() if name.rpartition(".")[2] + ":" in x)
    with pytest.raises(ConfigError, match=f"{name} is missing"):
        load(text=MINIMAL.replace(line + "\n", "", 1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {steps: [1\n", "line 2, column 1: .*expected ',' or ']'"),
        ("train:\n\tsteps: 1\n", r"line 2, column 1: .*'\\t'"),
        ("train:\n  steps: 1\n  steps: 2\n", "line 3, column 3: 'steps' is given twice, .*line 2"),
        ("- train\n", r"line 1: expected settings \(key: value\), found \[train\]"),
        ("train: 5\n", "line 1: train must be a section"),
        ("", "output is missing"),
        ("? [a]\n: 1\n", "a key must be a word"),
        ("output: !!python/object:os.system x\n", "could not determine a constructor"),
    ],
)
def test_a_file_that_is_not_a_config(load, text, message):
    with pytest.raises(ConfigError, match=message):
        load(text=text)


def test_a_missing_file_lists_those_there_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.yaml").write_text(MINIMAL)
    with pytest.raises(ConfigError, match=r"no config file configs/quikstart\.yaml") as caught:
        load_config("configs/quikstart.yaml")
    assert "Did you mean 'configs/quickstart.yaml'?" in str(caught.value)
    with pytest.raises(ConfigError, match="is a directory"):
        load_config("configs")


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"output: \xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(tmp_path / "a.yaml")


# --- What means harm -------------------------------------------------------------------------


def repeated(first: str, then: str) -> str:
    """Options that each stand for nine of those before."""
    lines = [f"    a: &a {first}"]
    for name, before in zip("bcdefghij", "abcdefghi", strict=True):
        lines.append(f"    {name}: &{name} {then}".replace("*", ", ".join([f"*{before}"] * 9)))
    return MINIMAL + "resolve:\n  options:\n" + "\n".join(lines) + "\n"


def options(value: str) -> str:
    return MINIMAL + f"resolve: {{options: {{a: {value}}}}}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (repeated("[x, x]", "[*]"), "more than 10,000 values, anchors"),
        (repeated("{x: 1}", "{<<: [*]}"), "more than 10,000 values, anchors"),
        (options(f"[{'x, ' * 10_000}x]"), "more than 10,000 values"),
        (options("&a [*a]"), "the anchor 'a' contains itself"),
        (options("&a {b: {<<: *a}}"), "the anchor 'a' contains itself"),
        (options("[" * 100_000), "line 9, column 53: values are nested more than 32 deep"),
        (options("{a: " * 400 + "1" + "}" * 400), "nested more than 32 deep"),
        (options("!!int abc"), "line 9, column 24: 'abc' cannot be read as int"),
        (options("!!float abc"), "'abc' cannot be read as float"),
        (options("!!bool maybe"), "'maybe' cannot be read as bool"),
        (options("!!timestamp 2020-99-99"), "cannot be read as timestamp|month must be in 1..12"),
        (MINIMAL + "seed: " + "9" * 5000, r"line 9, column 7: '9{70,}\.\.\. cannot be read as int"),
        (MINIMAL + "seed: " + "9" * 4000, r"seed must be an integer.*, found 9{200}\.\.\.\."),
        (MINIMAL + "# " + "x" * 2**20, "is no config file: it is larger than 1,048,576 bytes"),
        (MINIMAL.replace("runs/test", "${wandb}" * 31), r"more than 30 references \$\{\.\.\.\}"),
        (MINIMAL.replace("runs/test", r'"a\0b"'), "output holds a character that no file can hold"),
        (MINIMAL.replace("runs/test", r'"\ud800"'), "output holds a character that no file can"),
    ],
    ids=lambda text: text[-40:],
)
def test_texts_that_blow_up_or_stand_for_nothing_are_refused_at_once(load, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load(text=text)
    assert len(str(caught.value)) < 1000


def test_anchors_that_do_no_harm_are_read(load):
    text = MINIMAL.replace("[en, es]", "&codes [en, es]") + "lora: {rank: 4, targets: [q_proj]}\n"
    assert load(
        text=text + "resolve: {preference: {en: &two 2, es: *two}}\n"
    ).resolve.preference == {
        "en": 2.0,
        "es": 2.0,
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "seed=4294967296",
            "seed must be an integer, at least 0 and at most 4294967295, found 4294",
        ),
        (f"seed={2**64}", "seed must be .* at most 4294967295, found 18446744073709551616"),
        (
            "data.batch_size=1000000000000",
            "is 1000000000000, beyond the largest integer, 2147483647",
        ),
        (
            "data={batch_size: 1000000, sequence_length: 2000}",
            "is 4000000000, more tokens than an ar",
        ),
        ("data.sequence_length=2147483648", "beyond the largest integer, 2147483647"),
        ("lora.rank=10000000000", "lora.rank is 10000000000, beyond the largest integer"),
        ("train.steps=1" + "0" * 30, "train.steps is 1000000000000000000000000000000, beyond"),
        (
            "resolve.options.c=1e300",
            "options is 1e.300, beyond the largest number, 3.4e.38",
        ),
        ("optimizer.learning_rate=1e300", "learning_rate is 1e.300, beyond the largest number"),
        (
            "optimizer.learning_rate=1" + "0" * 400,
            "learning_rate must be a number, above 0, found",
        ),
        (
            "train.checkpoint_every=10m",
            "a time such as 90s, 10min or 2h; found",
        ),
        ("train.checkpoint_every=0s", "train.checkpoint_every must be a number of steps"),
        ("train.checkpoint_every=-1", "train.checkpoint_every must be a number of steps"),
        ("train.checkpoint_every=0.5", "train.checkpoint_every must be an integer or text, found"),
        ("train.hang_timeout=1e10", "must be a number, at least 0 and at most 1000000000, found"),
        ("resolve.options.c=[" + "[" * 1000, "values are nested more than 32 deep"),
        ("wandb=a\ud800", "not YAML: unacceptable character #xd800"),
    ],
    ids=lambda text: text[:40],
)
def test_numbers_that_nothing_can_hold_are_refused(load, override, message):
    with pytest.raises(ConfigError, match=message):
        load(override)


def test_settings_put_together_by_hand_are_checked_as_strictly(load):
    config = load()
    for seed in (10**400, 2**32, -1):
        with pytest.raises(ConfigError, match="seed must be an integer, at least 0 and at most"):
            validate(dataclasses.replace(config, seed=seed))


# --- Resuming --------------------------------------------------------------------------------


def test_differences_name_what_makes_resuming_wrong(load):
    changed = differences(load(), load("optimizer.learning_rate=2e-4", "data.seen=[es, en]"))
    assert changed == [
        "data.seen: [en, es] -> [es, en]",
        "optimizer.learning_rate: 0.0001 -> 0.0002",
    ]


def test_the_date_of_a_run_stays_once_it_is_noted(load):
    dated, other = load("data.date=2026-07-26"), load("data.date=2026-07-27")
    assert dated.data.date == "2026-07-26"
    assert differences(dated, other) == ["data.date: '2026-07-26' -> '2026-07-27'"]
    assert differences(load(), dated) == [], "of a run that is older than the setting"
    with pytest.raises(ConfigError, match=r"data\.date is 'today', expected a date"):
        load("data.date=today")


def test_what_is_only_watched_or_written_may_change(load):
    new = load(
        "output=elsewhere",
        "train.log_every=5",
        "train.evaluate_every=5",
        "train.checkpoint_every=5",
        "train.keep_checkpoints=1",
        "report=false",
        "export=false",
        "tensorboard=false",
        "model.remat=none",
        "mesh.language=1",
    )
    assert differences(load(), new) == []


def test_a_run_can_be_made_longer_as_far_as_the_schedule_allows(load):
    assert differences(load(), load("train.steps=20")) == ["train.steps: 10 -> 20"]
    constant = "optimizer.decay=constant"
    assert differences(load(constant), load(constant, "train.steps=20")) == []
    # With one, while the learning rates so far would be the same.
    stable = ["optimizer.decay=wsd", "optimizer.decay_steps=4"]
    for done, free in ((7, True), (8, False)):
        changed = differences(load(*stable), load(*stable, "train.steps=20"), done)
        assert bool(changed) != free, done
    assert differences(load(), load("train.steps=20"), done=1) == []
    assert len(differences(load(), load(constant, "train.steps=20"))) == 2


# --- Documentation ---------------------------------------------------------------------------


@pytest.mark.parametrize("text", [schema_markdown, help_text])
def test_every_setting_is_documented(text):
    page = text()
    for name, leaf in schema.leaves(Config).items():
        assert name in page
        assert leaf.doc.endswith(".") and leaf.doc[0].isupper()


def test_markdown_tables_are_well_formed():
    rows = [line for line in schema_markdown().splitlines() if line.startswith("| `")]
    assert len(rows) == len(schema.leaves(Config))
    assert all(row.replace("\\|", "").count("|") == 6 for row in rows)


def test_help_fits_a_terminal():
    assert max(map(len, help_text().splitlines())) <= 96


def test_the_page_of_settings_is_up_to_date():
    """To make it again, print schema_markdown() into it."""
    page = Path(__file__).parents[2] / "docs" / "config.md"
    assert page.read_text() == schema_markdown()


def test_methods_that_need_two_batches_are_refused(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text((Path(__file__).parents[2] / "configs" / "quickstart.yaml").read_text())
    with pytest.raises(ConfigError, match="gradients of two batches"):
        load_config(file, ["resolve.aggregator=modo", "resolve.options={}"])


def test_reading_settings_uses_no_device():
    """Or the processes of a run, which read them first, could not be connected any more."""
    run_python(["-c", USES_NO_DEVICE, QUICKSTART])
