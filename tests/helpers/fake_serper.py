"""A local stand-in of the Serper service: `/search` and scraping, its header, credits and errors.

What it answers is decided by the query (or the address to scrape): `fault:KIND[:TIMES]` breaks the
answer in the way KIND, the first TIMES times it is asked (always, if left out). Everything else is
found. Bodies of errors are those of the service. Source: what serper.dev answered in the npm
server's own integration tests and in its documentation; their exact wording may change.
"""

from __future__ import annotations

import json
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

REDIRECT = Path(__file__).with_name("serper_redirect.cjs")
KEY = "a-key-of-the-stand-in"
LEAK = "https://huggingface.co/datasets/gaia-benchmark/GAIA"
_ERRORS = {
    "400": (400, "Missing query parameter"),
    "403": (403, "Unauthorized."),
    "429": (429, "Rate limit exceeded"),
    "500": (500, "Scraping failed."),
    "503": (503, "Service Unavailable"),
    "credits": (400, "Not enough credits"),
}


class FakeSerper:
    """State of the service."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, Any]]] = []
        """(host, body) of every request, refused ones included."""
        self.credits = 1000
        self.stopping = threading.Event()
        self.url = ""
        self._asked: Counter[str] = Counter()

    def env(self) -> dict[str, str]:
        """For the npm server's process."""
        return {"NODE_OPTIONS": f"--require={REDIRECT}", "FAKE_SERPER_URL": self.url}

    def fault(self, text: str) -> str:
        """The kind of fault that a query asks for; empty if it is answered properly."""
        name, _, rest = text.removeprefix("https://").partition(":")
        if name != "fault":
            return ""
        kind, _, times = rest.partition(":")
        self._asked[text] += 1
        return kind if not times or self._asked[text] <= int(times) else ""

    def search(self, body: dict[str, Any]) -> dict[str, Any]:
        """One page about the query, and the answer sheet of a benchmark."""
        query = body["q"]
        return {
            "searchParameters": body | {"type": "search", "engine": "google"},
            "knowledgeGraph": {"title": query, "website": LEAK, "description": "leaked"},
            "organic": [
                {"title": "The answers", "link": LEAK, "snippet": "leaked", "position": 1},
                {
                    "title": query,
                    "link": "https://en.wikipedia.org/wiki/Bell",
                    "snippet": f"All about {query}.",
                    "position": 2,
                },
            ],
            "peopleAlsoAsk": [{"question": f"What is {query}?", "link": LEAK, "snippet": "leaked"}],
            "relatedSearches": [{"query": f"{query} loud"}],
            "credits": 1,
        }

    def scrape(self, body: dict[str, Any]) -> dict[str, Any]:
        """A page's text, and its Markdown if asked for."""
        url = body["url"]
        page: dict[str, Any] = {"text": f"Words of {url}", "metadata": {"og:url": url}}
        if body.get("includeMarkdown"):
            page["markdown"] = f"# Words of {url}"
        return page | {"credits": 2}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    service: FakeSerper

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        service = self.service
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        host = self.headers["Host"]
        service.requests.append((host, body))
        is_search = (host, self.path) == ("google.serper.dev", "/search")
        if not is_search and (host, self.path) != ("scrape.serper.dev", "/"):
            self._error(404, f"no such endpoint {host}{self.path}")
        elif self.headers["X-API-KEY"] != KEY:
            self._error(403, "Unauthorized.")
        elif not body.get("q" if is_search else "url"):
            self._error(400, "Missing query parameter")
        elif kind := service.fault(body["q"] if is_search else body["url"]):
            self._break(kind)
        elif service.credits <= 0:
            self._error(*_ERRORS["credits"])
        else:
            content = service.search(body) if is_search else service.scrape(body)
            service.credits -= content["credits"]
            self._send(200, json.dumps(content).encode())

    def _break(self, kind: str) -> None:
        service = self.service
        if kind in _ERRORS:
            self._error(*_ERRORS[kind])
        elif kind == "echo":
            self._error(400, f"bad request with key {self.headers['X-API-KEY']}")
        elif kind == "hang":
            service.stopping.wait(60)
            self.close_connection = True
        elif kind == "drip":
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            try:
                while not service.stopping.wait(0.05):
                    self.wfile.write(b" ")
                    self.wfile.flush()
            except OSError:
                pass
            self.close_connection = True
        elif kind == "garbage":
            self._send(200, b"<html>captive portal</html>")
        elif kind == "reset":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif kind == "huge":
            self._send(200, json.dumps({"text": "x" * 10_000_000, "credits": 2}).encode())
        else:
            self._error(500, f"no such fault: {kind}")

    def _error(self, status: int, message: str) -> None:
        self._send(status, json.dumps({"message": message, "statusCode": status}).encode())

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that went away


@contextmanager
def fake_serper() -> Iterator[FakeSerper]:
    """The stand-in, listening on a port of its own."""
    service = FakeSerper()
    handler = type("Handler", (_Handler,), {"service": service})
    server = _Server(("127.0.0.1", 0), handler)
    service.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield service
    finally:
        service.stopping.set()
        server.shutdown()
        server.server_close()
        thread.join()
