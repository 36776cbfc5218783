"""A server of as much of the Hugging Face hub's protocol as reading models takes, for tests without a network."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

COMMIT = "c0ffee" + "0" * 34


@contextmanager
def local_hub(repositories: Mapping[str, Path], revisions: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
    """Serve folders as repositories, each with the given revisions, all of one commit.

    Yields:
        The address for `HF_ENDPOINT`, and a list that receives the name of each file that is read.
    """
    asked: list[str] = []
    facts = {"repositories": repositories, "revisions": (*revisions, COMMIT), "asked": asked}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), facts))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    repositories: Mapping[str, Path]
    revisions: tuple[str, ...]
    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0].strip("/")
        found = self._content(path, with_body)
        content = found if isinstance(found, bytes) else b""
        self.send_response(200 if isinstance(found, bytes) else 404)
        if isinstance(found, str):
            self.send_header("X-Error-Code", found)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{path.rpartition("/")[2]}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def _content(self, path: str, with_body: bool) -> bytes | str:
        """What is there, or the hub's code for why not."""
        name = next((name for name in self.repositories if f"{name}/" in f"{path}/"), None)
        if name is None:
            return "RepoNotFound"
        folder = self.repositories[name]
        verb, _, rest = path.partition(name)[2].strip("/").partition("/")
        revision, _, file = rest.partition("/")
        if verb and revision not in self.revisions:
            return "RevisionNotFound"
        names = sorted(entry.name for entry in folder.iterdir())
        if verb == "tree":
            return json.dumps([{"type": "file", "path": n, "size": 1, "oid": "0" * 40} for n in names]).encode()
        if verb != "resolve":
            return json.dumps({"id": name, "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}).encode()
        if file not in names:
            return "EntryNotFound"
        if with_body:
            self.asked.append(file)
        return (folder / file).read_bytes()
