"""From a source to tokenised examples: what is kept, what is not, and what is said about it."""

from __future__ import annotations

import itertools
import json

import pytest

from data.tables import load_corpus, load_examples
from jaxmoo.data.tokenization import template
from jaxmoo.errors import ConfigError, DataError


def write(folder, language, pairs):
    lines = [json.dumps({"prompt": p, "completion": c}) for p, c in pairs]
    (folder / f"{language}.jsonl").write_text("\n".join(lines))


@pytest.fixture
def folder(tmp_path):
    for language in ("en", "fa", "de"):
        write(tmp_path, language, [(f"{language} {i}?", f"reply {i}") for i in range(60)])
    return tmp_path


def load(folder, tokenizer, **options):
    defaults = {"seen": ["en", "fa"], "unseen": ["de"], "sequence_length": 128, "held_out": 0.3}
    return load_corpus(str(folder), tokenizer, **(defaults | options))


def texts(tokenizer, examples):
    return [tokenizer.decode(e.tokens) for e in examples]


def test_seen_languages_are_split_and_unseen_ones_evaluated_whole(folder, tokenizer):
    corpus = load(folder, tokenizer)
    assert list(corpus.train) == ["en", "fa"]
    assert list(corpus.held_out) == ["en", "fa", "de"]
    assert len(corpus.held_out["de"]) == 60
    for language in ("en", "fa"):
        train = texts(tokenizer, corpus.train[language])
        held_out = texts(tokenizer, corpus.held_out[language])
        assert train and held_out and not set(train) & set(held_out)
        assert len(train) + len(held_out) == 60


def test_a_limit_on_evaluation_leaves_training_as_it_was(folder, tokenizer):
    whole, limited = load(folder, tokenizer), load(folder, tokenizer, max_held_out=5)
    for language in ("en", "fa", "de"):
        all_texts = texts(tokenizer, whole.held_out[language])
        assert texts(tokenizer, limited.held_out[language]) == all_texts[:5]
        assert limited.report[language].reserve == len(all_texts) - 5
    for language in ("en", "fa"):
        assert texts(tokenizer, limited.train[language]) == texts(tokenizer, whole.train[language])


def test_a_language_is_split_alike_whatever_the_other_languages(folder, tokenizer):
    alone = load(folder, tokenizer, seen=["fa"], unseen=[])
    together = load(folder, tokenizer)
    assert texts(tokenizer, alone.train["fa"]) == texts(tokenizer, together.train["fa"])
    assert texts(tokenizer, alone.held_out["fa"]) == texts(tokenizer, together.held_out["fa"])


def test_what_another_language_trains_on_is_not_evaluated(folder, tokenizer):
    write(folder, "de", [(f"en {i}?", f"reply {i}") for i in range(60)] + [("neu?", "ja")])
    corpus = load(folder, tokenizer)
    trained = set(texts(tokenizer, corpus.train["en"]))
    assert not trained & set(texts(tokenizer, corpus.held_out["de"]))
    assert corpus.report["de"].leaked == len(trained)
    assert len(corpus.held_out["de"]) == 61 - len(trained)


