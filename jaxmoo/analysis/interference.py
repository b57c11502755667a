"""Negative interference: what training together costs a language.

A language's interference is its loss after joint training minus its loss after training on it
alone, for as many steps. Positive: the other languages have cost it something. Negative: they have
helped.

Reference: Wang et al., *On Negative Interference in Multilingual Models*, EMNLP 2020,
`arXiv:2010.03017 <https://arxiv.org/abs/2010.03017>`_.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxmoo.config.training import Config, differences, load_config
from jaxmoo.errors import ConfigError, DataError
from jaxmoo.evaluate import LanguageScore
from jaxmoo.files.outputs import typed_path
from jaxmoo.runs.directory import RunDirectory

__all__ = ["Interference", "interference"]

# Settings in which a run on one language alone differs from a joint one, or that it has no use for.
_FREE = ("data.seen:", "data.unseen:", "resolve.")


class Interference(NamedTuple):
    """Of one language; NLL in nats per token."""

    base: float
    joint: float
    single: float

    @property
    def value(self) -> float:
        """Joint minus single."""
        return self.joint - self.single


def interference(joint: Path, singles: Sequence[Path]) -> dict[str, Interference]:
    """Compare a joint run with runs on single languages.

    Args:
      joint: directory of the joint run, which is complete.
      singles: directories of complete runs, each on one of its languages, for as many steps from
        the same model with the same settings.

    Returns:
      Per language of ``singles`` its losses.

    Raises:
      ConfigError: a run is not complete, or its settings do not suit the comparison.
      DataError: runs were evaluated on different examples.
    """
    config, before, after = _results(typed_path(joint))
    found = {}
    for path in map(Path, singles):
        alone, first, last = _results(path)
        if len(alone.data.seen) != 1 or alone.data.seen[0] not in config.data.seen:
            raise ConfigError(
                f"{path} was trained on {', '.join(alone.data.seen)}; expected exactly one of the "
                f"languages of {joint}: {', '.join(config.data.seen)}."
            )
        language = alone.data.seen[0]
        if language in found:
            raise ConfigError(f"two runs on {language} alone were given; name one of them.")
        changed = [text for text in differences(config, alone) if not text.startswith(_FREE)]
        if changed or alone.train.steps != config.train.steps:
            changed = changed or [f"train.steps: {config.train.steps} -> {alone.train.steps}"]
            raise ConfigError(
                f"{joint} and {path} cannot be compared; their settings differ:\n  "
                + "\n  ".join(changed)
            )
        _check_same_examples(typed_path(joint), path, language, before[language], first[language])
        found[language] = Interference(
            before[language].nll, after[language].nll, last[language].nll
        )
    return {code: found[code] for code in config.data.seen if code in found}


def _check_same_examples(
    joint: Path, single: Path, language: str, a: LanguageScore, b: LanguageScore
) -> None:
    same = (a.examples, a.tokens, a.bytes) == (b.examples, b.tokens, b.bytes)
    # The base model's score tells examples apart even where their sizes agree.
    if same and abs(a.nll - b.nll) <= 1e-3 * abs(a.nll):
        return

    def described(score: LanguageScore) -> str:
        return (
            f"{score.examples} replies of {score.tokens} tokens and {score.bytes} bytes, "
            f"{score.nll:.4f} nats per token before training"
        )

    raise DataError(
        f"{joint} and {single} were evaluated on different examples of {language}: "
        f"{described(a)}, and {described(b)}. A held-out example that is trained on in any "
        "language of a run is left out there; evaluate both models on the same examples, or "
        "use data whose languages share no examples."
    )


def _results(path: Path) -> tuple[Config, dict[str, LanguageScore], dict[str, LanguageScore]]:
    run = RunDirectory(path)
    if not run.config.is_file():
        raise ConfigError(f"{path} is not the output of a training run: it has no config.yaml.")
    if not run.results.is_file():
        raise ConfigError(
            f"{path} has no results.json: the run is not complete. The command that started it "
            "goes on with it."
        )
    try:
        stored: dict[str, Any] = json.loads(run.results.read_text("utf-8"))
        before, after = (
            {code: LanguageScore.from_dict(score) for code, score in stored[when].items()}
            for when in ("before", "after")
        )
    # RecursionError: brackets nested by the thousand.
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{run.results} cannot be read: {error!r}") from error
    return load_config(run.config), before, after
