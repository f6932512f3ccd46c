"""Where the published float weights lie: the search for them, and the download when they are nowhere.

The search goes in this order:

1. `--weights FILE or FOLDER`. It never falls through: what is named there must be there.
2. `$BATCHVERIFY_WEIGHTS`. A file is taken as it is, for whichever float backbone is asked for. A folder is
   searched for the published file name; without it there, the search goes on.
3. The torch hub cache that facenet-pytorch downloads to: `checkpoints` in `$TORCH_HOME`,
   `$XDG_CACHE_HOME/torch` or `~/.cache/torch`.
4. facenet-pytorch's release, downloaded into that cache. `$BATCHVERIFY_WEIGHTS_URL` names a mirror to ask
   instead: an http, https or file address of a folder that holds the files under their published names.

facenet-pytorch publishes no checksums. A download is held to the announced size and to torch's file formats;
the fingerprint that `batchverify backbones` prints says whether the tensors are the known ones.
An environment variable that is set but empty counts as not set.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from batchverify.errors import ArtifactError, DownloadError, UsageError
from batchverify.version import __version__

WEIGHTS_VARIABLE = "BATCHVERIFY_WEIGHTS"
MIRROR_VARIABLE = "BATCHVERIFY_WEIGHTS_URL"
RELEASE = "https://github.com/timesler/facenet-pytorch/releases/download/v2.2.9"
CHUNK = 1 << 20
TRIES = 3
PAUSE = 0.02  # of the timeout, before the second try; twice that before the third

# torch >= 1.6 writes zip files. The published files are older than that: a pickled magic number comes first.
ZIP_START = b"PK\x03\x04"
LEGACY_START = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Published:
    """A published weights file. `size` in bytes, or None: then the server's Content-Length is what counts."""

    name: str
    url: str
    size: int | None = None

    @property
    def file_name(self) -> str:
        """The name under which the file lies in a folder, a mirror or the cache."""
        return self.url.rpartition("/")[2]


PUBLISHED = {
    "vggface2-float": Published("vggface2-float", f"{RELEASE}/20180402-114759-vggface2.pt"),
    "casia-webface": Published("casia-webface", f"{RELEASE}/20180408-102900-casia-webface.pt"),
}


class _Failed(Exception):
    """A try that failed, and whether another one may do better; `fetch_weights` turns it into ours."""

    def __init__(self, reason: str, *, again: bool) -> None:
        super().__init__(reason)
        self.again = again


@dataclass(frozen=True)
class _Download:
    """One download as asked for; `timeout` is in seconds without a byte."""

    url: str
    size: int | None
    timeout: float
    progress: Progress | None


def torch_hub_folder() -> Path:
    """The folder that facenet-pytorch keeps its downloads in; it need not exist."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "torch"
    return _expand(Path(os.environ.get("TORCH_HOME") or cache), "torch's cache, TORCH_HOME") / "checkpoints"


def find_weights(published: Published, weights: Path | None = None) -> Path | None:
    """Look for the file on this machine, in the order of the module's docstring; None if it is nowhere.

    `weights` is what `--weights` says. Raises `ArtifactError` if that or `$BATCHVERIFY_WEIGHTS` is not there.
    """
    try:
        return _search(published, weights)
    except OSError as exc:  # a folder that may not be entered, a name too long
        raise ArtifactError(f"{published.name}: cannot look for {published.file_name}: {exc}") from exc


def locate_weights(
    published: Published,
    weights: Path | None = None,
    *,
    progress: Progress | None = None,
    download: bool = True,
) -> Path:
    """The file, from this machine or, with `download`, from the network.

    Raises `ArtifactError` as `find_weights` does and `DownloadError` when the file cannot be had.
    """
    path = find_weights(published, weights)
    if path is not None:
        return path
    if not download:
        raise DownloadError(_advice(published, torch_hub_folder(), "the file is not on this machine"))
    return fetch_weights(published, progress=progress)


def fetch_weights(
    published: Published, *, folder: Path | None = None, progress: Progress | None = None, timeout: float = 30
) -> Path:
    """Download into `folder`, by default the torch hub cache; a file that is there already is left as it is.

    `progress(done, total)` gets bytes; `total` is None where the server does not say, and `done` falls back
    when a try has to start over. `timeout` is in seconds without an answer or a byte. The file appears whole
    or not at all, also when several processes fetch it at once. Raises `DownloadError`, and `UsageError` for
    a bad `$BATCHVERIFY_WEIGHTS_URL`.
    """
    folder = folder or torch_hub_folder()
    target = folder / published.file_name
    try:
        if not target.is_file():
            _store(_Download(_address(published), published.size, timeout, progress), target)
    except _Failed as exc:
        raise DownloadError(_advice(published, folder, f"download failed: {exc}")) from exc
    except OSError as exc:
        raise DownloadError(_advice(published, folder, f"cannot store {target}: {exc.strerror}")) from exc
    return target


def _search(published: Published, weights: Path | None) -> Path | None:
    if weights is not None:
        path = _named(weights, published, "--weights")
        if path is None:
            raise ArtifactError(f"--weights {weights}: no file {published.file_name} in this folder")
        return path
    variable = os.environ.get(WEIGHTS_VARIABLE)
    if variable and (path := _named(Path(variable), published, WEIGHTS_VARIABLE)):
        return path
    cached = torch_hub_folder() / published.file_name
    return cached if cached.is_file() else None


def _named(path: Path, published: Published, said_by: str) -> Path | None:
    """The file that `path` is or holds; None for a folder without it."""
    path = _expand(path, said_by)
    if path.is_file():
        return path
    if not path.is_dir():
        raise ArtifactError(f"{said_by} {path}: no such file or folder")
    inside = path / published.file_name
    return inside if inside.is_file() else None


def _expand(path: Path, said_by: str) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as exc:
        raise ArtifactError(f"{said_by} {path}: no such home folder") from exc


def _address(published: Published) -> str:
    """The URL to ask: the release's or the mirror's. A bad one is not repeated: it may hold a password."""
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
        f"another way, then say --weights FILE, or set {WEIGHTS_VARIABLE} to the file or its folder, "
        f"or put it into {folder}. Or use --backbone vggface2: it is in the package and needs no download"
    )


def _store(source: _Download, target: Path) -> None:
    """Download beside `target`, check, and move into place; nothing else is left behind."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{os.getpid()}-{os.urandom(4).hex()}.part")
    try:
        with part.open("xb") as file:
            _download(source, file)
            file.flush()
            os.fsync(file.fileno())
        _check(part, source.size)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _download(source: _Download, file: BinaryIO) -> None:
    """Several tries; each goes on where the one before it stopped, if the server can do that."""
    total: int | None = None
    validator: str | None = None
    for attempt in range(1, TRIES + 1):
        try:
            with _open(source, file.tell(), validator) as response:
                total = _begin(response, file, total)
                validator = response.headers.get("ETag")
                _copy(response, file, total, source)
            return
        except _Failed as exc:
            if not exc.again or attempt == TRIES:
                raise
        time.sleep(PAUSE * source.timeout * attempt)


