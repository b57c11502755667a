"""Tokenised data, kept from run to run under a digest of all that it depends on.

A directory holds an entry per digest: a directory of one file per language, with digests of these
(`jaxmoo.files.digests`), which gets its name when it is whole::

    <cache>/<digest>/en.safetensors fa.safetensors complaints.json digests.json

What is damaged is thrown away and made anew. Entries that were not used for a month go when a new
one comes, and so do the oldest that are more than `MOST_BYTES` together. To throw everything away,
remove the directory; a run that uses it goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import time
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxmoo.config.data_section import DataConfig
from jaxmoo.data.sources.records import Origin
from jaxmoo.data.token_table import TokenTable
from jaxmoo.errors import (
    CheckpointError,
    DataError,
    DownloadError,
    InterruptedRunError,
)
from jaxmoo.files.arrays import map_arrays, write_arrays
from jaxmoo.files.atomic import replace_text
from jaxmoo.files.buckets import is_bucket
from jaxmoo.files.digests import (
    DIGESTS,
    damaged_files,
    digest_files,
    files_below,
    read_digests,
    write_digests,
)
from jaxmoo.files.outputs import typed_path
from jaxmoo.files.scratch import copy_files
from jaxmoo.hf.cache import cache_directory
from jaxmoo.runtime.peers import Peers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["CANNOT_MATTER", "Kept", "TokenCache", "cache_key", "open_cache"]

# Settings on which no token depends; all others are part of the digest. Of the template and its
# date, what the tokenizer has in the end is.
CANNOT_MATTER = {
    *("batch_size", "packing", "languages_per_step", "sampling", "cache"),
    *("streaming", "shuffle_buffer", "max_scan", "chat_template", "date"),
}
MOST_BYTES = 100 * 2**30
_MOST_SECONDS = 30 * 24 * 3600
_ABANDONED = 24 * 3600  # seconds after which a run that was making an entry has surely ended
_LIBRARIES = ("tokenizers", "transformers", "jinja2", "numpy", "pyarrow", "datasets", "pyyaml")
_COMPLAINTS = "complaints.json"
# The directory may be one that has other things in it, too.
_OWN = re.compile(r"\.(here|away)-[0-9a-f]{16}|\.[0-9a-f]{32}-[0-9a-f]{16}|[0-9a-f]{32}")


class Kept(NamedTuple):
    """One language's part.

    Attributes:
      tables: examples by their use, ``train`` and ``held_out``.
      about: facts about them, as JSON holds them.
    """

    tables: Mapping[str, TokenTable]
    about: Any

    def packed(self) -> tuple[dict[str, np.ndarray], Any]:
        """Return all of it as arrays by name, and what JSON holds."""
        arrays = {
            f"{use}/{name}": array
            for use, table in self.tables.items()
            for name, array in table.arrays.items()
        }
        words = {use: table.words for use, table in self.tables.items()}
        return arrays, {"about": self.about, "words": words}

    @classmethod
    def unpacked(cls, arrays: Mapping[str, np.ndarray], facts: Any) -> Kept:
        """Return the part that :meth:`packed` has made this of."""
        tables = {}
        for use, words in facts["words"].items():
            prefix = f"{use}/"
            own = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
            tables[use] = TokenTable(own, words)
        return cls(tables, facts["about"])


def cache_key(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    origins: Mapping[str, Sequence[Origin]],
    peers: Peers,
) -> str:
    """Return the digest of everything that decides a run's tokenised data.

    Args:
      data: the settings.
      tokenizer: with the chat template that is used.
      origins: per language where its records come from.
      peers: the processes that share the work of reading the files.

    Raises:
      DataError: a file cannot be read.
    """
    settings = {
        name: value for name, value in dataclasses.asdict(data).items() if name not in CANNOT_MATTER
    }
    contents = _contents([f for some in origins.values() for one in some for f in one.files], peers)
    described = {
        "settings": settings,
        "records": {
            language: [[one.name, *(contents[str(file)] for file in one.files)] for one in some]
            for language, some in origins.items()
        },
        "tokenizer": [
            type(tokenizer).__name__,
            tokenizer.backend_tokenizer.to_str(),
            tokenizer.chat_template,
            {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            sorted(tokenizer.all_special_ids),
        ],
        "code": code_digest(),
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "python": [sys.version_info[:2], unicodedata.unidata_version, sys.byteorder],
    }
    text = json.dumps(described, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _contents(files: Sequence[Path], peers: Peers) -> dict[str, str]:
    """Digests of files, of which each process reads its share."""
    by_name = {str(file): file for file in files}

    def read(names: Sequence[str]) -> dict[str, str]:
        found = {}
        for name in names:
            file = by_name[name]
            try:
                found[name] = digest_files(file.parent, [file.name])[file.name]
            except OSError as error:
                raise DataError(f"{name}: cannot be read ({error.strerror or error}).") from None
        return found

    mine = sorted(by_name)[peers.number :: peers.count]
    told = peers.tell(peers.all_do(lambda: read(mine)))
    known = {file: digest for one in told for file, digest in one.items()}
    # Where hosts have other names for the files, what others have read does not help.
    return known | peers.all_do(lambda: read([name for name in by_name if name not in known]))


def code_digest() -> str:
    """Return a digest of the code that makes tokens of data, that of its settings included."""
    root = Path(__file__).parent.parent
    files = (file for room in ("config", "data") for file in (root / room).rglob("*.py"))
    digests = digest_files(root, sorted(file.relative_to(root).as_posix() for file in files))
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class CachePlace(NamedTuple):
    """Where tokenised data is kept.

    Attributes:
      root: the directory of this machine.
      bucket: a directory in a bucket, where machines find what another has made; or None.
    """

    root: Path
    bucket: Path | None = None


def open_cache(where: str) -> CachePlace | None:
    """Return the place for tokenised data that a setting names, made if need be.

    Args:
      where: the directory; one in a bucket, of which this machine has a copy in the user's cache
        directory; ``auto`` for that directory alone, if it can be made; ``none``.

    Raises:
      DownloadError: the directory cannot be made.
    """
    if where == "none":
        return None
    if where != "auto":
        directory = typed_path(where)
        if is_bucket(directory):
            return CachePlace(cache_directory(None, "tokens"), directory)
        return CachePlace(cache_directory(directory, ""))
    try:
        return CachePlace(cache_directory(None, "tokens"))
    except DownloadError:
        return None


class TokenCache:
    """One entry, as the processes that use it together see it.

    Those that see each other's files in the directory share an entry: each makes, and checks, some
    of its languages. All methods are called by all processes, one after the other.

    Args:
      place: where it is.
      key: from `cache_key`.
      languages: all of them.
      peers: the processes of the run.

    Attributes:
      mine: the languages that this process makes where there is no entry.
      problem: why the entry cannot be kept; empty as long as it can.
      complaints: what is wrong with each record that was left out, once that is known.
      unsent: why the entry is not in the bucket where it should be; empty if it is.
    """

    def __init__(self, place: CachePlace, key: str, languages: Sequence[str], peers: Peers) -> None:
        self._root, self._entry = place.root, place.root / key
        self._remote = None if place.bucket is None else place.bucket / key
        self._languages, self._peers = languages, peers
        self.problem, self.unsent, self._whole = "", "", False
        self.complaints: list[str] = []
        self._team = self._find_team()
        self._place = self._team.index(peers.number)
        self.mine = list(languages[self._place :: len(self._team)])
        self._making = self._root / f".{key}-{self._token}"

    @property
    def is_first(self) -> bool:
        """Whether this process does what one has to do for all that share the directory."""
        return self._place == 0

    def _find_team(self) -> list[int]:
        """The processes that see each other's files here, this one among them."""
        peers = self._peers
        told = [one.decode() for one in peers.exchange(secrets.token_hex(8).encode())]
        self._token = told[peers.number]
        if peers.count == 1:
            return [0]
        own = self._root / f".here-{self._token}"
        with contextlib.suppress(OSError):
            own.touch()
        peers.exchange(b"")
        seen = [n for n, token in enumerate(told) if (self._root / f".here-{token}").exists()]
        every = peers.tell(seen)
        own.unlink(missing_ok=True)
        if peers.number not in seen:
            return [peers.number]
        team = [number for number in range(peers.count) if every[number] == seen]
        self._token = told[team[0]]
        return team

    def read(self) -> tuple[dict[str, Kept], list[str], str]:
        """Open the entry, if it is whole.

        Returns:
          Per language its part, what is wrong with records left out, and what was wrong with the
          entry, which is thrown away; all are empty where there is none.
        """
        if self._remote is not None:
            if self.is_first:
                self._fetch(self._remote)
            self._peers.exchange(b"")  # until it is there, or is not
        problem, found, complaints = "", False, []
        parts: dict[str, Kept] = {}
        try:
            digests = read_digests(self._entry)
            found = digests is not None
            if digests is not None:
                share = sorted(digests.files)[self._place :: len(self._team)]
                damage = damaged_files(self._entry, {name: digests.files[name] for name in share})
                if set(digests.files) != {_COMPLAINTS, *map(_file, self._languages)}:
                    damage.append("it has not the files that it should")
                problem = "; ".join(damage)
            if found and not problem:
                parts = {code: self._open(self._entry, code) for code in self._languages}
                complaints = json.loads((self._entry / _COMPLAINTS).read_text("utf-8"))
        except InterruptedRunError:  # one process alone, where it waits for nobody
            raise
        except Exception as error:  # another process may know that what is read here is damaged
            problem = f"{self._entry}: {error}"
        told = self._exchange([found, problem])
        problem = next((problem for _, problem in told if problem), "")
        if problem and self.is_first:
            _discard(self._entry)
        if problem or not all(found for found, _ in told):
            return {}, [], problem
        if self.is_first:
            with contextlib.suppress(OSError):
                os.utime(self._entry)
            if self._remote is not None and not (self._remote / DIGESTS).is_file():
                self._send(self._remote)
        return parts, complaints, ""

    def everyone(self, whole: bool) -> bool:
        """Return whether all processes of the run have a whole entry.

        Args:
          whole: whether this one has; then it has nothing to make, whatever others do.
        """
        self._whole = whole
        if whole:
            self.mine = []
        return all(told == b"1" for told in self._peers.exchange(b"1" if whole else b"0"))

    def keep(self, language: str, part: Kept) -> Kept:
        """Write a language's part; return it as it lies there, or as it was where that fails."""
        if self.problem:
            return part
        try:
            self._making.mkdir(parents=True, exist_ok=True)
            _write(self._making / _file(language), part)
            return self._open(self._making, language)
        except OSError as error:
            self.problem = str(error)
            return part

    def finish(self, complaints: Iterable[str]) -> dict[str, Kept]:
        """Give the entry its name when all have written their parts of it.

        Args:
          complaints: what is wrong with records that this process has left out.

        Returns:
          The parts that other processes have made; none if the entry cannot be kept.
        """
        told = self._exchange([self.problem, list(complaints)])
        self.problem = next((problem for problem, _ in told if problem), "")
        # Each process reads all of a table of all languages, and finds what is wrong with that.
        self.complaints = list(dict.fromkeys(text for _, some in told for text in some))
        makes = self.is_first and not self._whole
        if makes and not self.problem:
            try:
                replace_text(self._making / _COMPLAINTS, json.dumps(self.complaints))
                write_digests(self._making)
                self._name()
            except (OSError, CheckpointError) as error:
                self.problem = str(error)
        (self.problem, _), *_ = self._exchange([self.problem, None])
        others = {}
        if not (self.problem or self._whole):
            rest = [code for code in self._languages if code not in self.mine]
            try:
                others = {language: self._open(self._entry, language) for language in rest}
            except (OSError, ValueError) as error:  # a file system that shows them late
                self.problem = str(error)
        self._peers.exchange(b"")  # nobody removes or replaces it before all have it open
        if makes:
            self.abandon()  # nothing, if it has its name
            self._clean()
            if self._remote is not None and not self.problem:
                self._send(self._remote)
        return others

    def _fetch(self, remote: Path) -> None:
        """Copy the entry from the bucket, if it is there alone; it is checked like others."""
        if self._entry.exists():
            return
        try:
            if not (remote / DIGESTS).is_file():
                return
            copy_files(remote, self._making, files_below(remote))
            os.rename(self._making, self._entry)
        except OSError:  # it is made anew
            _discard(self._making)

    def _send(self, remote: Path) -> None:
        """Copy the entry to the bucket; what says that it is whole goes last."""
        try:
            copy_files(self._entry, remote, (n for n in files_below(self._entry) if n != DIGESTS))
            copy_files(self._entry, remote, [DIGESTS])
        except OSError as error:
            self.unsent = str(error)

    def abandon(self) -> None:
        """Remove what has been written of an entry that will not be whole."""
        _discard(self._making)

    def _exchange(self, told: Any) -> list[Any]:
        """What the processes of the team tell, in their order."""
        every = self._peers.tell(told)
        return [every[number] for number in self._team]

    def _name(self) -> None:
        for _ in range(2):
            try:
                os.rename(self._making, self._entry)
                return
            except OSError:
                if not self._entry.is_dir():
                    raise
            # Another run has been faster; unless it is damaged, its entry is this one.
            digests = read_digests(self._entry)
            if digests is not None and not damaged_files(self._entry, digests.files):
                _discard(self._making)
                return
            _discard(self._entry)

    def _open(self, directory: Path, language: str) -> Kept:
        arrays, about = map_arrays(directory / _file(language))
        return Kept.unpacked(arrays, json.loads(about))

    def _clean(self) -> None:
        """Remove what nobody has used for long, and the oldest of what is too much."""
        now = time.time()
        entries = []
        with contextlib.suppress(OSError):
            for path in self._root.iterdir():
                if not _OWN.fullmatch(path.name):
                    continue
                age = now - path.stat().st_mtime
                if path.name.startswith("."):
                    if age > _ABANDONED:
                        _discard(path)
                elif (path / DIGESTS).is_file() and path != self._entry:
                    entries.append((age, path))
        size = _size(self._entry)
        for age, path in sorted(entries):
            size += _size(path)
            if age > _MOST_SECONDS or size > MOST_BYTES:
                _discard(path)


def _file(language: str) -> str:
    return f"{language}.safetensors"


def _write(file: Path, part: Kept) -> None:
    arrays, facts = part.packed()
    write_arrays(file, arrays, json.dumps(facts))


def _discard(path: Path) -> None:
    """Remove an entry: at once, by taking its name away."""
    with contextlib.suppress(OSError):
        if path.is_dir():
            away = path.with_name(f".away-{secrets.token_hex(8)}")
            path.rename(away)
            shutil.rmtree(away)
        else:
            path.unlink()


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return sum(file.stat().st_size for file in path.iterdir())
    return 0
