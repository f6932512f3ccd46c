"""The published float weights: where they are searched for, and their download.

The search goes in this order:

1. `--weights FILE or FOLDER`. The file must be there: the search does not go on.
2. `$BATCHVERIFY_WEIGHTS`. A file is used as it is, for whichever float backbone is asked for. A folder is searched
   for the published file name; if it is not there, the search goes on.
3. The torch hub cache that facenet-pytorch downloads to: `checkpoints` in `$TORCH_HOME`, `$XDG_CACHE_HOME/torch` or
   `~/.cache/torch`.
4. facenet-pytorch's release, which is downloaded into that cache. `$BATCHVERIFY_WEIGHTS_URL` names a mirror to use
   instead: an http, https or file address of a folder that holds the files under their published names.

A download must have the announced size, one of torch's file formats and the SHA-256 in `PUBLISHED`, from a mirror
too. A file that is already on this machine is taken as it is: it may be saved anew, and the fingerprint that
`batchverify backbones` prints tells whether its tensors are the known ones.
An environment variable that is set but empty counts as not set.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from batchverify.errors import ArtifactError, DownloadError, UsageError
from batchverify.version import __version__

WEIGHTS_VARIABLE = "BATCHVERIFY_WEIGHTS"
MIRROR_VARIABLE = "BATCHVERIFY_WEIGHTS_URL"
RELEASE = "https://github.com/timesler/facenet-pytorch/releases/download/v2.2.9"
CHUNK = 1 << 20
ATTEMPTS = 3
PAUSE = 0.02  # of the timeout, before the second attempt; twice that before the third

# torch >= 1.6 writes zip files. The published files are older: they start with a pickled magic number.
ZIP_START = b"PK\x03\x04"
LEGACY_START = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Published:
    """A published weights file. sha256: of the file, in hex; empty if it is not known."""

    name: str
    url: str
    sha256: str = ""

    @property
    def file_name(self) -> str:
        """The name of the file in a folder, a mirror or the cache."""
        return self.url.rpartition("/")[2]


# The publisher states no digests. These are those that other projects have pinned for the same addresses.
PUBLISHED = {
    "vggface2-float": Published(
        "vggface2-float",
        f"{RELEASE}/20180402-114759-vggface2.pt",
        "281cebca8662831adb987a874bdcb36e73f5b1c6dc5ee5878f305e985625d99b",
    ),
    "casia-webface": Published(
        "casia-webface",
        f"{RELEASE}/20180408-102900-casia-webface.pt",
        "7a67afdbbc995fce5e10128675e318799a70698c2f433ba75dd7eb9a2f096e7d",
    ),
}


def torch_hub_folder() -> Path:
    """The folder that facenet-pytorch keeps its downloads in; it need not exist. `ArtifactError` without a home."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "torch"
    return _expand(Path(os.environ.get("TORCH_HOME") or cache), "torch's cache, TORCH_HOME") / "checkpoints"


def find_weights(published: Published, weights: Path | None = None) -> Path | None:
    """Search for the file on this machine, in the order of the module's docstring; None if it is nowhere.

    weights: value of `--weights`. Raises `ArtifactError` if that or `$BATCHVERIFY_WEIGHTS` does not exist.
    """
    try:
        if weights is not None:
            path = _file_at(weights, published, "--weights")
            if path is None:
                raise ArtifactError(f"--weights {weights}: no file {published.file_name} in this folder")
            return path
        variable = os.environ.get(WEIGHTS_VARIABLE)
        if variable and (path := _file_at(Path(variable), published, WEIGHTS_VARIABLE)):
            return path
        with suppress(ArtifactError):  # without a home folder nothing is there
            cached = torch_hub_folder() / published.file_name
            return cached if cached.is_file() else None
        return None
    except OSError as exc:  # a folder that may not be entered, a name that is too long
        raise ArtifactError(f"{published.name}: cannot look for {published.file_name}: {exc}") from exc


def locate_weights(published: Published, weights: Path | None = None, *, progress: Progress | None = None) -> Path:
    """The file, from this machine or from the network.

    Raises `ArtifactError` as `find_weights` does, and `DownloadError` as `fetch_weights` does.
    """
    return find_weights(published, weights) or fetch_weights(published, progress=progress)


def fetch_weights(
    published: Published, *, folder: Path | None = None, progress: Progress | None = None, timeout: float = 30
) -> Path:
    """Download the file into `folder`, by default the torch hub cache, unless it is there already.

    progress: called as `progress(done, total)` with bytes; `total` is None if the server does not tell it, and
    `done` falls when an attempt has to start over. timeout: seconds without an answer or a byte. The file appears
    whole or not at all, even if several processes fetch it at once. Raises `DownloadError`, and `UsageError` for a
    bad `$BATCHVERIFY_WEIGHTS_URL`.
    """
    folder = folder or torch_hub_folder()
    target = folder / published.file_name
    try:
        if not target.is_file():
            _store(_address(published), published.sha256, target, progress, timeout)
    except _AttemptError as exc:
        raise DownloadError(_advice(published, folder, f"download failed: {exc}")) from exc
    except OSError as exc:
        raise DownloadError(_advice(published, folder, f"cannot store {target}: {exc.strerror}")) from exc
    return target


def _file_at(path: Path, published: Published, source: str) -> Path | None:
    """The file that `path` is or holds; None for a folder without it. source: for the message."""
    path = _expand(path, source)
    if path.is_file():
        return path
    if not path.is_dir():
        raise ArtifactError(f"{source} {path}: no such file or folder")
    inside = path / published.file_name
    return inside if inside.is_file() else None


def _expand(path: Path, source: str) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as exc:
        raise ArtifactError(f"{source} {path}: no such home folder") from exc


