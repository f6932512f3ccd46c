"""The search for weights and their download, against a real HTTP server on this machine's loopback."""

import errno
import hashlib
import io
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from facenet_pytorch.models import inception_resnet_v1

from batchverify.embedding.download import (
    PUBLISHED,
    Published,
    fetch_weights,
    find_weights,
    locate_weights,
    torch_hub_folder,
)
from batchverify.errors import ArtifactError, DownloadError, UsageError

VGGFACE2, CASIA = PUBLISHED["vggface2-float"], PUBLISHED["casia-webface"]
HALF = 1_500_000
HTML = b"<!DOCTYPE html><html><title>Hotel WLAN</title></html>"


class Answer(BaseHTTPRequestHandler):
    """Answers each request with the next step of the site's script, or with the whole file."""

    protocol_version = "HTTP/1.1"
    server: "Site"

    def do_GET(self) -> None:
        self.close_connection = True
        self.server.asked.append((self.path, self.headers.get("Range")))
        step = self.server.script.pop(0) if self.server.script else send()
        step(self)

    def start(self, code: int, **headers: object) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """pytest's output is no place for an access log."""


class Site(ThreadingHTTPServer):
    """A web site with one file, `body`; `asked` holds the path and Range header of every request."""

    daemon_threads = True

    def __init__(self, body: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.body = body
        self.script: list[Callable[[Answer], None]] = []
        self.asked: list[tuple[str, str | None]] = []
        self.closing = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.published = Published("toy-float", f"{self.url}/toy.pt")

    def fetch(self, folder: Path, **options: Any) -> Path:
        # a short timeout, since the pause between two tries is a share of it
        return fetch_weights(self.published, folder=folder, **{"timeout": 2, **options})


def send(stop=None, ending="close", *, length=None, ranges=True, content_range=None, tag='"v1"'):
    """The file as a web server sends it; after `stop` bytes the connection is closed, reset or stalls.

    Tag v0 is an older file of the same size.
    """

    def step(answer: Answer) -> None:
        body = answer.server.body if tag == '"v1"' else bytes(len(answer.server.body))
        wanted = answer.headers.get("Range") if ranges else None
        if wanted and answer.headers.get("If-Range", tag) == tag:
            start = int(wanted[len("bytes=") : -1])
            part = content_range or f"bytes {start}-{len(body) - 1}/{len(body)}"
            answer.start(206, ETag=tag, Content_Length=len(body) - start, Content_Range=part)
        else:
            start = 0
            answer.start(200, ETag=tag, Content_Length=len(body) if length is None else length)
        answer.wfile.write(body[start : len(body) if stop is None else start + stop])
        if ending == "stall":
            answer.server.closing.wait(5)
        if ending == "reset":
            answer.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            socket.close(answer.connection.detach())

    return step


def chunked(answer: Answer, ends: bool = True) -> None:
    """The file in two chunks without a Content-Length; with `ends` false only the first one."""
    answer.start(200, Transfer_Encoding="chunked")
    body = answer.server.body
    for part in (body[:HALF], body[HALF:], b"") if ends else (body[:HALF],):
        answer.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))


def status(code: int, **headers: str) -> Callable[[Answer], None]:
    return lambda answer: answer.start(code, Content_Length=0, **headers)


def silence(answer: Answer) -> None:
    answer.server.closing.wait(5)


@pytest.fixture(autouse=True)
def _settings(monkeypatch, tmp_path):
    for name in ("BATCHVERIFY_WEIGHTS", "BATCHVERIFY_WEIGHTS_URL", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def site():
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:  # as torch writes them: stored, not compressed
        archive.writestr("toy/data/0", os.urandom(2 * HALF))
    with Site(memory.getvalue()) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.closing.set()
        server.shutdown()
        thread.join()


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"weights")
    return path


def test_the_published_addresses_are_those_of_facenet_pytorch():
    assert [VGGFACE2.file_name, CASIA.file_name] == [
        "20180402-114759-vggface2.pt",
        "20180408-102900-casia-webface.pt",
    ]
    source = Path(inception_resnet_v1.__file__).read_text()
    assert VGGFACE2.url in source and CASIA.url in source


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"TORCH_HOME": "/t", "XDG_CACHE_HOME": "/x"}, "/t"),
        ({"TORCH_HOME": "~/t"}, "/home/someone/t"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/torch"),
        ({}, "/home/someone/.cache/torch"),
    ],
)
def test_the_cache_is_the_one_that_facenet_pytorch_uses(monkeypatch, variables, expected):
    monkeypatch.delenv("TORCH_HOME")
    for name, value in {"HOME": "/home/someone", **variables}.items():
        monkeypatch.setenv(name, value)
    assert torch_hub_folder() == Path(expected) / "checkpoints"
    assert inception_resnet_v1.get_torch_home() == expected


