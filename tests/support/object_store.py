"""A real S3 API on this machine, and before it a proxy that answers late, wrongly, half or not at all."""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from s3_server import s3_client, s3_options, s3_server

from batchverify.storage.object_store import Patience, set_patience

ERROR = "<?xml version='1.0' encoding='UTF-8'?><Error><Code>{}</Code><Message>{}</Message></Error>"
_RANDOM = re.compile(r"uploadId=[^&]*|\d{20}-\w+-[0-9a-f]{8}|[0-9a-f]{8,}")
HOP = ("content-length", "connection", "transfer-encoding", "expect")
ANSWERS = {
    "500": (500, "InternalError", "We encountered an internal error. Please try again."),
    "503": (503, "SlowDown", "Please reduce your request rate."),
    "403": (403, "AccessDenied", "Access Denied"),
}


@dataclass
class Weather:
    """What the proxy does. latency and slow: seconds. faults: kind to share of requests.

    Kinds: 500, 503, 403, reset (of the connection), cut (half of the body), slow (an answer after `slow`). The fate
    of a request follows from the seed, the request and how often it came: the same in every run.
    first: what befalls every request when it comes for the first time. poisoned: kinds by a part of the path, for
    every request of it. crowd: the first requests are answered once so many are there at the same time, or after 5 s;
    `at_once` is how many there were.
    """

    latency: float = 0.0
    slow: float = 20.0
    faults: dict[str, float] = field(default_factory=dict)
    first: str = ""
    poisoned: dict[str, str] = field(default_factory=dict)
    seed: int = 0
    done: Counter[str] = field(default_factory=Counter)
    came: Counter[str] = field(default_factory=Counter)
    connections: int = 0
    crowd: int = 0
    at_once: int = 0
    _gathered: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def gather(self) -> None:
        """Wait until the crowd is there, or has been there once, or does not come."""
        if self._gathered.is_set():
            return
        with self._lock:
            self.at_once += 1
        if self.at_once >= self.crowd or not self._gathered.wait(5):
            self._gathered.set()

    def fate(self, request: str) -> str:
        """The kind of fault that befalls a request; empty for none."""
        # Names of temporary objects and segments hold times and random parts: their fate must not.
        request = _RANDOM.sub("*", request)
        self.came[request] += 1
        for part, kind in self.poisoned.items():
            if part in request:
                return kind
        if self.first and self.came[request] == 1:
            return self.first
        drawn = blake2b(f"{self.seed} {self.came[request]} {request}".encode(), digest_size=4).digest()
        at = struct.unpack("I", drawn)[0] / 2**32
        for kind, share in self.faults.items():
            if at < share:
                return kind
            at -= share
        return ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Proxy

    def setup(self) -> None:
        super().setup()
        self.server.weather.connections += 1
        self.behind = HTTPConnection(*self.server.behind)

    def finish(self) -> None:
        self.behind.close()
        super().finish()

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, HTTPException):
            self.close_connection = True

    def answer(self) -> None:
        weather = self.server.weather
        body = self._body()
        fate = weather.fate(f"{self.command} {self.path} {self.headers.get('Range', '')}")
        weather.done[fate or self.command] += 1
        weather.gather()
        time.sleep(weather.slow if fate == "slow" else weather.latency)
        if fate == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            raise ConnectionResetError
        if fate in ANSWERS:
            status, code, text = ANSWERS[fate]
            self._send(status, {"Content-Type": "application/xml"}, ERROR.format(code, text).encode())
            return
        headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP}
        self.behind.request(self.command, self.path, body, headers)
        answer = self.behind.getresponse()
        self._send(answer.status, dict(answer.getheaders()), answer.read(), cut=fate == "cut")

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer  # noqa: N815 - http.server's names

    def _body(self) -> bytes:
        if self.headers.get("Expect") == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(pieces)

    def _send(self, status: int, headers: dict[str, str], body: bytes, *, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in HOP:
                self.send_header(name, value)
        length = next((v for k, v in headers.items() if k.lower() == "content-length"), str(len(body)))
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.close_connection = True

    def handle_expect_100(self) -> bool:
        return True

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Proxy(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, behind: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind, self.weather = behind, Weather()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news."""


@dataclass
class Store:
    """direct: HOST:PORT of the S3 API itself. address: HOST:PORT of the proxy."""

    direct: str
    address: str
    proxy: _Proxy

    def weather(self, **settings: object) -> Weather:
        """Other weather from now on; without settings a fine day."""
        self.proxy.weather = Weather(**settings)  # type: ignore[arg-type]
        return self.proxy.weather

    def client(self) -> Any:
        """A client that talks to the S3 API itself, whatever the weather."""
        return s3_client(self.direct)

    def options(self, address: str = "") -> str:
        """The options of a URI that lead through the proxy."""
        return s3_options(address or self.address)


@contextmanager
def impatience(**changes: float) -> Iterator[None]:
    """Stores are given up sooner: with changes of `Patience`, and short pauses."""
    set_patience(Patience(pauses=(0.1,), **changes))  # type: ignore[arg-type]
    try:
        yield
    finally:
        set_patience(Patience())


@contextmanager
def object_store() -> Iterator[Store]:
    """An S3 server and its proxy; see `s3_server`."""
    with s3_server() as address:
        host, _, port = address.rpartition(":")
        proxy = _Proxy((host, int(port)))
        thread = threading.Thread(target=proxy.serve_forever, daemon=True)
        thread.start()
        yield Store(address, f"127.0.0.1:{proxy.server_address[1]}", proxy)
        proxy.shutdown()
        proxy.server_close()
