"""Full-text search over a document collection, in SQLite FTS5; deterministic.

Any text is a legal query: its words become quoted FTS5 terms, joined by OR and ranked by bm25, so
no operator of the query language reaches SQLite. Equal ranks are ordered by document id.
"""

from __future__ import annotations

import hashlib
import os
import re
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

from megatron_matpo.errors import DataError
from megatron_matpo.mcp_tools.documents import Document, load_documents

MAX_QUERY_TERMS = 64
_TITLE_WEIGHT = 2.0
_SNIPPET_SCAN_CHARS = 200_000
_SCHEMA_VERSION = 1

_OPERATOR = re.compile(
    r"\b(?:site|filetype|ext|inurl|allinurl|intitle|allintitle|intext|before|after|related|cache"
    r"|link|source):\S+",
    re.IGNORECASE,
)
_EXCLUDED = re.compile(r"(?:^|(?<=\s))-\S+")
_WORD = re.compile(r"[^\W_]+")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
_STOP_TEXT = (
    "a an and are as at be by did do does for from had has have how in is it its of on or that the"
    " this to was were what when where which who whom whose why will with"
)
_STOP_WORDS = frozenset(_STOP_TEXT.split())


@dataclass(frozen=True, slots=True)
class Hit:
    """One search result."""

    title: str
    url: str
    snippet: str


def query_terms(query: str) -> list[str]:
    """Words of a query, lower case, each once.

    Search operators are left out, and stop words too unless there is nothing else.
    """
    plain = _EXCLUDED.sub(" ", _OPERATOR.sub(" ", query)) if query.strip() else ""
    words = list(dict.fromkeys(word.lower() for word in _WORD.findall(plain)))
    telling = [word for word in words if word not in _STOP_WORDS]
    return (telling or words)[:MAX_QUERY_TERMS]


def normalise_url(url: str) -> str:
    """The form under which urls are compared: no scheme, `www.`, fragment or trailing slash."""
    text = url.strip().encode("utf-8", "replace").decode()  # lone surrogates: SQLite takes none
    try:
        parts = urlsplit(text if "//" in text else f"//{text}")
    except ValueError:  # such as a bracket that opens an IPv6 address and never closes
        return text
    host = (parts.netloc or "").lower().removeprefix("www.")
    path = unquote(parts.path).rstrip("/")
    return host + path + (f"?{parts.query}" if parts.query else "")