def test_search_order(monkeypatch, tmp_path):
    assert find_weights(VGGFACE2) is None
    cached = put(torch_hub_folder() / VGGFACE2.file_name)
    assert (find_weights(VGGFACE2), find_weights(CASIA)) == (cached, None)

    inside = put(tmp_path / "folder" / VGGFACE2.file_name)
    monkeypatch.setenv("BATCHVERIFY_WEIGHTS", str(inside.parent))
    assert find_weights(VGGFACE2) == inside
    cached = put(torch_hub_folder() / CASIA.file_name)
    assert find_weights(CASIA) == cached, "a folder without the file lets the search go on"

    own = put(tmp_path / "own.pt")
    monkeypatch.setenv("BATCHVERIFY_WEIGHTS", str(own))
    assert find_weights(VGGFACE2) == find_weights(CASIA) == own, "a file is taken as it is"

    named = put(tmp_path / "named" / CASIA.file_name)
    assert find_weights(CASIA, named) == find_weights(CASIA, named.parent) == named
    with pytest.raises(ArtifactError, match=f"--weights {named.parent}: no file {VGGFACE2.file_name} in this"):
        find_weights(VGGFACE2, named.parent)  # --weights never falls through


def test_an_empty_variable_counts_as_not_set(monkeypatch, tmp_path):
    for name, value in {"HOME": str(tmp_path), "TORCH_HOME": "", "BATCHVERIFY_WEIGHTS": ""}.items():
        monkeypatch.setenv(name, value)
    assert torch_hub_folder() == tmp_path / ".cache" / "torch" / "checkpoints"
    assert find_weights(VGGFACE2) is None


def test_without_a_home_folder_nothing_is_there(monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_123)
    for name in ("HOME", "XDG_CACHE_HOME", "TORCH_HOME", "BATCHVERIFY_WEIGHTS"):
        monkeypatch.delenv(name, raising=False)
    assert find_weights(VGGFACE2) is None
    with pytest.raises(ArtifactError, match=r"torch's cache, TORCH_HOME ~/\.cache/torch: no such home folder"):
        locate_weights(VGGFACE2)


def test_a_home_folder_is_understood(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("BATCHVERIFY_WEIGHTS", "~/own.pt")
    own = put(tmp_path / "own.pt")
    assert find_weights(VGGFACE2) == find_weights(VGGFACE2, Path("~/own.pt")) == own


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("/nowhere/w.pt", "{} /nowhere/w.pt: no such file or folder"),
        ("/dev/null", "{} /dev/null: no such file or folder"),
        ("~nobody-of-this-name/w.pt", "{} ~nobody-of-this-name/w.pt: no such home folder"),
        (
            "/" + 300 * "x",
            f"vggface2-float: cannot look for {VGGFACE2.file_name}: [Errno {errno.ENAMETOOLONG}]",
        ),
    ],
)
def test_what_is_named_must_be_there(monkeypatch, weights, message):
    put(torch_hub_folder() / VGGFACE2.file_name)
    with pytest.raises(ArtifactError) as caught:
        locate_weights(VGGFACE2, Path(weights))
    assert str(caught.value).startswith(message.format("--weights"))
    monkeypatch.setenv("BATCHVERIFY_WEIGHTS", weights)
    with pytest.raises(ArtifactError) as caught:
        locate_weights(VGGFACE2)
    assert str(caught.value).startswith(message.format("BATCHVERIFY_WEIGHTS"))


def test_a_file_is_downloaded_once(site):
    path = locate_weights(site.published)
    assert path == torch_hub_folder() / "toy.pt" and path.read_bytes() == site.body
    assert path == locate_weights(site.published) == fetch_weights(site.published)
    assert len(site.asked) == 1


@pytest.mark.parametrize(("first", "total"), [(send(), True), (chunked, False)])
def test_progress_reaches_the_total(site, tmp_path, first, total):
    site.script, seen = [first], []
    path = site.fetch(tmp_path / "new", progress=lambda *now: seen.append(now))
    done = [now for now, _ in seen]
    assert len(done) >= 3 and done == sorted(set(done)) and done[-1] == len(site.body)
    assert {total for _, total in seen} == {len(site.body) if total else None}
    assert path.read_bytes() == site.body and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("zipped", [True, False])
