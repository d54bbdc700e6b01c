"""MCP server over a local document collection: `google_search` and `scrape`, without a network.

    python -m megatron_matpo.mcp_tools.corpus_server --documents docs.jsonl

Tool names, argument schemas and the shape of replies are those of Serper's MCP server, so that a
policy trained against one runs against the other. The protocol (JSON-RPC 2.0, one object per line)
is spoken here directly: importing the SDK would take ten times as long as everything else. The loop
is synchronous, as each call takes well under a millisecond. It ends when stdin ends.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

from megatron_matpo.errors import DataError
from megatron_matpo.mcp_tools.corpus import Corpus

DESCRIPTION = "MCP server over a local document collection: google_search and scrape."
NAME = "megatron_matpo corpus"
PROTOCOL_VERSIONS = ("2025-11-25", "2025-06-18", "2025-03-26", "2024-11-05")
DEFAULT_NUM_RESULTS = 10

PARSE_ERROR, INVALID_REQUEST, METHOD_NOT_FOUND, INVALID_PARAMS = -32700, -32600, -32601, -32602


def _argument(kind: str, description: str, **more: Any) -> dict[str, Any]:
    return {"type": kind, "description": description, **more}


TOOLS: list[dict[str, Any]] = [
    {
        "name": "google_search",
        "description": "Search the web. Returns titles, links and snippets of the best pages.",
        "inputSchema": {
            "type": "object",
            "properties": {
                "q": _argument("string", "What to search for"),
                "gl": _argument("string", "Region code, ISO 3166-1 alpha-2 (e.g., 'us')"),
                "hl": _argument("string", "Language code, ISO 639-1 (e.g., 'en')"),
                "location": _argument("string", "Place to search from (e.g., 'Paris, France')"),
                "num": _argument("number", "How many results to return (default: 10)"),
                "tbs": _argument("string", "Time filter: 'qdr:h', 'qdr:d', 'qdr:w', ..."),
                "page": _argument("number", "Which page of results to return (default: 1)"),
                "autocorrect": _argument("boolean", "Whether to correct the spelling of q"),
            },
            "required": ["q", "gl", "hl"],
        },
    },
    {
        "name": "scrape",
        "description": "Read a web page. Returns its text and, if asked for, its markdown.",
        "inputSchema": {
            "type": "object",
            "properties": {
                "url": _argument("string", "Address of the page"),
                "includeMarkdown": _argument(
                    "boolean", "Whether to return markdown as well", default=False
                ),
            },
            "required": ["url"],
        },
    },
]


class ArgumentError(ValueError):
    """The model's arguments cannot be used; the message is for the model."""


class ProtocolError(ValueError):
    """A JSON-RPC error reply."""

    def __init__(self, code: int, message: str) -> None:
        """`code` is one of the JSON-RPC codes above."""
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Limits:
    """Caps on replies."""

    max_results: int
    snippet_chars: int
    text_chars: int


