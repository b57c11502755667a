"""The model card of an exported model: a README.md that states where it comes from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["ModelCard"]


@dataclass(frozen=True)
class ModelCard:
    """Facts about a fine-tuned model; what is not known is left out of the card.

    Attributes:
      title: the model's name.
      base_model: what was fine-tuned; an id on the Hugging Face hub is linked by the hub.
      languages: codes of the languages trained on, such as "ja".
      method: how it was trained, in a sentence.
      data: what it was trained on, in a sentence.
      metrics: tables of numbers: a heading, and for every row a value of every column.
      library: what loads it: "transformers", or "peft" for adapters.

    Example:
      >>> card = ModelCard("tiny", base_model="org/base", languages=("en", "ja"),
      ...     metrics={"Held-out reply NLL": {"en": {"before": 2.5, "after": 2.25}}})
      >>> print(card.text())
      ---
      library_name: transformers
      pipeline_tag: text-generation
      base_model: "org/base"
      language: ["en", "ja"]
      ---
      <BLANKLINE>
      # tiny
      <BLANKLINE>
      - Base model: org/base
      - Languages: en, ja
      <BLANKLINE>
      ## Held-out reply NLL
      <BLANKLINE>
      | | before | after |
      |---|---|---|
      | en | 2.5 | 2.25 |
      <BLANKLINE>
    """

    title: str
    base_model: str | None = None
    languages: tuple[str, ...] = ()
    method: str | None = None
    data: str | None = None
    metrics: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    library: str = "transformers"

    def text(self) -> str:
        """Contents of the README.md: metadata for the hub, then the facts as Markdown."""
        # JSON strings and lists are valid YAML, whatever they hold.
        lines = ["---", f"library_name: {self.library}", "pipeline_tag: text-generation"]
        if self.base_model and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", self.base_model):
            lines.append(f"base_model: {json.dumps(self.base_model)}")
        if self.languages:
            lines.append(f"language: {json.dumps(list(self.languages), ensure_ascii=False)}")
        lines += ["---", "", f"# {self.title}", ""]
        facts = {
            "Base model": self.base_model,
            "Languages": ", ".join(self.languages),
            "Method": self.method,
            "Data": self.data,
        }
        lines += [f"- {name}: {fact}" for name, fact in facts.items() if fact]
        for heading, rows in self.metrics.items():
            columns = list(dict.fromkeys(column for row in rows.values() for column in row))
            lines += ["", f"## {heading}", "", f"| | {' | '.join(columns)} |"]
            lines.append("|---" * (len(columns) + 1) + "|")
            for name, row in rows.items():
                shown = [f"{row[column]:.4g}" if column in row else "" for column in columns]
                lines.append(f"| {name} | {' | '.join(shown)} |")
        return "\n".join(lines) + "\n"