def test_both_of_torchs_formats_are_accepted(site, tmp_path, zipped):
    memory = io.BytesIO()
    torch.save({"a": torch.ones(3)}, memory, _use_new_zipfile_serialization=zipped)
    site.body = memory.getvalue()
    assert torch.equal(torch.load(site.fetch(tmp_path), weights_only=True)["a"], torch.ones(3))


@pytest.mark.parametrize(
    ("script", "asked"),
    [
        ([send(HALF), send(1000)], [0, HALF, HALF + 1000]),
        ([send(1000, "stall")], [0, 1000]),
        ([send(5000), send(ranges=False)], [0, 5000]),
        ([send(5000), send(content_range="bytes 0-99/100")], [0, 5000, 0]),
        ([send(5000), send(content_range="bytes 5000-9999/10000")], [0, 5000, 0]),
        ([send(5000), send(content_range="bytes 5000-9999/*")], [0, 5000, 0]),
        ([send(5000, tag='"v0"')], [0, 5000]),  # replaced in between: If-Range keeps the two apart
        ([lambda answer: chunked(answer, ends=False)], [0, HALF]),
        ([status(503), status(429)], [0, 0, 0]),
        # releases lie behind a redirect
        ([status(302, Location="/x"), send(5000), status(302, Location="/x")], [0, 0, 5000, 5000]),
    ],
)
def test_a_broken_download_is_tried_again(site, tmp_path, script, asked):
    site.script = list(script)
    assert site.fetch(tmp_path, timeout=0.5).read_bytes() == site.body
    assert [wanted for _, wanted in site.asked] == [f"bytes={start}-" if start else None for start in asked]


def test_a_reset_connection_is_resumed(site, tmp_path):
    site.script = [send(HALF, "reset")]
    assert site.fetch(tmp_path).read_bytes() == site.body
    assert len(site.asked) == 2  # where it goes on is chance: a reset throws away what was not read yet


def test_nothing_is_left_of_a_longer_file_that_broke_off(site, tmp_path):
    def longer(answer: Answer) -> None:
        answer.start(200, ETag='"v0"', Content_Length=9 * HALF)
        answer.wfile.write(bytes(4 * HALF))

    site.script = [longer]
    assert site.fetch(tmp_path).read_bytes() == site.body


def test_two_processes_at_once(site, tmp_path):
    both = threading.Barrier(2, timeout=10)
    site.script = [lambda answer: (both.wait(), send()(answer))] * 2
    code = "import sys, pathlib, batchverify.embedding.download as d; url, folder = sys.argv[1:]; "
    code += "print(d.fetch_weights(d.Published('toy', url), folder=pathlib.Path(folder)))"
    command = [sys.executable, "-c", code, site.published.url, str(tmp_path)]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [run.communicate(timeout=10)[0].strip() for run in runs] == [str(tmp_path / "toy.pt")] * 2
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [site.body] and len(site.asked) == 2


