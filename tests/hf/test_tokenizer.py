"""The embedded model's tokenizer against a tokenizer written from its description."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
import regex

import tiny_models
from jaxmoo.convert import from_hf
from jaxmoo.errors import CheckpointError
from jaxmoo.hf import load_tokenizer
from tiny_tokenizer import bytes_tokenizer, chat_tokenizer

TEXTS = [
    "Hello, world! It's 2024: 3.14159 or 1,234,567?",
    "¿Cómo estás? — Muy bien, gracias…",
    "Übergrößenträger äöüß 123abc456",
    "Привіт, як справи? Їжак №5",
    "سلام، حال شما چطور است؟ ۱۲۳۴",
    "你好，世界！今天是2024年5月。",
    "こんにちは。お元気ですか？１２３",
    "안녕하세요 반갑습니다 10개",
    "नमस्ते दुनिया १२३ ½ Ⅷ",
    "สวัสดีชาวโลก ๔๕",
    "👩‍👩‍👧‍👦 🇫🇷 é e\u0301",
    "  leading,\ttabs\n\n\nand   trailing   ",
    "def f(x):\n    return x**2  # 42\n",
    "<|im_start|>user\nHi 7<|im_end|>\n",
    "",
]


class Reference:
    """Byte-level BPE after splitting off special tokens and single digits, by definition."""

    # GPT-2's split into words.
    WORDS = regex.compile(
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    )

    def __init__(self, file: Path):
        content = json.loads(file.read_text("utf-8"))
        self.ids = content["model"]["vocab"]
        merges = [
            tuple(m) if isinstance(m, list) else tuple(m.split(" "))
            for m in content["model"]["merges"]
        ]
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        special = [regex.escape(token["content"]) for token in content["added_tokens"]]
        self.special = regex.compile("(" + "|".join(special) + ")")
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [b for b in range(256) if b not in printable]
        self.letters = {b: chr(b) for b in printable}
        self.letters |= {b: chr(256 + i) for i, b in enumerate(others)}

    def encode(self, text: str) -> list[int]:
        ids = []
        for i, part in enumerate(self.special.split(text)):
            if i % 2:
                ids.append(self.ids[part])
                continue
            for piece in regex.split(r"(\p{N})", part):
                for word in self.WORDS.findall(piece):
                    ids += [self.ids[token] for token in self.merge(word)]
        return ids

    def merge(self, word: str) -> list[str]:
        tokens = [self.letters[b] for b in word.encode()]
        while len(tokens) > 1:
            pairs = list(itertools.pairwise(tokens))
            best = min(pairs, key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if best not in self.ranks:
                break
            i = pairs.index(best)
            tokens[i : i + 2] = ["".join(best)]
        return tokens


@pytest.fixture(scope="module")
def reference(smollm2_dir: Path) -> Reference:
    return Reference(smollm2_dir / "tokenizer.json")


@pytest.fixture(scope="module")
def tokenizer(smollm2_dir: Path):
    return load_tokenizer(smollm2_dir)


def test_text_is_split_and_merged_as_the_model_was_trained(smollm2_dir, tokenizer, reference):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(smollm2_dir)
    for text in TEXTS:
        expected = reference.encode(text)
        for one in (tokenizer, theirs):
            ids = one(text)["input_ids"]
            assert ids == expected, text
            assert one.decode(ids) == text


def test_known_tokens(tokenizer):
    assert tokenizer("Hello world 12")["input_ids"] == [19556, 905, 216, 33, 34]
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
    ]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert len(tokenizer) == 49152


def test_the_chat_template_is_chatml(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n"
    )


def test_a_template_loses_its_byte_order_mark(tmp_path):
    chat_tokenizer("{{ messages }}").save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}", "utf-8-sig")
    assert load_tokenizer(tmp_path).chat_template == "{{ messages }}"


def test_a_missing_or_damaged_tokenizer_is_refused(smollm2_dir: Path, tmp_path: Path):
    for name in ("config.json", "tokenizer_config.json"):
        shutil.copy(smollm2_dir / name, tmp_path)
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("longest", [0, -1, "512", [512], True, float("nan")])
def test_the_longest_text_is_a_number_of_tokens(tmp_path: Path, longest):
    bytes_tokenizer(["<s>"]).save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    load_tokenizer(tmp_path)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": longest}))
    with pytest.raises(CheckpointError, match=r"model_max_length, .* must be a number of tokens"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_comes_with_a_model_that_knows_all_of_its_tokens(tmp_path: Path):
    bytes_tokenizer(["<s>"], eos_token="<s>").save_pretrained(tmp_path)
    assert len(load_tokenizer(tmp_path)) == 257  # there is no model yet
    config = tiny_models.make("llama").config
    for size in (257, 256):
        config.vocab_size = size
        config.save_pretrained(tmp_path)
        if size == 257:
            load_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match=r"tokens up to number 256, .* vocab_size=256"):
        load_tokenizer(tmp_path)
    # And so it is for what copies a tokenizer without using it.
    with pytest.raises(CheckpointError, match=r"tokens up to number 256, .* vocab_size=256"):
        from_hf(tmp_path, tmp_path / "out")
