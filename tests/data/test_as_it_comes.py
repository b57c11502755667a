"""Data as others publish it: shapes of well-known sets, several sources, own held-out files."""

from __future__ import annotations

import re

import pytest

from data.tables import load_corpus, load_examples, settings, write
from jaxmoo.config.data_section import LengthsConfig, check_data
from jaxmoo.config.training import load_config
from jaxmoo.data.division import divide
from jaxmoo.errors import ConfigError, DataError

XQUAD = {
    "id": "56beb4343aeaaa14008c925b",
    "context": "The Panthers defense gave up just 308 points.",
    "question": "How many points did the Panthers give up?",
    "answers": {"text": ["308", "just 308"], "answer_start": [34, 29]},
}
MGSM = {
    "question": "Question: Roger has 5 balls and buys 6. How many?",
    "answer": None,
    "answer_number": 11,
}
SIB = {"index_id": 1523, "category": "science/technology", "text": "Turtles replaced dolphins."}
TLDR = {"prompt": "List all files.", "label": "ls -a", "id": "linux/ls:0"}
SHAREGPT = {
    "id": "QWJhYvA_0",
    "conversations": [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hello"},
        {"from": "human", "value": "Bye"},
    ],
}


def one(tmp_path, record, **options):
    """The example of a file's only record."""
    write(tmp_path / "en.jsonl", [record])
    (example,) = load_examples(str(tmp_path), ["en"], **options)["en"]
    return example


@pytest.mark.parametrize(
    ("record", "options", "prompt", "reply"),
    [
        (
            XQUAD,
            {"prompt": "{context}\n\n{question}", "completion": "{answers.text[0]}"},
            f"{XQUAD['context']}\n\n{XQUAD['question']}",
            "308",
        ),
        (
            XQUAD,
            {"prompt": "{question}", "completion": "{answers.text[join: or ]}"},
            XQUAD["question"],
            "308 or just 308",
        ),
        (
            MGSM,
            {"prompt": {"en": "{question} "}, "completion": "{answer_number}"},
            f"{MGSM['question']} ",
            "11",
        ),
        (
            SIB,
            {"prompt": "{text}\n{{topic}}?", "columns": {"completion": "category"}},
            "Turtles replaced dolphins.\n{topic}?",
            "science/technology",
        ),
        (
            TLDR,
            {"columns": {"completion": "label", "group": "id"}},
            "List all files.",
            "ls -a",
        ),
        (SHAREGPT, {}, "Be brief.\nHi", "Hello"),
        (SHAREGPT, {"columns": {"messages": "conversations"}}, "Be brief.\nHi", "Hello"),
    ],
    ids=["xquad", "xquad joined", "mgsm", "sib200", "tldr", "sharegpt", "sharegpt named"],
)
def test_shapes_of_well_known_data_sets_are_read(record, options, prompt, reply, tmp_path):
    assert check_data(settings(tmp_path, **options)) == []
    example = one(tmp_path, record, **options)
    assert (example.prompt, example.reply) == (prompt, reply)


def test_an_element_is_drawn_by_the_record_alone(tmp_path):
    records = [XQUAD | {"question": f"{n}?"} for n in range(64)]
    texts = {"prompt": "{question}", "completion": "{answers.text[random]}"}
    replies = []
    for order in (records, records[::-1]):
        write(tmp_path / "en.jsonl", order)
        examples = load_examples(str(tmp_path), ["en"], **texts)["en"]
        replies.append({example.prompt: example.reply for example in examples})
    assert replies[0] == replies[1]
    assert 16 < sum(reply == "308" for reply in replies[0].values()) < 48