def _address(published: Published) -> str:
    """The URL at the release or the mirror. A bad mirror is not quoted: it may hold a password."""
    mirror = os.environ.get(MIRROR_VARIABLE)
    if not mirror:
        return published.url
    if not re.fullmatch(r"(?i)(https?|file)://[!-~]+", mirror) or set(mirror) & set("@?#"):
        raise UsageError(
            f"{MIRROR_VARIABLE}: must be the http://, https:// or file:// address of a folder, "
            "without a user name, '@', '?', '#' or a space"
        )
    return f"{mirror.rstrip('/')}/{published.file_name}"


def _advice(published: Published, folder: Path, reason: str) -> str:
    mirrored = f" (the mirror of {MIRROR_VARIABLE})" if os.environ.get(MIRROR_VARIABLE) else ""
    return (
        f"{published.name}: {reason}. Get {published.file_name} from {_address(published)}{mirrored} in "
        f"another way and give it with --weights FILE, set {WEIGHTS_VARIABLE} to the file or its folder, or put "
        f"it into {folder}. Or use --backbone vggface2, which is in the package and needs no download"
    )


def _store(url: str, sha256: str, target: Path, progress: Progress | None, timeout: float) -> None:
    """Download to a file beside `target`, check it, and move it into place; leave nothing else behind."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{os.getpid()}-{os.urandom(4).hex()}.part")
    try:
        with part.open("xb") as file:
            _Download(url, file, progress, timeout).run()
            file.flush()
            os.fsync(file.fileno())
        _check_format(part)
        _check_digest(part, sha256)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


class _AttemptError(Exception):
    """A download attempt failed. may_retry: whether another one may succeed."""

    def __init__(self, reason: str, *, may_retry: bool = True) -> None:
        super().__init__(reason)
        self.may_retry = may_retry


@dataclass
class _Download:
    """A download into `file`. An attempt continues where the one before it stopped, if the server supports that.

    total: size of the whole file, None if not known. etag: of the bytes in the file.
    """

    url: str
    file: BinaryIO
    progress: Progress | None
    timeout: float
    total: int | None = None
    etag: str | None = None

    def run(self) -> None:
        """Try up to `ATTEMPTS` times. Raises `_AttemptError`."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with self._open() as response:
                    self._begin(response)
                    self._copy(response)
                return
            except _AttemptError as exc:
                if not exc.may_retry or attempt == ATTEMPTS:
                    raise
            time.sleep(PAUSE * self.timeout * attempt)

    def _open(self) -> Any:
        """Request the bytes that are missing. If the server cannot be reached at first, there is no retry."""
        import urllib.request
        from http.client import HTTPException
        from urllib.error import HTTPError, URLError

        request = urllib.request.Request(self.url, headers={"User-Agent": f"batchverify/{__version__}"})
        if offset := self.file.tell():
            request.add_header("Range", f"bytes={offset}-")
            if self.etag and self.etag.startswith('"'):  # If-Range accepts no weak ETags
                request.add_header("If-Range", self.etag)
        try:
            return urllib.request.urlopen(request, timeout=self.timeout)
        except HTTPError as exc:
            exc.close()
            is_busy = exc.code in {408, 429} or exc.code >= 500
            raise _AttemptError(f"the server answered {exc.code} {exc.reason}", may_retry=is_busy) from exc
        except URLError as exc:
            raise _AttemptError(f"not reachable: {exc.reason}", may_retry=offset > 0) from exc
        except (OSError, HTTPException) as exc:
            raise _AttemptError(f"no answer: {exc}") from exc

    def _begin(self, response: Any) -> None:
        """Set `total` and `etag`, and empty the file if the response does not continue it."""
        if response.status == 206:
            sent = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
            if not sent or int(sent[1]) != self.file.tell() or self.total not in {None, int(sent[2])}:
                self._empty()
                raise _AttemptError("the server sent another part than the one requested")
            self.total = int(sent[2])
        else:
            self._empty()
            length = response.headers.get("Content-Length", "")
            self.total = int(length) if length.isdecimal() else None
        self.etag = response.headers.get("ETag")

    def _empty(self) -> None:
        self.file.seek(0)
        self.file.truncate()

    def _copy(self, response: Any) -> None:
        """Append the body to the file."""
        from http.client import HTTPException

        done = self.file.tell()
        while self.total is None or done < self.total:
            try:
                # read1 returns what has arrived, so that it is kept even if the rest never comes
                chunk = response.read1(CHUNK if self.total is None else min(CHUNK, self.total - done))
            except (OSError, HTTPException) as exc:
                raise _AttemptError(f"the transfer broke after {done} bytes: {exc}") from exc
            if not chunk:
                break
            self.file.write(chunk)
            done += len(chunk)
            if self.progress is not None:
                self.progress(done, self.total)
        if self.total is not None and done < self.total:
            raise _AttemptError(f"the body ended after {done} of {self.total} bytes")


def _check_digest(part: Path, expected: str) -> None:
    """Require the published bytes, whoever sent them."""
    import hashlib

    digest = hashlib.sha256()
    with part.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    if expected and digest.hexdigest() != expected:
        raise _AttemptError(f"another file than the published one: SHA-256 {digest.hexdigest()}, not {expected}")


def _check_format(part: Path) -> None:
    """Require one of torch's two formats: servers send error and login pages with status 200."""
    import zipfile

    size = part.stat().st_size
    with part.open("rb") as file:
        start = file.read(60)
    if not start.startswith((ZIP_START, LEGACY_START)):
        raise _AttemptError(f"not a torch file but {size} bytes that start with {start!r}")
    if start.startswith(ZIP_START) and not zipfile.is_zipfile(part):
        raise _AttemptError(f"a torch zip file without its end, {size} bytes")
