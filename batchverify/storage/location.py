"""Local paths and object-store URIs in one class: parse, join, list, read, and write atomically."""

from __future__ import annotations

import errno
import os
import re
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from pyarrow import fs

from batchverify.errors import UsageError, redacted
from batchverify.storage.object_store import ACCOUNT, AZURE_SCHEMES, OPTIONS, SCHEMES, file_system, retry
from batchverify.storage.temporary import sweep, temporary_name, writing_to

# What fsync of a folder answers where there is nothing to sync; EIO is no such answer.
_NO_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)
_SURROGATE = re.compile("[\ud800-\udfff]")
# How often a local folder is listed before it is reported as missing.
LISTINGS = 5
_SCHEME = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]+):(?=//)")
_BUCKET = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]*")
_CONTAINER = re.compile(r"([a-zA-Z0-9$][a-zA-Z0-9-]*)@([a-zA-Z0-9]+(?:\.[a-zA-Z0-9-]+)*)")
_QUERY = re.compile(rf"\?(?:{OPTIONS})=[^?]*$")
# What a local path may name besides files and folders.
_SPECIAL = {
    "a pipe": stat.S_ISFIFO,
    "a device": stat.S_ISCHR,
    "a disk device": stat.S_ISBLK,
    "a socket": stat.S_ISSOCK,
}
_SECRET = re.compile(
    r"[?&](?:access_?key(?:_?id)?|secret_?key|session_?token|account_?key|client_?secret|sas_?token|sig|signature|"
    r"password|awsaccesskeyid|googleaccessid|x-(?:amz|goog)-(?:signature|credential|security-token))=",
    re.IGNORECASE,
)


def scheme_of(text: str) -> str:
    """The scheme of a URI in lower case; empty for a plain path (`C:\\x` and `a:b` are paths)."""
    match = _SCHEME.match(text)
    return match.group(1).lower() if match else ""


