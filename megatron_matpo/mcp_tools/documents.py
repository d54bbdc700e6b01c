"""Reads a local document collection: one JSONL file, or a folder of text files.

Standard library only. Documents come out in a fixed order (line order; folders by path), ids are
unique, and every document has a url, because that is how a model asks for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import quote

from megatron_matpo.errors import DataError

URL_BASE = "https://documents.local/"
"""Urls of documents that have none; the host does not exist, so nothing can be fetched by it."""
SUFFIXES = frozenset({".txt", ".md", ".markdown", ".html", ".htm", ".jsonl"})
_MAX_TITLE_CHARS = 200


@dataclass(frozen=True, slots=True)
class Document:
    """One page of the collection."""

    id: str
    url: str
    title: str
    text: str


def load_documents(path: str | Path) -> list[Document]:
    """All documents at `path`, a `.jsonl` file or a folder (searched recursively).

    Raises:
        DataError: nothing there, no document, an unreadable file, or a malformed line; the message
            names file and line.
    """
    root = Path(path)
    try:
        if root.is_dir():
            documents = list(_read_folder(root))
        elif root.is_file():
            documents = list(_read_jsonl(root))
        else:
            raise DataError(f"{root}: no such file or folder")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{root}: cannot be read: {error}") from error
    if not documents:
        raise DataError(f"{root}: holds no documents (looked for {', '.join(sorted(SUFFIXES))})")
    seen: set[str] = set()
    for document in documents:
        if document.id in seen:
            raise DataError(f"{root}: two documents have the id {document.id!r}")
        seen.add(document.id)
    return documents


def _read_folder(root: Path) -> Iterator[Document]:
    files = (file for file in root.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    for file in sorted(files):
        name = file.relative_to(root).as_posix()
        suffix = file.suffix.lower()
        if suffix == ".jsonl":
            yield from _read_jsonl(file, f"{name}:")
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        title = ""
        if suffix in (".html", ".htm"):
            title, text = html_to_text(text)
        elif suffix in (".md", ".markdown"):
            heading = re.search(r"^#+\s+(.+?)\s*#*$", text, re.MULTILINE)
            title = heading.group(1) if heading else ""
        yield Document(
            id=name,
            url=URL_BASE + quote(name),
            title=title[:_MAX_TITLE_CHARS] or file.stem.replace("_", " "),
            text=text.strip(),
        )


def _read_jsonl(file: Path, id_prefix: str = "") -> Iterator[Document]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _parse_line(line, f"{file}, line {number}", f"{id_prefix}{number}")


def _parse_line(line: bytes, where: str, default_id: str) -> Document:
    try:
        raw: Any = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise DataError(f'{where}: expected an object like {{"url", "title", "text"}}')
    values: dict[str, str] = {}
    for key in ("id", "url", "title", "text"):
        value = raw.get(key)
        if key == "id" and isinstance(value, int):
            value = str(value)
        if not isinstance(value, str | None):
            raise DataError(f"{where}: field {key!r} must be a string, got {type(value).__name__}")
        # Lone surrogates, which JSON can spell and crawls hold, have no UTF-8 form.
        values[key] = (value or "").encode("utf-8", "replace").decode()
    if not values["text"].strip():
        raise DataError(f"{where}: field 'text' is missing or empty")
    identity = values["id"] or default_id
    url = values["url"] or URL_BASE + quote(identity)
    title = values["title"] or values["text"].strip().splitlines()[0][:80]
    return Document(identity, url, title, values["text"])


class _TextOf(HTMLParser):
    """Visible text of a page, one line per block element."""

    _SKIPPED = frozenset({"script", "style", "noscript", "template", "svg"})
    _INLINE = frozenset(
        {"a", "abbr", "b", "bdi", "cite", "code", "em", "font", "i", "kbd", "mark", "q", "s"}
        | {"small", "span", "strong", "sub", "sup", "time", "u", "var", "wbr"}
    )

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.title: list[str] = []
        self._skip_depth = 0
        self._in_title = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in_title = tag == "title"
        if tag in self._SKIPPED:
            self._skip_depth += 1
        elif tag not in self._INLINE:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._in_title = False
        if tag in self._SKIPPED:
            self._skip_depth = max(0, self._skip_depth - 1)
        elif tag not in self._INLINE:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if self._skip_depth == 0:
            (self.title if self._in_title else self.parts).append(data)


def html_to_text(page: str) -> tuple[str, str]:
    """(title, visible text) of an HTML page; broken markup is read as far as it goes."""
    parser = _TextOf()
    parser.feed(page)
    parser.close()
    lines = (" ".join(line.split()) for line in "".join(parser.parts).splitlines())
    return " ".join("".join(parser.title).split()), "\n".join(line for line in lines if line)