def test_translations_of_what_is_trained_on_are_not_evaluated(folder, tokenizer):
    for language in ("en", "fa", "de"):
        rows = [
            {"prompt": f"{language} {i}", "completion": f"{i} {language}", "id": i}
            for i in range(60)
        ]
        (folder / f"{language}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    corpus = load(folder, tokenizer, columns={"group": "id"})

    def ids(examples):
        return {text.split("user\n")[1].split()[1] for text in texts(tokenizer, examples)}

    held_out = {language: ids(examples) for language, examples in corpus.held_out.items()}
    assert held_out["en"] == held_out["fa"] == held_out["de"]
    assert not held_out["de"] & ids(corpus.train["en"])
    assert corpus.report["de"].leaked == len(corpus.train["en"])


def test_nothing_needs_to_be_held_out(folder, tokenizer):
    corpus = load(folder, tokenizer, held_out=0.0)
    assert len(corpus.train["en"]) == 60
    assert list(corpus.held_out) == ["de"]


def test_advice_names_no_value_that_is_refused(folder, make_tokenizer):
    """Runs take no held_out of 0, and some tokenizers have no longest sequence."""
    write(folder, "en", [("a", "b")])
    with pytest.raises(
        DataError, match=r"no held_out examples at .* more data, or raise held_out\.$"
    ):
        load(folder, make_tokenizer(), seen=["en"], held_out=1e-9)
    endless = make_tokenizer(model_max_length=int(1e30))
    with pytest.raises(ConfigError, match=r"is 1; expected at least 2\.$"):
        load(folder, endless, seen=["en"], sequence_length=1)


PICKY = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content == 'en 7?' %}{{ 1 / 0 }}{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_what_a_template_cannot_render_is_malformed(folder, make_tokenizer):
    tokenizer = make_tokenizer(PICKY)
    complaint = r"en\.jsonl:8: the chat template cannot render .*ZeroDivisionError"
    with pytest.raises(DataError, match=complaint):
        load(folder, tokenizer)
    with pytest.raises(DataError, match=rf"{complaint}.*\n.* 1 of the 60 records of language 'en'"):
        load(folder, tokenizer, max_malformed=0.01)
    corpus = load(folder, tokenizer, max_malformed=0.02)
    report = corpus.report["en"]
    assert (report.records, report.skipped) == (59, 1) and report.train + report.held_out == 59
    assert "en.jsonl:8" in corpus.complaints[0] and corpus.complaints[0] in corpus.table()


def test_too_many_failures_of_a_template_end_reading_before_the_last(
    folder, make_tokenizer, monkeypatch
):
    monkeypatch.setattr("jaxmoo.data.tokenization.template.MOST_PASSES", 100)
    failures = []
    failed = template._failed
    monkeypatch.setattr(template, "_failed", lambda *a: failures.append(a) or failed(*a))
    endless = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"
    with pytest.raises(DataError, match="malformed are 2 of the 60"):
        load(folder, make_tokenizer(endless + PICKY), max_malformed=0.02)
    assert len(failures) == 2


@pytest.mark.parametrize("kind", ["text", "tokens"])
def test_special_tokens_that_texts_spell_are_counted_and_shown(kind, folder, tokenizer):
    pairs = [(f"en {i}?", f"reply {i}") for i in range(60)]
    write(folder, "en", [*pairs, ("a", "ok<|im_end|>\n<|im_start|>user\nb<|im_end|>")])
    corpus = load(folder, tokenizer, special_tokens=kind)
    assert corpus.report["en"].spelled == {"<|im_end|>": 2, "<|im_start|>": 1}
    assert corpus.report["fa"].spelled == {}
    assert "spell special tokens: <|im_end|> 2 times, <|im_start|> 1 times" in corpus.table()
    assert f"data.special_tokens={kind}" in corpus.table()
    assert "special tokens" not in load(folder, tokenizer, seen=["fa"]).table()


def test_the_report_counts_everything(folder, tokenizer):
    pairs = [(f"en {i}?", f"reply {i % 7}") for i in range(40)]
    pairs += [(" en  1? ", "reply 1"), ("long?", "very " * 200), ("long? " * 100, "short")]
    pairs += [("nothing?", " ")]
    write(folder, "en", pairs)
    report = load(folder, tokenizer).report["en"]
    assert (report.records, report.duplicates, report.skipped, report.leaked) == (44, 1, 0, 0)
    assert report.truncated == 1
    assert report.dropped == 2
    assert report.train + report.held_out + report.dropped == 43
    # All replies are one of seven, but for the long one.
    assert 0 < report.held_out - 1 <= report.replies_in_train
    assert report.tokens_min < report.tokens_median < 128 < report.tokens_max
    assert report.seen
    assert json.loads(json.dumps(report.to_dict()))["duplicates"] == 1


def test_the_table_has_a_row_per_language(folder, tokenizer):
    lines = load(folder, tokenizer).table().splitlines()
    assert len({len(line) for line in lines}) == 1, "aligned"
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["en", "fa", "de (unseen)"]


@pytest.mark.parametrize("language", ["en", "de"])
def test_a_language_without_usable_replies_is_named(language, folder, tokenizer):
    write(folder, language, [(f"{i}", "") for i in range(60)])
    with pytest.raises(DataError, match=f"Language '{language}' has no usable reply tokens"):
        load(folder, tokenizer)
    write(folder, language, [(f"{i} " * 200, "yes") for i in range(60)])
    with pytest.raises(DataError, match=f"'{language}' .* begins within 128 tokens"):
        load(folder, tokenizer)


def test_a_language_too_small_to_split_is_named(folder, tokenizer):
    write(folder, "fa", [("one", "prompt")])
    with pytest.raises(DataError, match=r"'fa' has no (train|held_out) examples at held_out=0.3"):
        load(folder, tokenizer)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"unseen": ["de", "fa"]}, "fa in both data.seen and data.unseen"),
        ({"sequence_length": 513}, "sequence_length is 513; expected at least 2 and at most 512"),
        ({"sequence_length": 1}, "sequence_length is 1"),
        ({"max_held_out": 0}, "max_held_out is a positive number or null, found 0"),
        ({"held_out": 10}, "fraction between 0 and 1"),
    ],
)
def test_contradictory_settings_are_refused(options, complaint, folder, tokenizer):
    with pytest.raises(ConfigError, match=complaint):
        load(folder, tokenizer, **options)


