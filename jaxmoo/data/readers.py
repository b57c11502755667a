"""Which process reads which language's stream, and what the others learn from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmoo.data.token_cache import Kept
from jaxmoo.errors import DataError
from jaxmoo.files.arrays import packed, unpacked
from jaxmoo.runtime.peers import Peers

__all__ = ["Readers"]


class Readers:
    """The processes of a run, as readers of its streams.

    A process reads the languages of the rows that it makes, and no others; a language whose rows
    several make is read by all of these. One of them, its first reader, tells the others what they
    need to know of it: held-out examples, places for checkpoints, a whole batch to be compared.

    Args:
      languages: of all streams.
      mine: those of whose rows this process makes some.
      peers: the processes, all of which make one of these.

    Attributes:
      mine: as given.
      first: the languages whose first reader this process is.
      all_do: see :meth:`jaxmoo.runtime.peers.Peers.all_do`.

    Example:
      >>> Readers(["en", "fa"], ["en"], Peers()).first
      ['en', 'fa']
    """

    def __init__(self, languages: Sequence[str], mine: Collection[str], peers: Peers) -> None:
        self.mine, self._languages, self._peers = frozenset(mine), list(languages), peers
        self.all_do = peers.all_do
        told = peers.tell(sorted(mine))
        self.first = []
        for place, language in enumerate(languages):
            # One that is only evaluated is read by whoever's turn it is.
            reading = [n for n, some in enumerate(told) if language in some] or range(peers.count)
            if reading[place % len(reading)] == peers.number:
                self.first.append(language)

    def beginnings(
        self, read: Callable[[str, list[str]], Kept]
    ) -> tuple[dict[str, Kept], list[str]]:
        """Read the beginnings of streams; return those of all languages.

        Args:
          read: given a language and a list that takes what is wrong with its malformed records,
            returns its held-out examples and its report.

        Returns:
          Per language what was read, without what is trained on, and what is wrong with malformed
          records.

        Raises:
          DataError: a process has failed; what it says.
        """
        parts: dict[str, Kept] = {}
        complaints: dict[str, list[str]] = {}

        def work() -> None:
            for language in self.first:
                parts[language] = read(language, complaints.setdefault(language, []))

        self.all_do(work)
        arrays, facts = {}, {}
        for language, part in parts.items():
            held_out = {use: table for use, table in part.tables.items() if use == "held_out"}
            own, facts[language] = Kept(held_out, part.about).packed()
            arrays |= {f"{language}/{name}": array for name, array in own.items()}
        found = {}
        for every, about in self._tell(arrays, [facts, complaints]):
            for language, one in about[0].items():
                found[language] = Kept.unpacked(_below(every, language), one)
            complaints |= about[1]
        in_order = [text for language in self._languages for text in complaints[language]]
        return {language: found[language] for language in self._languages}, in_order

    def told(self, mine: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the first reader of every language says of it.

        Args:
          mine: what this process says, as JSON holds it.
        """
        own = {language: one for language, one in mine.items() if language in self.first}
        return {code: one for _, about in self._tell({}, own) for code, one in about.items()}

    def rows(self, mine: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Any]:
        """Return the rows of every language, by the names of their arrays.

        Args:
          mine: those that this process has read.

        Raises:
          DataError: not all readers of a language have read the same.
        """
        own = {
            f"{language}/{name}": array
            for language, arrays in mine.items()
            if language in self.first
            for name, array in arrays.items()
        }
        every = {
            name: array for arrays, _ in self._tell(own, None) for name, array in arrays.items()
        }
        found = {code: _below(every, code) for code in {name.partition("/")[0] for name in every}}

        def compare() -> None:
            for code, arrays in mine.items():
                if any((found[code][name] != array).any() for name, array in arrays.items()):
                    raise DataError(
                        f"Processes do not read the same records of {code}. Give all of them the "
                        "same files, and a source of your own that gives the same records."
                    )

        self.all_do(compare)
        return found

    def _tell(
        self, arrays: Mapping[str, np.ndarray], about: Any
    ) -> list[tuple[dict[str, np.ndarray], Any]]:
        told = self._peers.exchange(packed(arrays, json.dumps(about)))
        return [(every, json.loads(text)) for every, text in map(unpacked, told)]


def _below(arrays: Mapping[str, np.ndarray], language: str) -> dict[str, np.ndarray]:
    prefix = f"{language}/"
    return {n.removeprefix(prefix): array for n, array in arrays.items() if n.startswith(prefix)}
