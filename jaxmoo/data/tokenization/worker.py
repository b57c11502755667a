"""The program of a process that helps another to tokenise."""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
from typing import Any

from jaxmoo.data.tokenization.parallel import send, tokenized
from jaxmoo.errors import JaxmooError


def main() -> None:
    """Do the tasks that come from the process that has started this one, until there are none."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no result
    with contextlib.suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        tokenizer = pickle.load(sys.stdin.buffer)
        while True:
            task = pickle.load(sys.stdin.buffer)
            try:
                result: Any = tokenized(task, tokenizer)
            except JaxmooError as error:
                result = error
            send(out, result)


if __name__ == "__main__":
    main()
