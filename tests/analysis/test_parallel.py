"""Parallel sentences: what is read, and what is refused."""

import numpy as np
import pytest

from jaxmoo.analysis.parallel import read_parallel
from jaxmoo.errors import ConfigError, DataError


@pytest.fixture
def write(tmp_path):
    """Write files of lines by language; return the pattern."""

    def write(**files):
        for name, lines in files.items():
            (tmp_path / f"{name}.txt").write_text("".join(f"{x}\n" for x in lines), "utf-8")
        return str(tmp_path / "{language}.txt")

    return write


def text(language: str, count: int = 60) -> list[str]:
    """Translations of one another: as long as the sentence, in words of the language."""
    lengths = np.random.default_rng(0).integers(2, 30, count)
    return [" ".join([f"{language}word"] * n) for n in lengths]


def test_sentences_are_read_by_their_own_names_and_up_to_a_limit(write):
    pattern = write(eng=text("en"), spa=text("es"))
    found = read_parallel(pattern, ["en", "es"], codes={"en": "eng", "es": "spa"}, limit=40)
    assert list(found) == ["en", "es"]
    assert found["es"] == text("es")[:40]


def test_a_language_without_a_file(write):
    pattern = write(en=text("en"), ja=text("ja"))
    with pytest.raises(DataError, match=r"no language 'jp'.*Available: en, ja\."):
        read_parallel(pattern, ["en", "jp"])


def test_different_numbers_of_lines(write):
    pattern = write(en=text("en"), es=text("es")[:-1])
    with pytest.raises(DataError, match=r"not parallel.*en 60, es 59"):
        read_parallel(pattern, ["en", "es"])


def test_an_empty_line(write):
    lines = text("es")
    lines[6] = " "
    with pytest.raises(DataError, match="line 7 of es is empty"):
        read_parallel(write(en=text("en"), es=lines), ["en", "es"])


def test_lines_in_another_order(write):
    pattern = write(en=text("en"), es=text("es"), it=sorted(text("it")))
    with pytest.raises(DataError, match=r"not parallel.*lines of it.*another order"):
        read_parallel(pattern, ["en", "es", "it"])


def test_the_same_text_twice(write):
    with pytest.raises(DataError, match="en and es have the same text"):
        read_parallel(write(en=text("en"), es=text("en")), ["en", "es"])


def test_a_pattern_without_a_language():
    with pytest.raises(ConfigError, match=r"\{language\}"):
        read_parallel("sentences.txt", ["en", "es"])