def test_interrupted_by_the_user_leaves_nothing(site, tmp_path):
    def stop(*_: object) -> None:
        assert len(list(tmp_path.iterdir())) == 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        site.fetch(tmp_path, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_offline_says_everything_without_a_pause(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("a pause"))
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/toy.pt"
    with pytest.raises(DownloadError) as caught:
        fetch_weights(Published("toy-float", url), folder=tmp_path, timeout=200)
    assert str(caught.value) == (
        f"toy-float: download failed: not reachable: [Errno {errno.ECONNREFUSED}] Connection refused. "
        f"Get toy.pt from {url} in another way and give it with --weights FILE, "
        f"set BATCHVERIFY_WEIGHTS to the file or its folder, or put it into {tmp_path}. "
        "Or use --backbone vggface2, which is in the package and needs no download"
    )


@pytest.mark.parametrize(
    ("script", "reason", "requests"),
    [
        ([send(1000), send(0), send(500)], "the body ended after 1500 of {size} bytes", 3),
        ([send(length=5_000_000, ranges=False)] * 3, "the body ended after {size} of 5000000 bytes", 3),
        ([send(length=5000)], "a torch zip file without its end, 5000 bytes", 1),
        ([send(length=0)], "not a torch file but 0 bytes that start with b''", 1),
        ([status(404)], "the server answered 404 Not Found", 1),
        ([status(503)] * 3, "the server answered 503 Service Unavailable", 3),
        ([silence] * 3, "no answer: timed out", 3),
        ([send(7, "stall", ranges=False)] * 3, "the transfer broke after 7 bytes: timed out", 3),
        ([lambda answer: None] * 3, "no answer: Remote end closed connection without response", 3),
    ],
)
def test_a_failed_download_is_explained_and_leaves_nothing(site, tmp_path, script, reason, requests):
    site.script = list(script)
    with pytest.raises(DownloadError) as caught:
        site.fetch(tmp_path, timeout=0.5)
    assert str(caught.value).startswith(f"toy-float: download failed: {reason.format(size=len(site.body))}. Get")
    assert list(tmp_path.iterdir()) == [] and len(site.asked) == requests


def test_a_login_page_is_not_weights(site, tmp_path):
    site.body = HTML
    with pytest.raises(DownloadError, match="not a torch file but 53 bytes that start with b'<!DOCTYPE html><ht"):
        site.fetch(tmp_path)
    assert list(tmp_path.iterdir()) == [] and len(site.asked) == 1


@pytest.mark.parametrize(("folder", "error"), [("file/sub", errno.ENOTDIR), ("taken", errno.EISDIR)])
def test_a_folder_that_cannot_hold_the_file(site, tmp_path, folder, error):
    put(tmp_path / "file")
    (tmp_path / "taken" / "toy.pt").mkdir(parents=True)
    with pytest.raises(DownloadError, match=f"cannot store {tmp_path / folder}/toy.pt: {os.strerror(error)}"):
        site.fetch(tmp_path / folder)
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["toy.pt"]


def known(published: Published, site: Site) -> Published:
    """The published file, if it were that of the site."""
    return replace(published, sha256=hashlib.sha256(site.body).hexdigest())


@pytest.mark.parametrize("published", [VGGFACE2, CASIA])
def test_other_bytes_than_the_published_ones_are_refused(site, monkeypatch, published):
    monkeypatch.setenv("BATCHVERIFY_WEIGHTS_URL", site.url)
    sent = hashlib.sha256(site.body).hexdigest()
    message = f"another file than the published one: SHA-256 {sent}, not {published.sha256}"
    with pytest.raises(DownloadError, match=message):
        locate_weights(published)
    assert len(published.sha256) == 64
    assert list(torch_hub_folder().iterdir()) == []


def test_a_mirror_is_asked_instead(site, monkeypatch):
    monkeypatch.setenv("BATCHVERIFY_WEIGHTS_URL", f"{site.url}/mirror/")
    assert locate_weights(known(VGGFACE2, site)).read_bytes() == site.body
    assert site.asked == [(f"/mirror/{VGGFACE2.file_name}", None)]
    site.script = [status(404)]
    with pytest.raises(DownloadError) as caught:
        locate_weights(CASIA)
    assert f"from {site.url}/mirror/{CASIA.file_name} (the mirror of BATCHVERIFY_WEIGHTS_URL)" in str(caught.value)


def test_a_mirror_may_be_a_folder(monkeypatch, tmp_path, site):
    mirror = tmp_path / "a mirror" / VGGFACE2.file_name
    put(mirror).write_bytes(site.body)
    monkeypatch.setenv("BATCHVERIFY_WEIGHTS_URL", mirror.parent.as_uri())
    assert locate_weights(known(VGGFACE2, site)).read_bytes() == site.body
    with pytest.raises(DownloadError, match=r"casia-webface: download failed: not reachable: .*No such file"):
        locate_weights(CASIA)


@pytest.mark.parametrize("rest", ["", "me:secret@host", "host/?token=secret", "host/a b", "höst"])
@pytest.mark.parametrize("scheme", ["https://", "file://"])
def test_a_bad_mirror(monkeypatch, scheme, rest):
    monkeypatch.setenv("BATCHVERIFY_WEIGHTS_URL", scheme + rest)
    with pytest.raises(UsageError, match="BATCHVERIFY_WEIGHTS_URL: must be the http://, https:// or") as caught:
        locate_weights(VGGFACE2)
    assert "secret" not in str(caught.value) and not torch_hub_folder().exists()


@pytest.mark.parametrize("address", ["ftp://host/folder", "host/folder", "/folder"])
def test_a_mirror_of_another_kind(monkeypatch, address):
    monkeypatch.setenv("BATCHVERIFY_WEIGHTS_URL", address)
    with pytest.raises(UsageError, match="BATCHVERIFY_WEIGHTS_URL: must be the http://, https:// or file://"):
        locate_weights(VGGFACE2)


def test_importing_is_cheap():
    code = "import sys, batchverify.embedding.download; "
    code += "print({'torch', 'numpy', 'urllib.request'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