def best_snippet(text: str, terms: Sequence[str], max_chars: int) -> str:
    """The sentence or line that has most of `terms` (the first of equals), at most `max_chars`."""
    scanned = text[:_SNIPPET_SCAN_CHARS]
    lowered = scanned.lower()
    if len(lowered) != len(scanned):  # a letter like U+0130 grew: offsets would not fit
        lowered = scanned
    found: dict[tuple[int, int], set[int]] = {}
    for number, term in enumerate(terms):
        for position in _starts(lowered, _stem(term)):
            found.setdefault(_sentence_at(scanned, position), set()).add(number)
    begin, end = min(
        found, key=lambda bounds: (-len(found[bounds]), bounds), default=_first_line(scanned)
    )
    sentence = " ".join(scanned[begin:end].split())
    if len(sentence) <= max_chars:
        return sentence
    folded = sentence.lower()
    first = min((at for term in terms for at in _starts(folded, _stem(term))), default=0)
    start = max(0, min(first - max_chars // 4, len(sentence) - max_chars))
    cut = sentence[start : start + max_chars].strip()
    return ("... " if start else "") + cut + (" ..." if start + max_chars < len(sentence) else "")


def _stem(term: str) -> str:
    """A crude stem, good enough to find `painted` by `paint` in a snippet."""
    return re.sub(r"(?:ing|ed|es|s)$", "", term) if len(term) > 4 else term


def _starts(text: str, stem: str) -> Iterator[int]:
    """Where words that begin with `stem` begin; `str.find` is many times faster than a regex."""
    at = text.find(stem)
    while at >= 0:
        if at == 0 or not text[at - 1].isalnum():
            yield at
        at = text.find(stem, at + len(stem))


def _first_line(text: str) -> tuple[int, int]:
    return _sentence_at(text, len(text) - len(text.lstrip()))


def _sentence_at(text: str, position: int) -> tuple[int, int]:
    """(begin, end) of the sentence or line around `position`."""
    begin = text.rfind("\n", 0, position) + 1
    for mark in (". ", "! ", "? "):
        at = text.rfind(mark, begin, position)
        begin = at + len(mark) if at >= 0 else begin
    end = _SENTENCE_END.search(text, max(position, begin + 1))
    return begin, end.start() if end else len(text)


class Corpus:
    """The index. Not thread-safe; one per server process."""

    def __init__(self, documents: Sequence[Document], path: str = ":memory:") -> None:
        """Build the index of `documents` in the SQLite file `path`, or in memory."""
        self._db = sqlite3.connect(path)
        self._build(documents)
        self._prepare()

    @classmethod
    def open(cls, documents: str | Path, cache: str | Path | None = None) -> Corpus:
        """The index of the collection at `documents`; kept in the file `cache` if that is given.

        A cache that was built from other files (path, size or modification time differ) is rebuilt.

        Raises:
            DataError: see `load_documents`; or the cache cannot be written.
        """
        if cache is None:
            return cls(load_documents(documents))
        file, key = Path(cache), _fingerprint(Path(documents))
        corpus = cls.__new__(cls)
        if file.exists():
            corpus._db = sqlite3.connect(file)
            if corpus._cached_key() == key:
                corpus._prepare()
                return corpus
            corpus._db.close()
        temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary.unlink(missing_ok=True)
            built = cls(load_documents(documents), str(temporary))
            built._db.execute("INSERT INTO meta VALUES (?)", (key,))
            built._db.commit()
            built._db.close()
            temporary.replace(file)  # several servers may build at once; the last one wins
        except (OSError, sqlite3.Error) as error:
            raise DataError(f"{file}: the index cannot be written: {error}") from error
        finally:
            temporary.unlink(missing_ok=True)
        corpus._db = sqlite3.connect(file)
        corpus._prepare()
        return corpus

    def _build(self, documents: Sequence[Document]) -> None:
        db = self._db
        db.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;"
            "CREATE TABLE meta (key TEXT);"
            "CREATE TABLE documents (rank INTEGER PRIMARY KEY, id TEXT, url TEXT, title TEXT,"
            " text TEXT, url_key TEXT);"
            "CREATE VIRTUAL TABLE search USING fts5(title, text, content='documents',"
            " content_rowid='rank', tokenize='porter unicode61 remove_diacritics 2');"
        )
        # The row number is the place in the order of ids, which makes it the tie break.
        rows = (
            (rank, item.id, item.url, item.title, item.text, normalise_url(item.url))
            for rank, item in enumerate(sorted(documents, key=lambda item: item.id), 1)
        )
        db.executemany("INSERT INTO documents VALUES (?, ?, ?, ?, ?, ?)", rows)
        db.execute("INSERT INTO search (search) VALUES ('rebuild')")
        db.execute("CREATE INDEX by_url ON documents (url_key)")
        db.commit()

    def _prepare(self) -> None:
        self.num_documents = int(self._db.execute("SELECT count(*) FROM documents").fetchone()[0])
        # The episodes of a prompt group ask the same things: most queries come more than once.
        self._find = lru_cache(maxsize=4096)(self._find_uncached)

    def _cached_key(self) -> str:
        try:
            row = self._db.execute("SELECT key FROM meta").fetchone()
        except sqlite3.Error:
            return ""  # not our file, or one that was cut short
        return row[0] if row else ""

    def search(self, query: str, limit: int, offset: int, snippet_chars: int) -> tuple[Hit, ...]:
        """Hits `offset` to `offset + limit` for `query`, best first; empty if no word matches."""
        terms = query_terms(query)
        return self._find(tuple(terms), limit, offset, snippet_chars) if terms else ()

    def _find_uncached(
        self, terms: tuple[str, ...], limit: int, offset: int, snippet_chars: int
    ) -> tuple[Hit, ...]:
        rows = self._db.execute(
            "SELECT d.title, d.url, d.text FROM (SELECT rowid, bm25(search, ?, 1.0) AS score"
            " FROM search WHERE search MATCH ? ORDER BY score, rowid LIMIT ? OFFSET ?) AS hit"
            " JOIN documents AS d ON d.rank = hit.rowid ORDER BY hit.score, hit.rowid",
            (_TITLE_WEIGHT, " OR ".join(f'"{term}"' for term in terms), limit, offset),
        )
        return tuple(
            Hit(title, url, best_snippet(text, terms, snippet_chars)) for title, url, text in rows
        )

    def lookup(self, url: str) -> list[Document]:
        """Documents with this url (see `normalise_url`), in the order of their ids."""
        rows = self._db.execute(
            "SELECT id, url, title, text FROM documents WHERE url_key = ? ORDER BY rank",
            (normalise_url(url),),
        )
        return [Document(*row) for row in rows]

    def close(self) -> None:
        """Close the database."""
        self._db.close()


def _fingerprint(path: Path) -> str:
    """Changes when a file of the collection is added, removed, or written."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    digest = hashlib.sha256(f"{_SCHEMA_VERSION}".encode())
    for file in files:
        if file.is_file():
            stat = file.stat()
            digest.update(f"{file.absolute()}|{stat.st_size}|{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()
