"""What the site needs beyond Markdown.

- ``<!-- public names of jaxmoo.blocks -->`` becomes their reference, in the order in which the
  package imports them; names after ``except`` are left out.
- Links to files outside of docs lead to where the repository is, if ``repo_url`` says.
- Roles in docstrings (``:func:`~jaxmoo.aggregate```) are shown without the role.
"""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_PUBLIC = re.compile(r"^<!-- public names of (\S+?)(?: except (.*?))? -->$", re.MULTILINE)
_OUTSIDE = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#\s]+)(?:#[^)\s]*)?\)")
_ROLE = re.compile(r":(?:func|class|mod|meth|data|attr):<code>~?(?:jaxmoo\.)?")


def public_names(package: str) -> dict[str, str]:
    """The names that a package imports for others, and where each is defined.

    Without importing anything: a function often has the name of the module that it is defined in.
    """
    init = ROOT / package.replace(".", "/") / "__init__.py"
    text = init.read_text("utf-8") if init.exists() else ""
    homes = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("jaxmoo"):
            for alias in node.names:
                home = f"{node.module}.{alias.name}"
                path = ROOT / home.replace(".", "/")
                if node.module != package or not (
                    path.is_dir() or path.with_suffix(".py").exists()
                ):
                    homes[alias.asname or alias.name] = home
    return homes


def expanded(markdown: str) -> str:
    """A page with the reference of public names in the place of the comments that ask for it."""

    def reference(match: re.Match[str]) -> str:
        left_out = (match[2] or "").split()
        names = public_names(match[1]).items()
        return "\n\n".join(f"::: {home}" for name, home in names if name not in left_out)

    return _PUBLIC.sub(reference, markdown)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    here = os.path.dirname(page.file.src_path)

    def linked(match: re.Match[str]) -> str:
        text, target = match[1], os.path.normpath(os.path.join(here, match[2]))
        if not target.startswith(".."):
            return match[0]
        if config.repo_url:
            path = target.removeprefix("../")
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path})"
        return text

    return expanded(_OUTSIDE.sub(linked, markdown))


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    return _ROLE.sub("<code>", html)
