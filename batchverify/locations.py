"""Local paths and object-store URIs through one door: parse, join, list, write complete or not at all."""

from __future__ import annotations

import os
import re
import uuid
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
from pyarrow import fs

from batchverify.errors import UsageError

REMOTE_SCHEMES = ("s3", "gs", "gcs")
_SURROGATE = re.compile("[\ud800-\udfff]")
_SCHEME = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]+):(?=//)")
_BUCKET = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]*")
# Keys may hold question marks (`photo.php?id=7.jpg`): only the names of pyarrow's options start options.
_OPTIONS = (
    "region|scheme|endpoint_override|allow_delayed_open|allow_bucket_creation|allow_bucket_deletion|"
    "tls_ca_file_path|tls_ca_dir_path|tls_verify_certificates|smart_defaults|retry_limit_seconds|project_id"
)
_QUERY = re.compile(rf"\?(?:{_OPTIONS})=[^?]*$")
# What a file system takes from the environment when it is made: another value, another file system.
_ENVIRONMENT = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_ACCESS_KEY_ID",
    "AWS_PROFILE",
    "AWS_DEFAULT_REGION",
)


def scheme_of(text: str) -> str:
    """The scheme of a URI in lower case; empty for a plain path (`C:\\x` and `a:b` are paths)."""
    match = _SCHEME.match(text)
    return match.group(1).lower() if match else ""


@lru_cache(maxsize=64)
def _file_system(scheme: str, bucket: str, query: str, environment: tuple[str | None, ...]) -> fs.FileSystem:
    try:
        return fs.FileSystem.from_uri(f"{scheme}://{bucket}{query}")[0]
    except (pa.ArrowException, OSError, ValueError) as exc:
        raise UsageError(f"{scheme}://{bucket}{query}: cannot be opened: {exc}") from exc


@dataclass(frozen=True)
class Location:
    """A file or folder: an absolute local path, or `bucket/key` in an object store with its options."""

    path: str
    scheme: str = ""
    query: str = ""

    @classmethod
    def parse(cls, text: str | os.PathLike[str]) -> Location:
        """Parse a path or URI; options follow a question mark (`s3://bucket/key?endpoint_override=…`).

        Keys are taken as they stand, without percent-decoding; empty, `.` and `..` parts are resolved.
        Raises `UsageError` for schemes other than file, s3, gs and gcs, and for URIs without a bucket.
        """
        text = os.fspath(text)
        if not text:
            raise UsageError("a path is empty (an unset shell variable?)")
        scheme = scheme_of(text)
        if scheme == "":
            return cls(os.path.abspath(os.path.expanduser(text)))  # noqa: PTH100, PTH111  lexical, "~" in a name kept
        rest = text[len(scheme) + 3 :]
        if scheme == "file":
            return cls._of_file_uri(text, rest)
        if scheme not in REMOTE_SCHEMES:
            known = ", ".join(REMOTE_SCHEMES)
            raise UsageError(f"{text}: scheme '{scheme}' is not supported (local paths, file, {known})")
        query = _QUERY.search(rest)
        path = rest[: query.start()] if query else rest
        if not _BUCKET.fullmatch(path.split("/", 1)[0]):
            # The text is not repeated: what stands before the bucket may be a secret.
            raise UsageError(f"{scheme}://…: a bucket's name must follow; keys belong in the environment")
        return cls(path, scheme, query.group(0) if query else "").normal()

    @classmethod
    def _of_file_uri(cls, text: str, rest: str) -> Location:
        host, slash, path = rest.partition("/")
        if host not in ("", "localhost") or not slash:
            raise UsageError(f"{text}: three slashes and an absolute path must follow 'file:'")
        return cls(os.path.abspath("/" + unquote(path).lstrip("/")))  # noqa: PTH100

    def normal(self) -> Location:
        """Without empty, `.` and `..` parts; the bucket is never left."""
        if self.is_local:
            return Location(os.path.normpath(self.path))
        bucket, *keys = [part for part in self.path.split("/") if part not in ("", ".")]
        kept: list[str] = []
        for part in keys:
            kept = kept[:-1] if part == ".." else [*kept, part]
        return Location("/".join([bucket, *kept]), self.scheme, self.query)

    @property
    def is_local(self) -> bool:
        """Whether this is a path of this machine (or of something mounted on it)."""
        return not self.scheme

    @property
    def filesystem(self) -> Any:
        """The pyarrow file system that holds `path`; `UsageError` for a path that is not UTF-8."""
        if self.is_local:
            if _SURROGATE.search(self.path):
                raise UsageError(f"{self.path!a}: the path is not UTF-8")
            return fs.LocalFileSystem()
        environment = tuple(os.environ.get(name) for name in _ENVIRONMENT)
        return _file_system(self.scheme, self.path.split("/", 1)[0], self.query, environment)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return PurePosixPath(self.path).name

    @property
    def suffix(self) -> str:
        """The last part's ending in lower case, `.parquet` say."""
        return PurePosixPath(self.path).suffix.lower()

    @property
    def parent(self) -> Location:
        """The folder that holds this; of a bucket, and of the local root, itself."""
        folder, slash, _ = self.path.rpartition("/")
        return Location(folder or slash or self.path, self.scheme, self.query)

    def join(self, *parts: str) -> Location:
        """A file or folder below this one."""
        return Location("/".join([self.path.rstrip("/"), *parts]), self.scheme, self.query)

    def __str__(self) -> str:
        return self.path if self.is_local else f"{self.scheme}://{self.path}{self.query}"

    def kind(self) -> str:
        """`file`, `folder` or `absent`."""
        info = self.filesystem.get_file_info(self.path)
        return {fs.FileType.File: "file", fs.FileType.Directory: "folder"}.get(info.type, "absent")

    def files(self, *, recursive: bool = False) -> list[tuple[Location, int]]:
        """The files in this folder with their sizes in bytes, sorted by path; none when it is absent.

        Raises `UsageError` where a name is not UTF-8: neither a manifest nor a message could hold it.
        """
        selector = fs.FileSelector(self.path, allow_not_found=True, recursive=recursive)
        infos = self.filesystem.get_file_info(selector)
        try:
            found = [(info.path, info.size) for info in infos if info.type == fs.FileType.File]
        except UnicodeDecodeError as exc:
            raise UsageError(f"{self}: a name in this folder is not UTF-8: {exc.object!r}") from exc
        return [(Location(path, self.scheme, self.query), size) for path, size in sorted(found)]

    def make_folder(self) -> None:
        """Make this folder, private to the user where it is local; object stores need none."""
        if self.is_local:
            Path(self.path).mkdir(mode=0o700, parents=True, exist_ok=True)

    def write_bytes(self, data: Any, *, staging: Location | None = None) -> None:
        """Write a whole file: complete and durable when this returns, absent otherwise.

        `staging` is a folder of the same file system for the temporary file (default: this folder).
        """
        if not self.is_local:
            with self.filesystem.open_output_stream(self.path) as stream:
                stream.write(data)
            return
        folder = Path((staging or self.parent).path)
        temporary = folder / f".{self.name}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            publish(temporary, Path(self.path))
        finally:
            with suppress(FileNotFoundError, NotADirectoryError):
                temporary.unlink()


def publish(temporary: Path, target: Path) -> None:
    """Give a finished file its name, durably: `os.replace`, then fsync of the folder."""
    os.replace(temporary, target)  # noqa: PTH105
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
