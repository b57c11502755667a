"""The built-in corpus: ``chatterbot-corpus``, prompts and replies in 28 languages (BSD licence).

The wheel holds one folder per language and one YAML file per topic, each a list of
conversations. Many conversations of more than two entries are not dialogues: the entries after
the first are alternative replies to it ("You are arrogant" / "Arrogance is not one of my
emotions." / "I have no real emotions ..."), and nothing in the files tells the two kinds apart.
The second entry answers the first in both, so an example is the first two entries of a
conversation and the others are left out. A few entries are one long line ("question - answer")
where a list was meant: they are skipped and counted.

Source: https://github.com/gunthercox/chatterbot-corpus
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path

import yaml

from jaxmoo.data.example import Example
from jaxmoo.data.languages import nearest_language
from jaxmoo.errors import DataError

PACKAGE = "chatterbot-corpus"
VERSION = "1.3.3"
SHA256 = "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154"

FOLDERS: dict[str, str] = {
    "bn": "bengali",
    "zh": "chinese",
    "nl": "dutch",
    "en": "english",
    "fr": "french",
    "de": "german",
    "he": "hebrew",
    "hi": "hindi",
    "hi-Latn": "hinglish",
    "id": "indonesian",
    "it": "italian",
    "ja": "japanese",
    "ko": "korean",
    "mr": "marathi",
    "or": "oriya",
    "fa": "persian",
    "pt": "portuguese",
    "ru": "russian",
    "es": "spanish",
    "sv": "swedish",
    "ta": "tamil",
    "te": "telugu",
    "th": "thai",
    "zh-Hant": "traditionalchinese",
    "tr": "turkish",
    "uk": "ukrainian",
    "ur": "urdu",
    "yo": "yoruba",
}

# PyYAML's C parser is about ten times faster; not every build of PyYAML has it.
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_chatterbot(
    languages: Iterable[str], *, cache_dir: Path | None = None
) -> dict[str, tuple[list[Example], int]]:
    """Read languages of the built-in corpus, downloading its wheel (346 kB) once.

    Args:
      languages: codes, keys of `FOLDERS`.
      cache_dir: where the wheel is kept; the user's cache directory by default.

    Returns:
      Per language its examples, duplicates included, and the number of entries skipped because
      they are not a prompt and a reply.

    Raises:
      DataError: a language is not in the corpus.
      DownloadError: the wheel could not be fetched.
    """
    languages = list(languages)
    for language in languages:
        if language not in FOLDERS:
            raise DataError(
                f"The chatterbot corpus has no language {language!r}. Available: "
                f"{', '.join(sorted(FOLDERS))}.{nearest_language(language, FOLDERS)}"
            )
    from jaxmoo.hf.wheels import fetch_wheel

    wheel = fetch_wheel(PACKAGE, VERSION, SHA256, cache_dir=cache_dir)
    with zipfile.ZipFile(wheel) as archive:
        return {language: _read_language(archive, language) for language in languages}


def _read_language(archive: zipfile.ZipFile, language: str) -> tuple[list[Example], int]:
    examples, skipped = [], 0
    folder = f"chatterbot_corpus/data/{FOLDERS[language]}/"
    for name in sorted(archive.namelist()):
        if not (name.startswith(folder) and name.endswith(".yml")):
            continue
        # Two of the files begin with a byte order mark.
        document = yaml.load(archive.read(name).decode("utf-8-sig"), Loader=_Loader)
        for conversation in document["conversations"]:
            if isinstance(conversation, list) and len(conversation) >= 2:
                # White space at the ends is an artefact of these files, and YAML reads a few texts
                # as numbers.
                prompt, reply = (str(text).strip() for text in conversation[:2])
                examples.append(Example.from_pair(language, prompt, reply))
            else:
                skipped += 1
    return examples, skipped
