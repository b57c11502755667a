"""What the site needs beyond Markdown: links to files outside of docs, and roles in docstrings."""

from __future__ import annotations

import os
import re
from typing import Any

# A link out of the folder, to a file of the repository.
_OUTSIDE = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#\s]+)(?:#[^)\s]*)?\)")
# A role of Sphinx before what it names: :func:`~jaxmoo.aggregate`.
_ROLE = re.compile(r":(?:func|class|mod|meth|data|attr):<code>~?(?:jaxmoo\.)?")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Link files of the repository where it lies, or only name them where that is not known."""
    here = os.path.dirname(page.file.src_path)

    def linked(match: re.Match[str]) -> str:
        text, target = match[1], os.path.normpath(os.path.join(here, match[2]))
        if not target.startswith(".."):
            return match[0]
        if config.repo_url:
            path = target.removeprefix("../")
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path})"
        return text

    return _OUTSIDE.sub(linked, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Show what a role names without the role."""
    return _ROLE.sub("<code>", html)
