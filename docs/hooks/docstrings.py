"""Docstrings as griffe and Markdown want them: a section Examples, and links in brackets."""

from __future__ import annotations

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"^([ \t]*)Example:[ \t]*$", re.MULTILINE)
_LINK = re.compile(r"`([^`<]+?)\s*<(https?://[^>]+)>`_")


class Docstrings(griffe.Extension):
    """Rewrites every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = _EXAMPLE.sub(r"\1Examples:", obj.docstring.value)
            obj.docstring.value = _LINK.sub(r"[\1](\2)", text)
