"""Digests of a directory's files, so that what is read is what was written.

A directory whose files are known for good gets ``digests.json`` before it gets its name::

    {"format": 1, "algorithm": "xxh128", "about": {...}, "files": {"a/b.bin": "..."}, "own": "..."}

XXH128 is as fast as memory; it finds damage and mix-ups, and is no protection against forgery.
``own`` is the digest of all the rest of the file itself.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import jax
import numpy as np
import xxhash
from jax.experimental import multihost_utils

from jaxmoo.errors import CheckpointError, DamagedError, JaxmooError
from jaxmoo.files.atomic import replace_text

__all__ = [
    "DIGESTS",
    "UNFINISHED",
    "Digests",
    "agree_whole",
    "damaged_files",
    "digest_files",
    "files_below",
    "note_own_digests",
    "read_checked",
    "read_digests",
    "write_digests",
]

T = TypeVar("T")

DIGESTS = "digests.json"
# Lies in a directory of a bucket, which cannot be renamed, as long as that is not whole.
UNFINISHED = ".unfinished"
# How notes of digests begin that several processes leave for the first one.
_NOTE = "digests.process_"
_ALGORITHM = "xxh128"
_BUFFER = 1 << 22
# Files up to this size are checked before anything is made of them; weights while they are read.
_SMALL = 1 << 20


class Digests(NamedTuple):
    """What ``digests.json`` says.

    Attributes:
      about: facts about the directory, as JSON holds them.
      files: digests by path below the directory, with ``/`` between names.
    """

    about: dict[str, Any]
    files: dict[str, str]


def files_below(root: Path) -> list[str]:
    """List the files below a directory, with ``/`` between names."""
    files = (file for file in root.rglob("*") if file.is_file())
    return sorted(file.relative_to(root).as_posix() for file in files)


def digest_files(root: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the digests of files below a directory, read on a few threads.

    Raises:
      OSError: one cannot be read.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = (Path(folder) / "a.txt").write_text("one")
      ...     digest_files(Path(folder), ["a.txt"])
      {'a.txt': '0a1c6d4cf41eb499911faba7321fe1a0'}
    """
    names = list(names)
    with concurrent.futures.ThreadPoolExecutor(_threads()) as pool:
        return dict(zip(names, pool.map(lambda name: _digest(root / name), names), strict=True))


def note_own_digests(directory: Path) -> None:
    """Leave a note, for the first process, of the digests of what this process alone has written.

    So that each reads its own. Orbax writes a process's arrays to ``ocdbt.process_N``.

    Args:
      directory: that of the arrays.

    Raises:
      OSError: a file cannot be read, or the note not be written.
    """
    number = jax.process_index()
    arrays = f"ocdbt.process_{number}"
    own = [f"{arrays}/{name}" for name in files_below(directory / arrays)]
    text = json.dumps(digest_files(directory, own))
    (directory / f"{_NOTE}{number}").write_text(text, "utf-8")


def write_digests(
    root: Path, about: Mapping[str, Any] | None = None, *, within: Sequence[str] = ("",)
) -> None:
    """Write the digests of the files below a directory into it.

    Args:
      root: the directory.
      about: facts to be kept with them.
      within: the directories below it whose files are meant; these may not change from here on.

    Raises:
      OSError: a file cannot be read, or the digests cannot be written.
    """
    files: dict[str, str] = {}
    for note in root.rglob(f"{_NOTE}*"):
        place = note.parent.relative_to(root)
        found = json.loads(note.read_text("utf-8"))
        files |= {(place / name).as_posix(): digest for name, digest in found.items()}
        note.unlink()
    names = {(Path(part) / name).as_posix() for part in within for name in files_below(root / part)}
    files |= digest_files(root, sorted(names - files.keys() - {DIGESTS, UNFINISHED}))
    content = {
        "format": 1,
        "algorithm": _ALGORITHM,
        "about": dict(about or {}),
        "files": dict(sorted(files.items())),
    }
    text = json.dumps(content | {"own": _own(content)}, indent=1) + "\n"
    replace_text(root / DIGESTS, text)


def read_digests(root: Path) -> Digests | None:
    """Read the digests of a directory; None where there are none.

    Raises:
      DamagedError: they are damaged.
      CheckpointError: they are of a kind that is not known.
    """
    file = root / DIGESTS
    try:
        content = json.loads(file.read_text("utf-8"))
        own = content.pop("own")
        whole = own == _own(content)
        digests = Digests(dict(content["about"]), dict(content["files"]))
        inside = all(_is_inside(name) for name in digests.files)
    except FileNotFoundError:
        return None
    # RecursionError: brackets nested by the thousand.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{file} is damaged ({error!r})") from None
    if not whole or not inside:
        raise DamagedError(f"{file} is damaged: it is not what was written")
    if content.get("algorithm") != _ALGORITHM or content.get("format") != 1:
        raise CheckpointError(
            f"{file} has format {content.get('format')!r} and algorithm "
            f"{content.get('algorithm')!r}; expected 1 and {_ALGORITHM!r}"
        )
    return digests


