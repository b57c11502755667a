"""Files in buckets of object stores, under the names that `pathlib` has for those of a disk.

fsspec reads and writes them. An object appears when it is written completely, or not at all, and
replaces an older one at once; there are no directories but in names, and nothing can be renamed.
Listings are never cached: other processes write, too.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import functools
import importlib.util
import io
import os
import re
from collections.abc import Iterator
from pathlib import PurePath, PurePosixPath
from typing import IO, Any, NamedTuple

from jaxmoo.errors import ConfigError

__all__ = ["SCHEMES", "BucketPath", "hide_secrets", "is_bucket", "scheme_of"]

# What reads and writes each, beside fsspec.
SCHEMES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub", "memory": "fsspec"}
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
# As a library of paths leaves what it takes for a directory.
_COLLAPSED = re.compile(rf"({'|'.join(SCHEMES)}):/(?!/)")
# Bytes that are fetched, or sent, at a time.
_READ, _WRITE = 2**22, 2**24
_SECRETS = (
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "FSSPEC_S3_KEY", "FSSPEC_S3_SECRET"),
    *("FSSPEC_S3_TOKEN", "FSSPEC_GS_TOKEN", "FSSPEC_GCS_TOKEN", "FSSPEC_HF_TOKEN"),
    *("WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
)


def scheme_of(text: str) -> str | None:
    """Return what stands before ``://``; None where a path is one of this machine.

    Raises:
      ConfigError: it is a bucket's, or looks like one, but cannot be used.

    Example:
      >>> scheme_of("s3://bucket/runs"), scheme_of("data/en.jsonl")
      ('s3', None)
      >>> scheme_of("gs:/bucket/runs")
      Traceback (most recent call last):
      jaxmoo.errors.ConfigError: gs:/bucket/runs: write gs:// with two slashes for a bucket, or
      ./gs:/bucket/runs for a directory of that name.
    """
    if _COLLAPSED.match(text):
        scheme = text.partition(":")[0]
        raise ConfigError(
            f"{text}: write {scheme}:// with two slashes for a bucket, or ./{text} for a directory "
            "of that name."
        )
    found = _URL.match(text)
    if found is None:
        return None
    scheme, rest = found[1].lower(), found[2]
    known = ", ".join(f"{name}://" for name in SCHEMES)
    if scheme not in SCHEMES:
        raise ConfigError(
            f"{scheme}:// is not supported: paths are those of this machine, or begin with one of "
            f"{known}."
        )
    bucket = rest.partition("/")[0]
    if scheme in ("s3", "gs") and "@" in bucket:
        raise ConfigError(
            f"{scheme}://...: a path must hold no credentials, for it is written to configs and "
            "logs. Give them by the environment or the files of the store's own tools."
        )
    if not bucket or any(part in (".", "..") for part in rest.split("/")) or "\0" in rest:
        raise ConfigError(f"{text}: expected {scheme}://BUCKET/NAME, without . and .. in it.")
    return scheme


def is_bucket(path: object) -> bool:
    """Whether a path is one of a bucket."""
    return isinstance(path, BucketPath)


def hide_secrets(text: str) -> str:
    """Return a text without what the environment's credentials are, should it hold them.

    Example:
      >>> os.environ["FSSPEC_S3_SECRET"] = "open sesame"
      >>> hide_secrets("cannot sign with open sesame"), os.environ.pop("FSSPEC_S3_SECRET")[:4]
      ('cannot sign with ***', 'open')
    """
    for name in _SECRETS:
        if len(value := os.environ.get(name, "")) > 3:
            text = text.replace(value, "***")
    return re.sub(r"://[^/\s@]+@", "://***@", text)


class _Stat(NamedTuple):
    st_size: int


@functools.total_ordering
class BucketPath:
    """A path in a bucket, with the methods of :class:`pathlib.Path` that make sense there.

    It is no `os.PathLike` that the system could open: where only a file of this machine will do, an
    error says so, and no directory ``s3:`` is made.

    Args:
      url: such as ``s3://bucket/name``.

    Raises:
      ConfigError: the store is not known, or what reads it is not installed.

    Example:
      >>> file = BucketPath("memory://bucket/runs") / "a.txt"
      >>> _ = file.write_text("one")
      >>> print(file, file.read_text(), [path.name for path in file.parent.iterdir()])
      memory://bucket/runs/a.txt one ['a.txt']
    """

    __slots__ = ("_pure", "_scheme")

    def __init__(self, url: str) -> None:
        scheme = scheme_of(url)
        if scheme is None:
            raise ConfigError(f"{url} is no path of a bucket: expected s3://BUCKET/NAME, say.")
        package = SCHEMES[scheme]
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"{url}: {scheme}:// needs the package {package}: pip install 'jaxmoo[buckets]'."
            )
        self._scheme = scheme
        self._pure = PurePosixPath(url.partition("://")[2])

    def _with(self, pure: PurePosixPath) -> BucketPath:
        if ".." in pure.parts or pure.is_absolute():
            raise ConfigError(f"{self} / {pure}: a path in a bucket has no .. and no second root.")
        made = object.__new__(BucketPath)
        made._scheme, made._pure = self._scheme, pure
        return made

    # Names.

    def __str__(self) -> str:
        return f"{self._scheme}://{self._pure}"

    def __repr__(self) -> str:
        return f"BucketPath({str(self)!r})"

    def __fspath__(self) -> str:
        raise ConfigError(
            f"{self} is in a bucket, and here only a file or directory of this machine will do. "
            "Copy it, or name another place."
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BucketPath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __lt__(self, other: BucketPath) -> bool:
        return str(self) < str(other)

    def __truediv__(self, name: str | PurePath) -> BucketPath:
        return self._with(self._pure / name)

    def joinpath(self, *names: str | PurePath) -> BucketPath:
        """Return the path below this one."""
        return self._with(self._pure.joinpath(*names))

    @property
    def scheme(self) -> str:
        """The store's: ``"s3"``, ``"gs"``, ``"hf"`` or ``"memory"``."""
        return self._scheme

    @property
    def name(self) -> str:
        """The last part."""
        return self._pure.name

    @property
    def stem(self) -> str:
        """The last part without its suffix."""
        return self._pure.stem

    @property
    def suffix(self) -> str:
        """The last part's last suffix."""
        return self._pure.suffix

    @property
    def suffixes(self) -> list[str]:
        """The last part's suffixes."""
        return self._pure.suffixes

    @property
    def parts(self) -> tuple[str, ...]:
        """The store and bucket, and the names behind it."""
        return (f"{self._scheme}://{self._pure.parts[0]}", *self._pure.parts[1:])

    @property
    def parent(self) -> BucketPath:
        """The path without its last part; of a bucket the bucket itself."""
        return self if len(self._pure.parts) == 1 else self._with(self._pure.parent)

    @property
    def parents(self) -> tuple[BucketPath, ...]:
        """All paths above this one, the nearest first."""
        return tuple(self._with(p) for p in self._pure.parents if p != PurePosixPath("."))

    def with_name(self, name: str) -> BucketPath:
        """Return the path with another last part."""
        return self._with(self._pure.with_name(name))

    def with_suffix(self, suffix: str) -> BucketPath:
        """Return the path with another suffix."""
        return self._with(self._pure.with_suffix(suffix))

    def relative_to(self, other: BucketPath) -> PurePosixPath:
        """Return what stands behind another path."""
        return self._pure.relative_to(other._pure)

    def as_posix(self) -> str:
        """Return the URL."""
        return str(self)

    def is_absolute(self) -> bool:
        """Whether it is absolute, which it always is."""
        return True

    def absolute(self) -> BucketPath:
        """Return the path itself."""
        return self

    resolve = absolute

    # What is there.

    def exists(self) -> bool:
        """Whether there is an object of this name, or any below it."""
        with self._errors():
            return self._fs.exists(str(self))

    def is_file(self) -> bool:
        """Whether there is an object of this name."""
        with self._errors():
            return self._fs.isfile(str(self))

    def is_dir(self) -> bool:
        """Whether there are objects below this name."""
        with self._errors():
            return self._fs.isdir(str(self))

    def stat(self) -> _Stat:
        """Return the object's size in bytes, as ``st_size``."""
        with self._errors():
            return _Stat(int(self._fs.info(str(self))["size"]))

    def iterdir(self) -> Iterator[BucketPath]:
        """Yield what lies directly below."""
        with self._errors():
            found = self._fs.ls(str(self), detail=False)
        root, *paths = (self._fs._strip_protocol(name).rstrip("/") for name in (str(self), *found))
        # A store may list a mark for the directory itself.
        yield from (self / name for name in sorted({_last(p) for p in paths if p != root}))

    def glob(self, pattern: str) -> Iterator[BucketPath]:
        """Yield what lies directly below and has a name like this; ``/`` is not for patterns."""
        if self.is_dir():
            yield from (p for p in self.iterdir() if fnmatch.fnmatchcase(p.name, pattern))

    def rglob(self, pattern: str) -> Iterator[BucketPath]:
        """Yield all objects below that have a name like this."""
        with self._errors():
            found = self._fs.find(str(self))
        root = str(self._fs._strip_protocol(str(self))).rstrip("/") + "/"
        for name in sorted(found):
            path = self / str(self._fs._strip_protocol(name)).removeprefix(root)
            if path != self and fnmatch.fnmatchcase(path.name, pattern):
                yield path

    # Contents.

    def read_bytes(self) -> bytes:
        """Return what the object holds."""
        with self._errors():
            return self._fs.cat_file(str(self))

    def read_range(self, start: int, stop: int) -> bytes:
        """Return the bytes from one place to another; only these are fetched."""
        if start >= stop:
            return b""
        with self._errors():
            return self._fs.cat_file(str(self), start=start, end=stop)

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """Return the object's text."""
        text = self.read_bytes().decode(encoding, errors)
        return text.replace("\r\n", "\n").replace("\r", "\n")

    def write_bytes(self, data: bytes) -> int:
        """Make the object, or replace it at once."""
        with self._errors():
            self._fs.pipe_file(str(self), bytes(data))
        return len(data)

    def write_text(self, text: str, encoding: str = "utf-8") -> int:
        """Make the object, or replace it at once."""
        return self.write_bytes(text.encode(encoding))

    def create(self, data: bytes) -> bool:
        """Make the object unless there is one of this name; return whether it was made.

        The store itself decides, where it can (S3 and Google Cloud Storage: a conditional request).
        """
        with self._errors():
            if self._fs.exists(str(self)):
                return False
            try:
                self._fs.pipe_file(str(self), data, mode="create")
            except FileExistsError:
                return False
        return True

    def open(
        self, mode: str = "r", buffering: int = -1, encoding: str | None = None, **text: Any
    ) -> IO[Any]:
        """Open the object to read it anywhere, or to write it from beginning to end.

        What is written appears when the file is closed, and not if the block that writes fails.
        """
        if mode.replace("b", "").replace("t", "") not in ("r", "w"):
            raise ConfigError(f"{self} can be read or written anew, not opened with mode {mode!r}.")
        raw = _Reader(self) if "r" in mode else _Writer(self)
        if isinstance(raw, _Writer):
            binary: Any = raw
        else:
            binary = raw if buffering == 0 else io.BufferedReader(raw, _READ)
        return binary if "b" in mode else _Text(binary, encoding or "utf-8", **text)

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the object."""
        with self._errors():
            try:
                self._fs.rm_file(str(self))
            except FileNotFoundError:
                if not missing_ok:
                    raise

    def rmtree(self) -> None:
        """Remove all objects below."""
        for path in list(self.rglob("*")):
            path.unlink(missing_ok=True)

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: names need no directories, and buckets are made by their owners."""

    @property
    def _fs(self) -> Any:
        return _filesystem(self._scheme)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Whatever a library raises becomes an error of the system, without credentials in it."""
        try:
            yield
        except ConfigError:
            raise
        except Exception as error:
            raise _as_system_error(error, self) from None


def _last(path: str) -> str:
    return PurePosixPath(path).name


@functools.cache
def _filesystem(scheme: str) -> Any:
    import fsspec

    options = {} if scheme == "memory" else {"use_listings_cache": False}
    return fsspec.filesystem(scheme, skip_instance_cache=scheme != "memory", **options)


# By the names of their classes: the libraries are optional.
_NO_CREDENTIALS = {
    *("NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError"),
    *("DefaultCredentialsError", "RefreshError", "ProfileNotFound", "CredentialRetrievalError"),
}


def _as_system_error(error: Exception, path: BucketPath) -> OSError:
    kind, where = type(error).__name__, str(path)
    text = hide_secrets(str(error).strip().split("\n")[0][:300]) or kind
    status = getattr(error, "code", None)
    bucket = path.parts[0]
    if kind in _NO_CREDENTIALS:
        says = f"no credentials for {path.scheme}:// ({kind}); set them up as for its own tools"
        return PermissionError(errno.EACCES, says, where)
    if isinstance(error, PermissionError) or str(status) in ("401", "403"):
        says = f"access denied; check what your credentials may do in {bucket}"
        return PermissionError(errno.EACCES, f"{says} ({text})", where)
    if isinstance(error, FileNotFoundError) or str(status) == "404":
        says = "no such object"
        if re.search("specified bucket|NoSuchBucket|bucket does not exist", str(error)):
            says = f"there is no bucket {bucket}, or it is not to be seen with your credentials"
        return FileNotFoundError(errno.ENOENT, says, where)
    if isinstance(error, FileExistsError | IsADirectoryError | NotADirectoryError):
        return type(error)(error.errno or errno.EEXIST, text, where)
    number = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
    return OSError(number, f"{kind}: {text}", where)


class _Reader(io.RawIOBase):
    """An object, read in ranges."""

    def __init__(self, path: BucketPath) -> None:
        self._path = path
        with path._errors():
            self._file = path._fs.open(str(path), "rb", block_size=_READ)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        with self._path._errors():
            return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        with self._path._errors():
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class _Writer(io.BufferedIOBase):
    """An object that is sent in parts while it is written, and appears when it is closed."""

    def __init__(self, path: BucketPath) -> None:
        self._path, self._size = path, 0
        options = {} if path.scheme == "hf" else {"autocommit": False, "block_size": _WRITE}
        with path._errors():
            self._file = path._fs.open(str(path), "wb", **options)

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size

    def write(self, data: Any) -> int:
        with self._path._errors():
            self._file.write(data)
        size = memoryview(data).nbytes
        self._size += size
        return size

    def close(self) -> None:
        if not self.closed:
            super().close()
            with self._path._errors():
                self._file.close()
                if self._path.scheme != "hf":
                    self._file.commit()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self.close()
            return
        super().close()
        with contextlib.suppress(Exception):  # it would hide what went wrong
            self._file.discard()
            self._file.closed = True  # or it would be finished when it is collected


class _Text(io.TextIOWrapper):
    """An object's text, which does not appear either if the block that writes it fails."""

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None:
            binary: Any = self.buffer
            binary.__exit__(kind, error, trace)
        super().__exit__(kind, error, trace)