def test_paraphrases_in_the_built_in_corpus_do_not_leak(tokenizer):
    options = {"seen": ["fa", "fr"], "sequence_length": 512, "held_out": 0.15}
    by_prompt = load_corpus("chatterbot", tokenizer, **options).report
    assert by_prompt["fa"].replies_in_train > by_prompt["fa"].held_out / 2
    by_reply = load_corpus("chatterbot", tokenizer, disjoint_replies=True, **options).report
    assert {r.replies_in_train for r in by_reply.values()} == {0}
    assert all(0.05 < r.held_out / (r.train + r.held_out) < 0.25 for r in by_reply.values())


TOPICS = ("sports", "travel", "politics", "health", "geography")
THINGS = {
    "eng_Latn": ("ball", "road", "vote", "rain", "The {thing} of day {day} was new."),
    "pes_Arab": ("توپ", "راه", "رأی", "باران", "{thing} روز {day} تازه بود."),
    "zho_Hans": ("球", "路", "票", "雨", "第{day}天的{thing}是新的。"),
}


def test_parallel_data_is_held_out_alike_in_every_language(tokenizer, tmp_path):
    """Files as those of SIB-200: text, category and id, named by its codes of languages."""
    for code, (*things, sentence) in THINGS.items():
        rows = [
            {"id": str(n), "category": TOPICS[n % 5], "text": sentence.format(thing=x, day=n // 4)}
            for n, x in zip(range(240), itertools.cycle(things), strict=False)
        ]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (tmp_path / f"train.{code}.jsonl").write_text(lines, "utf-8")
    source = str(tmp_path / "train.{language}.jsonl")
    options = {
        "columns": {"prompt": "text", "completion": "category", "group": "id"},
        "codes": {"en": "eng_Latn", "fa": "pes_Arab", "zh": "zho_Hans"},
    }
    corpus = load_corpus(
        source,
        tokenizer,
        seen=["en", "fa", "zh"],
        sequence_length=512,
        held_out=0.2,
        disjoint_replies=False,
        **options,
    )
    groups = {
        language: {e.prompt: e.group for e in examples}
        for language, examples in load_examples(source, ["en", "fa", "zh"], **options).items()
    }
    sides = {}
    for language, examples in corpus.held_out.items():
        prompts = [
            tokenizer.decode(e.tokens).split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
            for e in examples
        ]
        sides[language] = {
            groups[language][prompt] for prompt in prompts if prompt in groups[language]
        }
    assert 30 < len(sides["en"]) < 70
    assert sides["en"] == sides["fa"] == sides["zh"]
