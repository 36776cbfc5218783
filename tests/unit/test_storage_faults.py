"""Requests that fail on their way, made to fail by a proxy before the S3 server."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

from molmo2core import storage
from molmo2core.errors import PlatformError

Fault = tuple[str, Callable[["Proxy"], None]]
"""Method of the request that it strikes, and what it does instead of the answer."""


class Proxy(BaseHTTPRequestHandler):
    """Hands requests on; the first whose method is that of the next fault meets it."""

    server_version, protocol_version = "proxy", "HTTP/1.1"
    target = ""
    faults: list[Fault] = []  # noqa: RUF012  # of a subclass per test

    def answer(self, cut: float = 1.0) -> None:
        """The server's answer, its body ending early at the share `cut`."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        connection = HTTPConnection(self.target)
        connection.request(self.command, self.path, body, dict(self.headers))
        response = connection.getresponse()
        content = response.read()
        self.send_response_only(response.status)
        for name, value in response.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        length = response.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        self.wfile.write(content[: int(len(content) * cut)])
        connection.close()
        self.close_connection = cut < 1

    def handle_request(self) -> None:
        """One request."""
        if self.faults and self.faults[0][0] == self.command:
            self.faults.pop(0)[1](self)
        else:
            self.answer()

    do_GET = do_PUT = do_HEAD = do_POST = handle_request  # names of http.server

    def log_message(self, *_: object) -> None:
        """Quiet."""


def cut(request: Proxy) -> None:
    """The connection ends in the middle of the body."""
    request.answer(0.5)


def busy(request: Proxy) -> None:
    """503, as S3 says that it is asked too often."""
    request.rfile.read(int(request.headers.get("Content-Length", 0)))
    request.send_response_only(503)
    request.send_header("Content-Length", "0")
    request.end_headers()


@pytest.fixture
def faults(s3_bucket: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Fault]]:
    """Faults to come; they strike in their order."""
    coming: list[Fault] = []
    handler = type("Handler", (Proxy,), {"target": urlsplit(s3_endpoint).netloc, "faults": coming})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_address[1]}")
    storage._client.cache_clear()
    yield coming
    storage._client.cache_clear()
    server.shutdown()
    server.server_close()


def test_a_body_that_ends_early_is_read_again(s3_bucket: str, faults: list[Fault]) -> None:
    """boto3 retries requests, but not the body: one of a million media would end hours of work, or be cut."""
    content = bytes(range(256)) * 1000
    storage.write_bytes(f"{s3_bucket}/medium.jpg", content)
    faults += [("GET", cut), ("GET", cut)]
    assert storage.read_bytes(f"{s3_bucket}/medium.jpg") == content
    assert faults == []


def test_a_body_that_always_ends_early_is_a_platform_error(s3_bucket: str, faults: list[Fault]) -> None:
    """Catches a trace of urllib3, and an endless retry."""
    storage.write_bytes(f"{s3_bucket}/medium.jpg", bytes(1000))
    faults += [("GET", cut)] * 50
    with pytest.raises(PlatformError, match=r"medium\.jpg: object store"):
        storage.read_bytes(f"{s3_bucket}/medium.jpg")
    assert len(faults) == 50 - storage._TRIES


def test_a_busy_store_is_asked_again(s3_bucket: str, faults: list[Fault]) -> None:
    """Catches a client without retries: S3 answers 503 whenever a prefix is asked too often."""
    faults += [("PUT", busy), ("GET", busy), ("HEAD", busy)]
    storage.write_bytes(f"{s3_bucket}/file", b"content")
    assert storage.read_bytes(f"{s3_bucket}/file") == b"content"
    assert storage.file_sizes([f"{s3_bucket}/file"]) == [7]
    assert faults == []