@dataclass(frozen=True)
class Location:
    """A file or folder: an absolute local path, or `bucket/key` in an object store with its options."""

    path: str
    scheme: str = ""
    query: str = ""

    @classmethod
    def parse(cls, text: str | os.PathLike[str]) -> Location:
        """Parse a path or URI; options follow a question mark (`s3://bucket/key?endpoint_override=…`).

        Keys are not percent-decoded; empty, `.` and `..` parts are resolved. The account of
        `abfs://container@account.dfs.core.windows.net/key` becomes an option. Raises `UsageError` for
        unsupported schemes, for URIs without a bucket, and for `-`.
        """
        text = path_text(text)
        if not text:
            raise UsageError("a path is empty (an unset shell variable?)")
        if text == "-":
            raise UsageError(
                "-: standard input and output cannot be read twice or resumed: name a file (./- for one called -)"
            )
        scheme = scheme_of(text)
        if scheme == "":
            return cls(os.path.abspath(expand_home(text)))  # noqa: PTH100  lexical
        rest = text[len(scheme) + 3 :]
        if scheme == "file":
            return cls._of_file_uri(text, rest)
        if scheme not in SCHEMES:
            known = ", ".join(SCHEMES)
            raise UsageError(f"{redacted(text)}: scheme '{scheme}' is not supported (local paths, file, {known})")
        return cls._of_store(scheme, rest)

    @classmethod
    def _of_store(cls, scheme: str, rest: str) -> Location:
        match = _QUERY.search(rest)
        path, query = (rest[: match.start()], match.group(0)) if match else (rest, "")
        bucket, slash, key = path.partition("/")
        if scheme in AZURE_SCHEMES:
            scheme = AZURE_SCHEMES[0]
            match = _CONTAINER.fullmatch(bucket)
            if match:
                bucket = match.group(1)
                query = f"{ACCOUNT}{match.group(2)}" + query.replace("?", "&", 1)
        if not _BUCKET.fullmatch(bucket) or _SECRET.search(rest):
            # The URI is not quoted: what precedes the bucket, or an option, may be a secret.
            raise UsageError(f"{scheme}://…: a bucket's name must follow; keys belong in the environment")
        return cls(bucket + slash + key, scheme, query).normal()

    @classmethod
    def _of_file_uri(cls, text: str, rest: str) -> Location:
        host, slash, path = rest.partition("/")
        if host not in ("", "localhost") or not slash:
            raise UsageError(f"{redacted(text)}: a file URI starts with file:///")
        return cls(os.path.abspath("/" + unquote(path).lstrip("/")))  # noqa: PTH100

    def normal(self) -> Location:
        """Without empty, `.` and `..` parts; `..` never leads out of the bucket."""
        if self.is_local:
            return Location(os.path.normpath(self.path))
        bucket, *parts = [part for part in self.path.split("/") if part not in ("", ".")]
        key: list[str] = []
        for part in parts:
            key = key[:-1] if part == ".." else [*key, part]
        return Location("/".join([bucket, *key]), self.scheme, self.query)

    @property
    def is_local(self) -> bool:
        """Whether this is a path of the operating system."""
        return not self.scheme

    @property
    def filesystem(self) -> Any:
        """The pyarrow file system that holds `path`; `UsageError` for a path that is not UTF-8."""
        if self.is_local:
            if _SURROGATE.search(self.path):
                raise UsageError(f"{self.path!a}: the path is not UTF-8")
            return fs.LocalFileSystem()
        return file_system(self.scheme, self.path.split("/", 1)[0], self.query)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return PurePosixPath(self.path).name

    @property
    def suffix(self) -> str:
        """The extension in lower case, such as `.parquet`."""
        return PurePosixPath(self.path).suffix.lower()

    @property
    def parent(self) -> Location:
        """The folder that holds this; a bucket and the local root are their own parents."""
        folder, slash, _ = self.path.rpartition("/")
        return Location(folder or slash or self.path, self.scheme, self.query)

    def join(self, *parts: str) -> Location:
        """A file or folder below this one."""
        return Location("/".join([self.path.rstrip("/"), *parts]), self.scheme, self.query)

    def __str__(self) -> str:
        if self.is_local:
            return self.path
        if not self.query.startswith(ACCOUNT):
            return f"{self.scheme}://{self.path}{self.query}"
        account, more, options = self.query.removeprefix(ACCOUNT).partition("&")
        bucket, slash, key = self.path.partition("/")
        return f"{self.scheme}://{bucket}@{account}{slash}{key}{'?' if more else ''}{options}"

    def kind(self) -> str:
        """`file`, `folder` or `absent`."""
        filesystem = self.filesystem
        info = retry(lambda: filesystem.get_file_info(self.path))
        return {fs.FileType.File: "file", fs.FileType.Directory: "folder"}.get(info.type, "absent")

    def special(self) -> str:
        """`a pipe`, `a device`, `a disk device` or `a socket` if that is what lies here; otherwise empty."""
        if not self.is_local:
            return ""
        try:
            mode = os.stat(self.path).st_mode  # noqa: PTH116
        except (OSError, ValueError):
            return ""
        return next((name for name, is_kind in _SPECIAL.items() if is_kind(mode)), "")

    def files(self, *, recursive: bool = False) -> list[tuple[Location, int]]:
        """The files in this folder with their sizes in bytes, sorted by path; none if it is absent.

        Raises `UsageError` for a name that is not UTF-8: neither a manifest nor a message could hold it.
        """
        infos = self.infos(recursive=recursive)
        try:
            files = sorted((info.path, info.size) for info in infos if info.type == fs.FileType.File)
        except UnicodeDecodeError as exc:
            raise UsageError(f"{self}: a name in this folder is not UTF-8: {exc.object!r}") from exc
        return [(Location(path, self.scheme, self.query), size) for path, size in files]

    def infos(self, *, recursive: bool = False) -> list[fs.FileInfo]:
        """What lies in this folder, in any order; nothing if it is absent. Raises OSError."""
        selector = fs.FileSelector(self.path, allow_not_found=True, recursive=recursive)
        return retry(lambda: self._listed(selector))

    def _listed(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        # pyarrow opens the folder and, where that fails, looks whether it exists before it answers "no files". A
        # folder that another process makes between the two is reported as missing, so it is listed again.
        for _ in range(LISTINGS - 1):
            with suppress(FileNotFoundError):
                return self.filesystem.get_file_info(selector)
        return self.filesystem.get_file_info(selector)

    def make_folder(self) -> None:
        """Make this folder, private to the user; does nothing in an object store."""
        if self.is_local:
            Path(self.path).mkdir(mode=0o700, parents=True, exist_ok=True)

    def write_bytes(self, data: Any, *, staging: Location | None = None) -> None:
        """Write a whole file atomically: complete and durable when this returns, otherwise unchanged.

        staging: a folder on the same file system for the temporary file; by default the file's own. What killed
        processes left of this file there is removed.
        """
        if not self.is_local:
            retry(lambda: self._put(data))
            return
        if staging is None:
            sweep(Path(self.parent.path), self.name)
        temporary = Path((staging or self.parent).path) / temporary_name(self.name)
        try:
            with writing_to(temporary) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                publish(temporary, Path(self.path))
        finally:
            with suppress(FileNotFoundError, NotADirectoryError):
                temporary.unlink()

    def read_bytes(self, most: int | None = None) -> bytes:
        """The whole file. Raises OSError, also for a file of more than `most` bytes."""
        return retry(lambda: self._get(most))

    def remove(self) -> None:
        """Delete this file, durably; does nothing if it is absent. Raises OSError."""
        if not self.is_local:
            with suppress(FileNotFoundError):
                retry(lambda: self.filesystem.delete_file(self.path))
            return
        with suppress(FileNotFoundError, NotADirectoryError):
            os.unlink(self.path)  # noqa: PTH108
            sync_folder(Path(self.path).parent)

    def _get(self, most: int | None) -> bytes:
        with self.filesystem.open_input_file(self.path) as file:
            size = file.size()
            if most is not None and size > most:
                raise OSError(errno.EFBIG, f"{size:,} bytes, the limit is {most:,}")
            return bytes(file.read())

    def _put(self, data: Any) -> None:
        with self.filesystem.open_output_stream(self.path) as stream:
            stream.write(data)


def expand_home(text: str) -> str:
    """A path with `~` and `~user` as their home folders; `~name` of nobody stays a name.

    Raises `UsageError` for `~/…` if there is no home folder: a folder called `~` would be made here.
    """
    expanded = os.path.expanduser(text)  # noqa: PTH111
    if text.partition("/")[0] == "~" and not os.path.isabs(expanded):  # noqa: PTH117
        raise UsageError(f"{text}: user id {os.getuid()} has no home folder (HOME is not set)")
    return expanded


def path_text(path: Any, name: str = "a path or URI") -> str:
    """A path or URI given as a string or a `Path`; `UsageError` for bytes, images, arrays and anything else."""
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(text, str):
        raise UsageError(f"{name} must be a string or a Path, got {type(path).__name__}")
    return text


def publish(temporary: Path, target: Path) -> None:
    """Give a finished file its name, durably: `os.replace`, then fsync of the folder."""
    os.replace(temporary, target)  # noqa: PTH105
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, on file systems that can. Raises OSError if the disk fails.

    Some network and shared file systems have no fsync of folders, and a folder may be writable but not readable.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    except OSError as exc:
        if exc.errno not in _NO_FSYNC:
            raise
    finally:
        os.close(descriptor)
