"""A hub for tests: folders laid out as its cache, and a server in its place that counts the requests."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

OLD, NEW = "0" * 39 + "1", "0" * 39 + "2"  # two commits
NOBODY = "http://127.0.0.1:9"  # an address at which no server answers


def snapshot(cache: Path, name: str, commit: str = NEW, *refs: str) -> Path:
    """The folder of a repository's commit in the cache; the branches or tags `refs` point to this commit."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    for ref in refs:
        (repository / "refs" / ref).write_text(commit)
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True)
    return folder


def use(monkeypatch: pytest.MonkeyPatch, cache: Path, endpoint: str = NOBODY) -> None:
    """Use this cache and this hub.

    Both constants are set from the environment when huggingface_hub is imported.
    """
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)


@contextmanager
def server(*known: str) -> Iterator[tuple[str, list[str]]]:
    """A hub that has these models (`me/tiny` or `me/tiny/revision/v1`), but no files.

    Its address, and its requests.
    """
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            requests.append(self.path)
            found = self.path.removeprefix("/api/models/") in known
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}", requests
        http.shutdown()
