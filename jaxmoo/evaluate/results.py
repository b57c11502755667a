"""Results of an evaluation on disk.

``results.json`` has the scores; the directory ``results.examples`` beside it has a file per
language with the numbers of every example. A language's file appears whole when the language is
done, so an evaluation that was stopped goes on after the last of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from jaxmoo.config import is_date
from jaxmoo.errors import CheckpointError, ConfigError, shown
from jaxmoo.evaluate.measures import measured, score, summarise_measures
from jaxmoo.files.atomic import replace_text
from jaxmoo.files.outputs import check_writable, typed_path

__all__ = ["LanguageResult", "ResultStore", "Results", "read_results"]

FORMAT = 1


class LanguageResult(NamedTuple):
    """What was found about one language.

    Attributes:
      data: digest of its examples; see `jaxmoo.evaluate.questions.digest`.
      units: per example what it is drawn with: its group, or a name of its own.
      columns: numbers per example, by name.
      extra: scores of the language that are no mean over examples.
    """

    data: str
    units: list[str]
    columns: dict[str, list[Any]]
    extra: dict[str, float]

    def scores(self) -> dict[str, Any]:
        """Number of examples and all scores."""
        scores: dict[str, Any] = {"examples": len(self.units)}
        scores |= {name: score(self.columns, name) for name in measured(self.columns)}
        return scores | self.extra


class Results(NamedTuple):
    """A complete evaluation.

    Attributes:
      path: where it was read from.
      model: what was evaluated, for people.
      seen: languages that the model was trained on.
      unseen: the others.
      languages: per language what was found.
      date: the date that the chat template saw; None where it reads no clock.
    """

    path: Path
    model: str
    seen: list[str]
    unseen: list[str]
    languages: dict[str, LanguageResult]
    date: str | None = None


class ResultStore:
    """Where one evaluation writes.

    Args:
      output: the results' file, ``*.json``.
      check: whether this process will write there.

    Raises:
      ConfigError: the name does not end in ``.json``, or nothing can be written there.
    """

    def __init__(self, output: Path, *, check: bool = True):
        self.output = typed_path(output)
        if self.output.suffix != ".json" or self.output.is_dir():
            raise ConfigError(f"--output names a file that ends in .json, found {output}.")
        self.directory = _directory(self.output)
        if check:
            check_writable(self.output.parent, "--output")

    def date(self) -> str | None:
        """Return the date that the chat template saw in what is stored, or None.

        Raises:
          CheckpointError: a file is damaged.
        """
        for file in sorted(self.directory.glob("*.json")):
            identity = _read(file).get("identity")
            if isinstance(identity, dict):
                date = identity.get("date")
                if date is not None and not (isinstance(date, str) and is_date(date)):
                    raise _damaged(file, f"its date is {shown(date)}")
                return date
        return None

    def stored(self, language: str, identity: Mapping[str, Any]) -> LanguageResult | None:
        """Return what is stored of a language, or None.

        Args:
          language: its code.
          identity: what decides the result; it must be that of the stored one.

        Raises:
          ConfigError: the stored result is of another model, other data or other settings.
          CheckpointError: the file is damaged.
        """
        file = _file(self.directory, language)
        if not file.exists():
            return None
        found = _read(file)
        stored = found.get("identity")
        if not isinstance(stored, dict):
            raise _damaged(file, "it lacks its identity")
        if stored != identity:
            other = [key for key in identity if stored.get(key) != identity[key]]
            raise ConfigError(
                f"--output: {self.directory} holds results of another evaluation (language "
                f"{language!r}, other {', '.join(other)}). Choose another --output, or remove that "
                "directory."
            )
        return _result(found, file)

    def store(self, language: str, identity: Mapping[str, Any], result: LanguageResult) -> None:
        """Store a language's result, at once."""
        self.directory.mkdir(parents=True, exist_ok=True)
        content = {"identity": dict(identity), **result._asdict()}
        replace_text(_file(self.directory, language), json.dumps(content, ensure_ascii=False))

    def finish(
        self,
        languages: Mapping[str, LanguageResult],
        seen: Sequence[str],
        unseen: Sequence[str],
        **facts: Any,
    ) -> dict[str, Any]:
        """Write the scores of all languages; return what was written."""
        scores = {code: languages[code].scores() for code in (*seen, *unseen)}
        content = {
            "format": FORMAT,
            **facts,
            "seen": list(seen),
            "unseen": list(unseen),
            "languages": {code: {"data": languages[code].data, **scores[code]} for code in scores},
            "summary": summarise_measures(scores, seen, unseen),
        }
        replace_text(self.output, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        return content


def read_results(path: Path) -> Results:
    """Read a complete evaluation, with the numbers of every example.

    Args:
      path: its ``results.json``.

    Raises:
      CheckpointError: files are missing or damaged.
    """
    path = typed_path(path)
    found = _read(path)
    try:
        seen, unseen = ([str(code) for code in found[key]] for key in ("seen", "unseen"))
        model = str(found["model"])
        digests = {code: found["languages"][code]["data"] for code in (*seen, *unseen)}
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not what evaluate.py writes, or is damaged: it lacks {error}."
        ) from error
    languages = {}
    for code, data in digests.items():
        file = _file(_directory(path), code)
        languages[code] = _result(_read(file), file)
        if languages[code].data != data:
            raise CheckpointError(f"{file} is of other data than {path}. Evaluate again.")
    settings = found.get("settings")
    date = settings.get("date") if isinstance(settings, dict) else None
    return Results(path, model, seen, unseen, languages, date)


def _result(found: Mapping[str, Any], file: Path) -> LanguageResult:
    try:
        result = LanguageResult(**{name: found[name] for name in LanguageResult._fields})
        columns = [result.units, *result.columns.values()]
        if not all(isinstance(column, list) for column in columns):
            raise TypeError("a column is not a list")
        if len({len(column) for column in columns}) != 1:
            raise ValueError(f"its columns have lengths {sorted({len(c) for c in columns})}")
        if not all(isinstance(x, int | float) for x in result.scores().values()):
            raise TypeError("a score is not a number")
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise _damaged(file, str(error) or repr(error)) from None
    return result


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    # RecursionError: brackets nested by the thousand.
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is not what evaluate.py writes.")
    return content


def _damaged(file: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"{file} is damaged ({problem}); remove it and evaluate again.")


def _directory(output: Path) -> Path:
    return output.with_name(f"{output.stem}.examples")


def _file(directory: Path, language: str) -> Path:
    return directory / f"{quote(language, safe='')}.json"