def damaged_files(root: Path, files: Mapping[str, str]) -> list[str]:
    """Say of each file that is not what was written what is wrong with it.

    Args:
      root: the directory.
      files: digests by name.

    Example:
      >>> damaged_files(Path("nowhere"), {"a.bin": ""})
      ['a.bin is missing']
    """

    def problem(name: str) -> str | None:
        try:
            if not (root / name).is_file():
                return f"{name} is missing"
            found = _digest(root / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        return None if found == files[name] else f"{name} is not what was written"

    with concurrent.futures.ThreadPoolExecutor(_threads()) as pool:
        return [found for found in pool.map(problem, files) if found]


def read_checked(
    read: Callable[[], T], root: Path, files: Mapping[str, str], *, says: str, advice: str
) -> T:
    """Read files and check them meanwhile: small ones before, large ones beside the reading.

    Where there are several processes all must call; each checks its share, and all of it is checked
    before: the others would wait for one whose reading fails.

    Args:
      read: reads what lies in the files.
      root: the directory.
      files: digests by name; none where the files have none.
      says: what is the matter when they cannot be read, as an error begins.
      advice: what to do then; a sentence.

    Returns:
      What was read.

    Raises:
      DamagedError: files are damaged (in all processes).
      CheckpointError: ``read`` fails on them. Errors of ours stay what they are where no file is
        damaged.
    """
    several = jax.process_count() > 1
    before = {n: d for n, d in files.items() if several or _size(root / n) <= _SMALL}
    beside = {name: d for name, d in files.items() if name not in before}
    agree_whole(damaged_files(root, _share(before)), says=says, advice=advice)
    failure: CheckpointError | None = None
    result: T | None = None
    with concurrent.futures.ThreadPoolExecutor(1) as background:
        found = background.submit(damaged_files, root, beside)
        try:
            with _leftovers_unheard():
                result = read()
        except JaxmooError:
            if not found.result():
                raise
        # Damaged files fail in any way at all inside libraries, some of which say it at length.
        except Exception as error:
            reason = str(error).strip().split("\n")[0][:500] or type(error).__name__
            failure = CheckpointError(f"{says}: {reason}\n{advice}")
        problems = found.result()
    if problems:
        raise _damaged(problems, says, advice)
    if failure is not None:
        raise failure
    return cast("T", result)


@contextlib.contextmanager
def _leftovers_unheard() -> Iterator[None]:
    """Keep silent, from now on if the block fails, about what a library's failed reading leaves.

    Reads that are still under way complain, each with a traceback, that their event loop is gone,
    and so do coroutines when they are deleted.
    """
    raised, ignored = sys.excepthook, sys.unraisablehook

    def on_raised(kind: Any, error: Any, trace: Any) -> None:
        if not _is_leftover(error):
            raised(kind, error, trace)

    def on_ignored(what: Any) -> None:
        if not _is_leftover(what.exc_value) and not inspect.iscoroutine(what.object):
            ignored(what)

    sys.excepthook, sys.unraisablehook = on_raised, on_ignored
    yield
    sys.excepthook, sys.unraisablehook = raised, ignored


def _is_leftover(error: BaseException | None) -> bool:
    return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"


def agree_whole(problems: Sequence[str], *, says: str, advice: str) -> None:
    """Raise in every process if one of them has found something damaged.

    Args:
      problems: what this one has found.
      says: what is the matter then, as an error begins.
      advice: what to do then; a sentence.

    Raises:
      DamagedError: one of them has.
    """
    somewhere = bool(problems)
    if jax.process_count() > 1:
        somewhere = bool(np.any(multihost_utils.process_allgather(np.bool_(somewhere))))
    if problems:
        raise _damaged(problems, says, advice)
    if somewhere:
        raise DamagedError(f"{says}: another process found it damaged and says where.\n{advice}")


def _damaged(problems: Sequence[str], says: str, advice: str) -> DamagedError:
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return DamagedError(f"{says}: {', '.join(problems[:3])}{more}.\n{advice}")


def _share(files: Mapping[str, str]) -> dict[str, str]:
    """The files that this process checks."""
    names = sorted(files)[jax.process_index() :: jax.process_count()]
    return {name: files[name] for name in names}


def _is_inside(name: str) -> bool:
    """Whether a name is that of a file below the directory, wherever that is."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts and "\0" not in name


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _digest(file: Path) -> str:
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(_BUFFER))
    with file.open("rb", buffering=0) as stream:
        while size := stream.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def _own(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _threads() -> int:
    return min(8, os.cpu_count() or 1)