def test_a_system_text_comes_first_and_changes_nothing_that_is_held_out(tmp_path):
    rows = [{"prompt": f"{n}?", "completion": f"{n}!", "tone": "Kind."} for n in range(50)]
    for code in ("en", "fr"):
        write(tmp_path / f"{code}.jsonl", rows)
    plain = settings(tmp_path, seen=["en"], unseen=["fr"])
    told = settings(
        tmp_path, seen=["en"], unseen=["fr"], system={"en": "{tone} Speak.", "fr": "Parle."}
    )
    without, behind = (divide(data, ["en", "fr"], []) for data in (plain, told))
    for code, text in (("en", "Kind. Speak."), ("fr", "Parle.")):
        for part in ("train", "held_out"):
            mine, others = getattr(behind[code], part), getattr(without[code], part)
            assert [e.messages[1:] for e in mine] == [e.messages for e in others]
            assert all(e.messages[0] == {"role": "system", "content": text} for e in mine)
        assert behind[code].leaked == without[code].leaked
    assert without["fr"].leaked == len(without["en"].train)
    # A conversation's own system message stays.
    assert one(tmp_path, SHAREGPT, system="Be long.").prompt == "Be brief.\nHi"
    with pytest.raises(DataError, match=r"en.jsonl:1: plain text has no system message"):
        one(tmp_path, {"text": "a"}, system="Be long.")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{contxt}", r"en\.jsonl:1: no column 'contxt' for \{contxt\}\. Columns: id, context, .* "
         r"Did you mean 'context'\?"),
        ("{answers.txt}", r"no field 'txt' of answers for .* Fields: text, answer_start\. Did "),
        ("{answers.text}", r"expected text, found list .*: choose an element, \{answers\.text"),
        ("{answers}", "expected text, found dict .*: name one of its fields, text, answer_start"),
        ("{answers.text[2]}", r"answers\.text has 2 elements, not one \[2\]"),
        ("{question[0]}", "expected a list in question, found str"),
        ("{question.a}", "expected fields in question, found str"),
        ("{half}", r"expected text, found float 0\.5: say how it is written, \{half:\.1f\}"),
        ("{none}", r"\{none\}: expected text, found null"),
        ("{empty} ", "data.prompt gives no text"),
        ("{question:.1f}", "expected a number, found str"),
    ],
)  # fmt: skip
def test_a_field_that_is_not_there_is_named_with_those_that_are(text, complaint, tmp_path):
    record = XQUAD | {"half": 0.5, "none": None, "empty": " ", "completion": "x"}
    with pytest.raises(DataError, match=complaint):
        one(tmp_path, record, prompt=text)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"prompt": "{a"}, "data.prompt: expected '}' before end of string; a brace that is text"),
        ({"prompt": "{}"}, "data.prompt: {} names no field"),
        ({"prompt": "{a[x]}"}, r"expected the number of an element, from 0, random, join or"),
        ({"prompt": "{a!r}"}, "only numbers may have a format"),
        ({"prompt": "{a.__class__[join].x}"}, "nothing may follow a list that is joined"),
        ({"prompt": {"fr": "{a}"}}, "data.prompt has no text for en"),
        ({"prompt": {"en": None}}, "data.prompt.en must be text"),
        ({"prompt": 4}, "data.prompt must be text"),
        ({"prompt": "{a}", "columns": {"prompt": "b"}}, "either prompt or columns.prompt"),
        ({"prompt": "{a}", "columns": {"messages": "b"}}, "make a prompt and its reply"),
        ({"source": None}, "data.source is missing"),
        ({"sources": [{"weight": 1}]}, r"data.sources\[0\] names no source"),
        (
            {"sources": [{"source": "a", "wieght": 1}]},
            r"data.sources\[0\].wieght is not a setting. Did you mean 'weight'",
        ),
        (
            {"sources": [{"source": "a", "weight": 0}]},
            r"data.sources\[0\].weight must be a number above 0, found 0",
        ),
        (
            {"sources": [{"source": "a", "weight": 1}, {"source": "b"}]},
            "1 of 2 sources have a weight",
        ),
        (
            {"sources": [{"source": "a", "prompt": "{"}]},
            r"data.sources\[0\].prompt: ",
        ),
        ({"held_out_source": {"splt": "dev"}}, r"held_out_source.splt .* Did you mean 'split'"),
        ({"held_out_source": 3}, "held_out_source must be text or a mapping"),
        ({"lengths": LengthsConfig(min_tokens=9, max_tokens=8)}, "min_tokens is 9, more than"),
        ({"streaming": True, "max_held_out": 1, "held_out_source": "a"}, "reads one source"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_settings_that_cannot_be_are_found_before_anything_is_read(options, complaint):
    source = None if "sources" in options or "source" in options else "none"
    rest = {key: value for key, value in options.items() if key != "source"}
    (problem,) = check_data(settings(source, **rest))
    assert complaint in problem or re.search(complaint, problem)


def test_settings_of_texts_and_sources_are_read_from_yaml_and_overrides(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "output: out\nmodel: {source: none}\ntrain: {steps: 1}\n"
        "data:\n  seen: [en, fr]\n  prompt: '{context} {question}'\n"
        "  sources:\n  - {source: a.jsonl, weight: 2, columns: {completion: label}}\n"
        "  - {source: b.jsonl, weight: 1, prompt: {en: '{q}', fr: '{q} ?'}}\n"
        "  held_out_source: {source: c.jsonl}\n"
    )
    data = load_config(path, ["data.system={tone}"]).data
    assert [(one.source, one.prompt, one.columns.completion) for one in data.each] == [
        ("a.jsonl", "{context} {question}", "label"),
        ("b.jsonl", {"en": "{q}", "fr": "{q} ?"}, None),
    ]
    assert data.weights == [2, 1] and data.own_held_out.source == "c.jsonl"
    assert data.system == "{tone}"
    changed = load_config(path, ["data.system={en: Speak, fr: Parle}"]).data
    assert changed.system == {"en": "Speak", "fr": "Parle"}
    with pytest.raises(ConfigError, match=r"line 7: data\.sources must be a list such as"):
        path.write_text(path.read_text().replace("- {source: a.jsonl", "- 3\n  - {source: a.jsonl"))
        load_config(path)


def rows(name, count, start=0):
    return [{"prompt": f"{name} {n}?", "completion": f"{n}."} for n in range(start, start + count)]


def test_several_sources_have_the_shares_of_their_weights(tmp_path, tokenizer):
    write(tmp_path / "a" / "en.jsonl", rows("a", 40))
    write(tmp_path / "a" / "fr.jsonl", rows("a", 40))
    write(tmp_path / "b.jsonl", [{"q": f"b {n}", "a": "x", "lang": "en"} for n in range(10)])
    b = {
        "source": str(tmp_path / "b.jsonl"),
        "prompt": "{q}",
        "columns": {"completion": "a"},
        "language_column": "lang",
    }
    a = {"source": str(tmp_path / "a")}

    def load(*sources, seen=("en", "fr")):
        return load_corpus(None, tokenizer, seen=list(seen), sources=list(sources))

    even = load(a, b)
    weighed = load(a | {"weight": 1}, b | {"weight": 3})
    found = weighed.report["en"].by_source
    assert sum(found) == weighed.report["en"].train == len(even.train["en"])
    # Of b all examples, as often as it takes; of a every one once.
    assert len(weighed.train["en"]) == found[0] + 3 * found[0]
    texts = [one.tokens.tobytes() for one in weighed.train["en"]]
    counts = [texts.count(text) for text in texts[: sum(found)]]
    assert set(counts[: found[0]]) == {1}
    assert max(counts[found[0] :]) - min(counts[found[0] :]) <= 1
    assert len(weighed.train["fr"]) == weighed.report["fr"].by_source[0] == len(even.train["fr"])
    assert "shares of 25.0% and 75.0%" in weighed.table()
    kept = load(a | {"weight": 1}, b | {"weight": 3})  # as it was kept the first time
    assert texts == [one.tokens.tobytes() for one in kept.train["en"]]
    assert kept.report == weighed.report and kept.table() == weighed.table()

    # What one source says of itself need not be said for languages that it lacks.
    only = {"prompt": {"en": "{q}"}, "completion": {"en": "{a}"}, "columns": {}}
    assert len(load(a, b | only).train["en"]) == len(even.train["en"])
    with pytest.raises(DataError, match=r"b\.jsonl has none of the languages fr\. .*Available: en"):
        load(a, b, seen=["fr"])
    with pytest.raises(DataError, match=r"None of the sources .* has de\."):
        load(a, b, seen=["en", "de"])


def test_own_held_out_files_are_evaluated_without_what_is_trained_on(tmp_path, tokenizer):
    write(tmp_path / "train" / "en.jsonl", rows("en", 30))
    write(tmp_path / "dev" / "en.jsonl", rows("en", 10, start=25))
    write(tmp_path / "dev" / "fr.jsonl", rows("fr", 7))
    dev = str(tmp_path / "dev" / "{language}.jsonl")
    corpus = load_corpus(
        tmp_path / "train", tokenizer, unseen=["fr"], held_out_source=dev, max_held_out=4
    )
    en, fr = corpus.report["en"], corpus.report["fr"]
    assert (en.train, en.held_out, en.leaked, en.reserve) == (30, 4, 5, 1)
    assert (fr.train, fr.held_out, fr.leaked, fr.reserve) == (0, 4, 0, 3)
    assert en.records == 40
    # What is kept of it is made anew with the files.
    write(tmp_path / "dev" / "en.jsonl", rows("en", 3, start=90))
    again = load_corpus(tmp_path / "train", tokenizer, unseen=["fr"], held_out_source=dev)
    assert (again.report["en"].held_out, again.report["en"].leaked) == (3, 0)
    with pytest.raises(DataError, match=r"none of it that is not trained on, too \(30 are\)"):
        load_corpus(tmp_path / "train", tokenizer, held_out_source=str(tmp_path / "train"))


def test_examples_of_other_lengths_are_left_out_and_counted(tmp_path, tokenizer):
    texts = [
        ("ab", "c"),
        ("a" * 30, "b"),
        ("c" * 10, "d" * 10),
        *((f"q{n}", "r") for n in range(60)),
    ]
    write(tmp_path / "en.jsonl", [{"prompt": p, "completion": c} for p, c in texts])
    whole = load_corpus(tmp_path, tokenizer)
    assert "filtered" not in whole.table()
    short = load_corpus(tmp_path, tokenizer, lengths=LengthsConfig(max_characters=20))
    assert short.report["en"].filtered == 1 and "| filtered |" in short.table()
    limit = whole.report["en"].tokens_max - 1
    fewer = load_corpus(tmp_path, tokenizer, lengths=LengthsConfig(max_tokens=limit))
    assert fewer.report["en"].filtered == 1 and fewer.report["en"].tokens_max <= limit
    total = whole.report["en"].train + whole.report["en"].held_out
    for one in (short, fewer):
        assert one.report["en"].train + one.report["en"].held_out == total - 1
    with pytest.raises(DataError, match=r"no examples within data\.lengths, of 63"):
        load_corpus(tmp_path, tokenizer, lengths=LengthsConfig(min_characters=99))


def test_what_is_not_evaluated_is_said_and_may_be_trained_on(tmp_path, tokenizer):
    pairs = [{"prompt": f"{n // 2}?", "completion": f"{n}.", "id": n // 6} for n in range(120)]
    for code in ("en", "fr"):
        write(tmp_path / f"{code}.jsonl", pairs)
    options = {"held_out": 0.5, "max_held_out": 6, "seen": ["en"], "unseen": ["fr"]}
    options["columns"] = {"group": "id"}
    unused = load_corpus(tmp_path, tokenizer, **options)
    used = load_corpus(tmp_path, tokenizer, **options, train_unevaluated=True)
    before, after = unused.report["en"], used.report["en"]
    assert f"Held out but unused, being more than data.max_held_out: {before.reserve}" in (
        unused.table()
    )
    assert 0 < after.reserve < before.reserve
    assert after.train + after.reserve == before.train + before.reserve
    for code in ("en", "fr"):
        held = [one.tokens.tobytes() for one in used.held_out[code]]
        assert held == [one.tokens.tobytes() for one in unused.held_out[code]]
    split = divide(settings(tmp_path, **options, train_unevaluated=True), ["en", "fr"], [])
    train, evaluated = split["en"].train, [e for one in split.values() for e in one.held_out]
    assert not {e.group for e in train} & {e.group for e in evaluated}
    assert not {e.prompt for e in train} & {e.prompt for e in evaluated}