class CorpusTools:
    """The two tools, as functions of their arguments."""

    def __init__(self, corpus: Corpus, limits: Limits) -> None:
        """Tools over `corpus`, with replies capped by `limits`."""
        self._corpus = corpus
        self._limits = limits
        self._tools: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "google_search": self.google_search,
            "scrape": self.scrape,
        }

    def call(self, name: str, arguments: dict[str, Any]) -> tuple[str, bool]:
        """(text, is_error) of a call.

        Raises:
            ProtocolError: no such tool.
        """
        tool = self._tools.get(name)
        if tool is None:
            known = ", ".join(self._tools)
            raise ProtocolError(INVALID_PARAMS, f"Unknown tool {name!r}; there are: {known}")
        try:
            return json.dumps(tool(arguments), ensure_ascii=False, separators=(",", ":")), False
        except ArgumentError as error:
            return f"Error: {error}", True

    def google_search(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Serper's search reply: `searchParameters` and `organic`."""
        query = _text(arguments, "q")
        region, language = _text(arguments, "gl"), _text(arguments, "hl")
        num = _positive(arguments, "num", min(DEFAULT_NUM_RESULTS, self._limits.max_results))
        num = min(num, self._limits.max_results)
        page = _positive(arguments, "page", 1)
        first = (page - 1) * num
        hits = self._corpus.search(query, num, first, self._limits.snippet_chars)
        return {
            "searchParameters": {
                "q": query,
                "gl": region,
                "hl": language,
                "type": "search",
                "num": num,
                "page": page,
            },
            "organic": [
                {"title": hit.title, "link": hit.url, "snippet": hit.snippet, "position": position}
                for position, hit in enumerate(hits, first + 1)
            ],
        }

    def scrape(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Serper's page reply: `text`, `metadata` and, if asked for, `markdown`."""
        url = _text(arguments, "url")
        pages = self._corpus.lookup(url)
        if not pages:
            raise ArgumentError(
                f"no page has the url {url!r}. Use a link from the results of google_search, "
                "exactly as it is written there."
            )
        text = "\n\n".join(page.text for page in pages)
        limit = self._limits.text_chars
        if len(text) > limit:
            text = f"{text[:limit]}\n[... cut: {limit} of {len(text)} characters shown]"
        reply: dict[str, Any] = {"text": text}
        if arguments.get("includeMarkdown") is True:
            reply["markdown"] = f"# {pages[0].title}\n\n{text}"
        return reply | {"metadata": {"title": pages[0].title, "url": pages[0].url}}


def _text(arguments: dict[str, Any], name: str) -> str:
    value = arguments.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ArgumentError(f"argument {name!r} is required and must be a non-empty string")
    return value


def _positive(arguments: dict[str, Any], name: str, default: int) -> int:
    value = arguments.get(name)
    if value is None:
        return default
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = 0
    if not 0 < number < 2**31:
        raise ArgumentError(f"argument {name!r} must be a positive number, got {value!r}")
    return number


def _handle(tools: CorpusTools, method: str, params: dict[str, Any]) -> dict[str, Any]:
    if method == "tools/call":
        name, arguments = params.get("name"), params.get("arguments") or {}
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise ProtocolError(INVALID_PARAMS, "tools/call needs a name and an arguments object")
        text, is_error = tools.call(name, arguments)
        return {"content": [{"type": "text", "text": text}], "isError": is_error}
    if method == "tools/list":
        return {"tools": TOOLS}
    if method == "initialize":
        asked = params.get("protocolVersion")
        return {
            "protocolVersion": asked if asked in PROTOCOL_VERSIONS else PROTOCOL_VERSIONS[0],
            "capabilities": {"tools": {}},
            "serverInfo": {"name": NAME, "version": "1"},
        }
    if method == "ping":
        return {}
    raise ProtocolError(METHOD_NOT_FOUND, f"Method not found: {method}")


def answer(tools: CorpusTools, line: bytes) -> dict[str, Any] | None:
    """The reply to one line of input; None for notifications and for replies."""
    try:
        message: Any = json.loads(line)
    except ValueError as error:
        return _error(None, PARSE_ERROR, f"Parse error: {error}")
    if not isinstance(message, dict):
        return _error(None, INVALID_REQUEST, "Expected one JSON-RPC object per line")
    method, params, identity = message.get("method"), message.get("params"), message.get("id")
    if identity is None or "method" not in message:
        return None
    if not isinstance(method, str) or not isinstance(params, dict | None):
        return _error(identity, INVALID_REQUEST, "Invalid request")
    try:
        return {"jsonrpc": "2.0", "id": identity, "result": _handle(tools, method, params or {})}
    except ProtocolError as error:
        return _error(identity, error.code, str(error))


def _error(identity: Any, code: int, message: str) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": identity, "error": {"code": code, "message": message}}


def serve(tools: CorpusTools, source: BinaryIO, sink: BinaryIO) -> None:
    """Answer each line of `source` until it ends or nobody reads `sink`."""
    for line in source:
        if not line.strip():
            continue
        reply = answer(tools, line)
        if reply is not None:
            try:
                sink.write(json.dumps(reply, separators=(",", ":")).encode() + b"\n")
                sink.flush()
            except BrokenPipeError:
                return


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code (2: the collection cannot be used)."""
    parser = argparse.ArgumentParser(prog="corpus_server", description=DESCRIPTION)
    parser.add_argument(
        "--documents",
        required=True,
        help='JSONL file with {"id", "url", "title", "text"} per line, or a folder of '
        ".txt, .md, .html and .jsonl files",
    )
    parser.add_argument("--max-results", type=_positive_int, default=DEFAULT_NUM_RESULTS)
    parser.add_argument("--snippet-chars", type=_positive_int, default=300)
    parser.add_argument("--text-chars", type=_positive_int, default=20_000)
    parser.add_argument("--cache", help="keep the index in this file, for large collections")
    options = parser.parse_args(argv)
    try:
        corpus = Corpus.open(options.documents, options.cache)
    except DataError as error:
        print(f"corpus_server: {error}", file=sys.stderr)
        return 2
    print(f"corpus_server: {corpus.num_documents} documents", file=sys.stderr)
    limits = Limits(options.max_results, options.snippet_chars, options.text_chars)
    try:
        serve(CorpusTools(corpus, limits), sys.stdin.buffer, sys.stdout.buffer)
    except KeyboardInterrupt:
        return 130
    finally:
        corpus.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