def _open(source: _Download, offset: int, validator: str | None) -> Any:
    """Ask for the bytes from `offset` on. A server that cannot be reached at all is asked only once."""
    import urllib.request
    from http.client import HTTPException
    from urllib.error import HTTPError, URLError

    request = urllib.request.Request(source.url, headers={"User-Agent": f"batchverify/{__version__}"})
    if offset:
        request.add_header("Range", f"bytes={offset}-")
        if validator and validator.startswith('"'):  # If-Range takes no weak ETags
            request.add_header("If-Range", validator)
    try:
        return urllib.request.urlopen(request, timeout=source.timeout)
    except HTTPError as exc:
        exc.close()
        busy = exc.code in {408, 429} or exc.code >= 500
        raise _Failed(f"the server answered {exc.code} {exc.reason}", again=busy) from exc
    except URLError as exc:
        raise _Failed(f"not reachable: {exc.reason}", again=offset > 0) from exc
    except (OSError, HTTPException) as exc:
        raise _Failed(f"no answer: {exc}", again=True) from exc


def _begin(response: Any, file: BinaryIO, total: int | None) -> int | None:
    """Bring `file` to where this body starts; returns the whole file's size in bytes, None if not said."""
    if response.status == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if found and int(found[1]) == file.tell() and total in {None, int(found[2])}:
            return int(found[2])
    file.seek(0)
    file.truncate()
    if response.status == 206:
        raise _Failed("the server sent another part than the one asked for", again=True)
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() else None


def _copy(response: Any, file: BinaryIO, total: int | None, source: _Download) -> None:
    """Append the body to `file`; `_Failed` when it ends early or has another size than was published."""
    from http.client import HTTPException

    if total is not None and source.size not in {None, total}:
        raise _Failed(f"the server has {total} bytes, {source.size} were expected", again=False)
    done = file.tell()
    while total is None or done < total:
        try:
            # read1 returns what has arrived: it is kept even if the rest never comes
            chunk = response.read1(CHUNK if total is None else min(CHUNK, total - done))
        except (OSError, HTTPException) as exc:
            raise _Failed(f"the transfer broke after {done} bytes: {exc}", again=True) from exc
        if not chunk:
            break
        file.write(chunk)
        done += len(chunk)
        if source.progress is not None:
            source.progress(done, total)
    if total is not None and done < total:
        raise _Failed(f"the body ended after {done} of {total} bytes", again=True)


def _check(part: Path, size: int | None) -> None:
    """Hold the file to its size and to torch's two formats: servers send error and login pages with 200."""
    import zipfile

    found = part.stat().st_size
    if size not in {None, found}:
        raise _Failed(f"{found} bytes came, {size} were expected", again=False)
    with part.open("rb") as file:
        start = file.read(60)
    if not start.startswith((ZIP_START, LEGACY_START)):
        raise _Failed(f"not a torch file but {found} bytes that start with {start!r}", again=False)
    if start.startswith(ZIP_START) and not zipfile.is_zipfile(part):
        raise _Failed(f"a torch zip file without its end, {found} bytes", again=False)
