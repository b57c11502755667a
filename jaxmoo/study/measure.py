"""What a study asks of a model, before and after it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmoo.config.study_config import StudyConfig
from jaxmoo.config.training import Config
from jaxmoo.errors import DataError
from jaxmoo.evaluate.evaluation import Evaluation, ask
from jaxmoo.evaluate.evaluator import Evaluator
from jaxmoo.evaluate.measures import measured, score
from jaxmoo.evaluate.results import LanguageResult
from jaxmoo.runtime.memory import named_when_full
from jaxmoo.study.examples import PARTS, members, pack_examples, reported_part
from jaxmoo.train.kept import Kept, corpus_key, weights_key
from jaxmoo.train.setup import Setup

__all__ = ["measure"]


def measure(
    study: StudyConfig, config: Config, setup: Setup, params: Any, kept: Kept, *, base: bool = False
) -> dict[str, Any]:
    """Score a model on the held-out examples of every language.

    Args:
      study: the settings.
      config: those of the run.
      setup: what the run was made of.
      params: its trained parameters.
      kept: questions and compiled programs of earlier runs.
      base: whether the model is the one before training.

    Returns:
      What a row says of languages: scores on every part of the examples, and single examples.

    Raises:
      DataError: a part has no examples.
      MemoryFullError: memory has run out.
    """
    with named_when_full("Use a smaller measure.batch_size."):
        results = _answers(study, config, setup, params, kept)
    return {
        "seen": [code for code in config.data.seen if code in results],
        "unseen": config.data.unseen,
        "data": {code: one.data for code, one in results.items()},
        "languages": {code: _parts(code, one, study.tune) for code, one in results.items()},
        "examples": pack_examples(
            results, reported_part(study.learning_rates), study.tune, base=base
        ),
        **({"date": setup.date} if setup.date else {}),
    }


def _answers(
    study: StudyConfig, config: Config, setup: Setup, params: Any, kept: Kept
) -> Mapping[str, LanguageResult]:
    asked = study.measure
    data = config.data

    def questions() -> Any:
        settings = Evaluation(
            name="study",
            model=setup.source,
            output=Path("study.json"),
            data=data,
            seen=[code for code in data.seen if code not in asked.skip],
            unseen=data.unseen,
            held_out=True,
            choices=asked.choices,
            max_examples=asked.max_examples,
            skip_empty=True,
        )
        return ask(settings, setup.tokenizer, setup.model.max_position_embeddings)

    merge, pad_id = setup.merge, setup.batches.pad_id
    evaluator = kept.part(
        "measuring",
        weights_key(config),
        lambda: Evaluator(
            lambda weights: merge(*weights),
            setup.device_mesh,
            batch_size=asked.batch_size,
            pad_id=pad_id,
        ),
    )
    return {
        code: evaluator.answer((params, setup.frozen), some, lambda rows: None)
        for code, some in kept.part("questions", corpus_key(config), questions).items()
    }


def _parts(code: str, result: LanguageResult, tune: float) -> dict[str, dict[str, float]]:
    found = {}
    for part in PARTS:
        kept = members(result.units, part, tune)
        if not kept:
            raise DataError(
                f"Language {code!r}: none of {len(result.units)} held-out examples falls into the "
                f"part {part!r}. Hold out more (data.held_out, measure.max_examples)."
            )
        columns = {name: [values[i] for i in kept] for name, values in result.columns.items()}
        scores = {name: score(columns, name) for name in measured(columns)}
        found[part] = {"examples": len(kept), **scores}
    return found
