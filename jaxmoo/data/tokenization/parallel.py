"""Tokenising many examples on all cores.

Rendering by a chat template is Python, of which one process runs one thread at a time; so others
help. They are started as programs of their own, which needs no guard in a script that is not meant
to be run twice, and copies nothing of devices and their threads.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from jaxmoo.data.example import Example
from jaxmoo.data.sources.records import Malformed
from jaxmoo.data.token_table import TokenTable
from jaxmoo.data.tokenization.tokenize import check_known, tokenize_part
from jaxmoo.errors import DataError
from jaxmoo.runtime.cores import available_cores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["Done", "Task", "Tokenizing", "send", "tokenized"]

_WORKER = "jaxmoo.data.tokenization.worker"
_PART = 1000  # examples; the same however many share the work, as are then all complaints
_WORTH = 20_000  # examples, from which on it is worth the seconds in which another process starts


class Task(NamedTuple):
    """Examples to tokenise, and how."""

    examples: Sequence[Example]
    max_length: int
    special_tokens: str
    malformed: Malformed


class Done(NamedTuple):
    """What becomes of a part, as it is sent from process to process."""

    kept: list[int]
    table: TokenTable
    complaints: list[str]
    characters: int
    missing: int


class Tokenizing:
    """Tokenises examples, in several processes where there are many.

    Args:
      tokenizer: a fast tokenizer.
      max_length: the most tokens to keep of each example.
      special_tokens: as in :func:`~jaxmoo.data.tokenization.tokenize.tokenize_all`.
      expected: about how many examples there will be.
      cores: on how many cores.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        max_length: int,
        special_tokens: str,
        *,
        expected: int,
        cores: int | None = None,
    ) -> None:
        self._tokenizer, self._max_length = tokenizer, max_length
        self._special_tokens = special_tokens
        self._helpers: list[_Helper] = []
        cores = available_cores() if cores is None else cores
        if expected >= _WORTH and cores > 1:
            content = pickle.dumps(tokenizer, protocol=pickle.HIGHEST_PROTOCOL)
            self._helpers = [_Helper(content) for _ in range(cores)]

    def __enter__(self) -> Tokenizing:
        return self

    def __exit__(self, *error: object) -> None:
        for helper in self._helpers:
            helper.close()

    def tokenize(
        self,
        examples: Sequence[Example],
        malformed: Malformed,
        advance: Callable[[int], object] = lambda number: None,
    ) -> tuple[list[Example], TokenTable]:
        """Tokenise examples of one language.

        Args:
          examples: the examples.
          malformed: notes what is wrong with each that is left out.
          advance: called with numbers of examples that are done.

        Returns:
          The examples that are left, and what they are as tokens.

        Raises:
          DataError: as :func:`~jaxmoo.data.tokenization.tokenize.tokenize_good`.
        """
        kept: list[Example] = []
        tables: list[TokenTable] = []
        characters = missing = 0
        tasks = [
            Task(
                examples[at : at + _PART],
                self._max_length,
                self._special_tokens,
                malformed.of_part(),
            )
            for at in range(0, len(examples), _PART)
        ]
        for task, done in zip(tasks, self._all(tasks), strict=True):
            for complaint in done.complaints:
                malformed.add(DataError(complaint))
            kept += [task.examples[number] for number in done.kept]
            tables.append(done.table)
            characters, missing = characters + done.characters, missing + done.missing
            advance(len(task.examples))
        if kept:
            check_known(characters, missing, kept[0].language)
        return kept, TokenTable.joined(tables)

    def _all(self, tasks: Sequence[Task]) -> Iterator[Done]:
        if not self._helpers or len(tasks) < 2:
            for task in tasks:
                yield tokenized(task, self._tokenizer)
            return
        free: SimpleQueue[_Helper] = SimpleQueue()
        for helper in self._helpers:
            free.put(helper)

        def run(task: Task) -> Done:
            helper = free.get()
            try:
                return helper.run(task)
            finally:
                free.put(helper)

        with ThreadPoolExecutor(len(self._helpers)) as pool:
            futures = deque(pool.submit(run, task) for task in tasks)
            try:
                while futures:
                    yield futures.popleft().result()  # what has been taken is not kept
            finally:
                for future in futures:
                    future.cancel()


def tokenized(task: Task, tokenizer: PreTrainedTokenizerFast) -> Done:
    """Do a task."""
    found = tokenize_part(
        task.examples,
        tokenizer,
        task.max_length,
        task.malformed,
        special_tokens=task.special_tokens,
    )
    return Done(
        found.kept,
        TokenTable.of(found.tokens),
        task.malformed.complaints,
        found.characters,
        found.missing,
    )


class _Helper:
    """A process that tokenises what it is given.

    Args:
      tokenizer: as `pickle` writes it.
    """

    def __init__(self, tokenizer: bytes) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", _WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                "TOKENIZERS_PARALLELISM": "false",  # each has a core
                "JAX_PLATFORMS": "cpu",  # no devices are needed
            },
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in: Any = self._process.stdin
        self._out: Any = self._process.stdout
        # Goes with the first task: a process reads it only when it has started, and others start
        # meanwhile.
        self._first = tokenizer

    def run(self, task: Task) -> Done:
        try:
            self._in.write(self._first)
            self._first = b""
            send(self._in, task)
            result = pickle.load(self._out)
        except (OSError, EOFError, pickle.UnpicklingError):
            code = self._process.wait()
            raise DataError(
                f"A process that tokenises has ended with exit code {code}. Memory may have run "
                "out: free some, or use data.streaming=true."
            ) from None
        if isinstance(result, BaseException):
            raise result
        return result

    def close(self) -> None:
        for stream in (self._in, self._out):
            with contextlib.suppress(OSError):
                stream.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def send(stream: BinaryIO, what: Any) -> None:
    """Hand something to the process at the other end."""
    pickle.dump(what, stream, protocol=pickle.HIGHEST_PROTOCOL)
    stream.flush()
