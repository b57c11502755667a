"""The example configs, chat templates and launch scripts that come with the package."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from jaxmoo.errors import ConfigError
from jaxmoo.files.outputs import typed_path

__all__ = ["bundled", "config_names", "copy_bundled", "find_config"]

_PACKAGE = Path(__file__).parents[1]
_KINDS = ("configs", "launch")


def bundled(kind: str) -> Path:
    """Return the folder of ``"configs"`` or ``"launch"``: in the package, or in its repository."""
    inside = _PACKAGE / f"_{kind}"  # where the wheel has it
    return inside if inside.is_dir() else _PACKAGE.parent / kind


def config_names() -> list[str]:
    """Return the names that stand for example configs.

    Example:
      >>> "quickstart" in config_names() and "study/sib200" in config_names()
      True
    """
    folder = bundled("configs")
    found = [*folder.glob("*.yaml"), *folder.glob("study/*.yaml")]
    return sorted(path.relative_to(folder).as_posix().removesuffix(".yaml") for path in found)


def find_config(name: str | Path) -> Path:
    """Return the file that a name means: a file; else an example config, or what one refers to.

    Args:
      name: a path; or the name of an example, such as ``quickstart``, which is looked for in the
        folder ``configs`` first, where people keep copies that they have changed; or the path of an
        example in its repository, such as ``configs/quickstart.yaml``, which need not be at hand.

    Returns:
      The file; the path as it was given where nothing is found.

    Example:
      >>> find_config("quickstart").name, str(find_config("no/such/file"))
      ('quickstart.yaml', 'no/such/file')
    """
    path = typed_path(name)
    with contextlib.suppress(OSError, ValueError):  # no path at all
        return next((file for file in _meant(path) if file.is_file()), path)
    return path


def _meant(path: Path) -> Iterator[Path]:
    yield path
    yield Path("configs", f"{path}.yaml")
    yield bundled("configs") / f"{path}.yaml"
    if path.parts[:1] == ("configs",):
        yield bundled("configs").joinpath(*path.parts[1:])


def copy_bundled(directory: Path) -> list[Path]:
    """Copy the example configs, chat templates and launch scripts to where they can be changed.

    Args:
      directory: where; the folders ``configs`` and ``launch`` are made in it.

    Returns:
      The files written.

    Raises:
      ConfigError: one of them is there already; nothing is written then.
    """
    files = {
        file: directory / kind / file.relative_to(bundled(kind))
        for kind in _KINDS
        for file in sorted(bundled(kind).rglob("*"))
        if file.is_file()
    }
    there = [str(target) for target in files.values() if target.exists()]
    if there:
        raise ConfigError(
            f"{', '.join(there[:3])}{', ...' if len(there) > 3 else ''} would be overwritten: move "
            "what is there, or name another directory."
        )
    for file, target in files.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    return [*files.values()]
