"""The model card of an exported model: a README.md that states where it comes from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["ModelCard"]

_REPORT = "report.html"


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
      report: a page of HTML about its training, which lies beside the card as ``report.html``.

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
    report: str | None = None

    def write(self, directory: Path) -> None:
        """Write the README.md, and the page it links to, into a model's directory."""
        (directory / "README.md").write_text(self.text(), "utf-8")
        if self.report is not None:
            (directory / _REPORT).write_text(self.report, "utf-8")

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
        if self.report is not None:
            lines.append(f"- Report of the training: [{_REPORT}]({_REPORT})")
        for heading, rows in self.metrics.items():
            columns = list(dict.fromkeys(column for row in rows.values() for column in row))
            lines += ["", f"## {heading}", "", f"| | {' | '.join(columns)} |"]
            lines.append("|---" * (len(columns) + 1) + "|")
            for name, row in rows.items():
                shown = [f"{row[column]:.4g}" if column in row else "" for column in columns]
                lines.append(f"| {name} | {' | '.join(shown)} |")
        return "\n".join(lines) + "\n"
