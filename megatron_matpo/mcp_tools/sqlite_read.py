"""Reading an SQLite database for somebody who writes the queries and must not write anything else.

Invariants:
* the file is opened read-only, and an authorizer refuses everything but reading: no attaching of
  other files, no extension, no setting, no temporary table;
* every query has a deadline, and bounds on rows, on characters and on the size of a value.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from megatron_matpo.errors import DataError

# The deadline is looked at between steps of a query, and one function call is one step. So these
# bound the slowest calls, which take value times value (instr, replace) or value times pattern
# (LIKE, GLOB): some seconds.
_MAX_VALUE_BYTES = 512 << 10
_MAX_PATTERN_BYTES = 500
_MAX_SQL_BYTES = 100_000
# Of the process, over all queries that run at the same time.
_HEAP_BYTES = 512 << 20
_OPS_BETWEEN_CHECKS = 2000
_CATALOG_CHARS = 2000
_TABLE_PRAGMAS = {"table_list", "table_info", "table_xinfo", "foreign_key_list"}
_INDEX_PRAGMAS = {"index_list", "index_info", "index_xinfo"}
# The last one is what full-text search asks.
_READING_PRAGMAS = _TABLE_PRAGMAS | _INDEX_PRAGMAS | {"data_version"}
_ALLOWED = frozenset({sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE})
_REFUSED_FUNCTIONS = frozenset({"load_extension", "fts3_tokenizer"})
_ACTION_NAMES = {
    value: name.removeprefix("SQLITE_").replace("_", " ")
    for name, value in vars(sqlite3).items()
    if name.startswith(("SQLITE_CREATE", "SQLITE_DROP", "SQLITE_ALTER"))
} | {
    sqlite3.SQLITE_INSERT: "INSERT",
    sqlite3.SQLITE_UPDATE: "UPDATE",
    sqlite3.SQLITE_DELETE: "DELETE",
    sqlite3.SQLITE_ATTACH: "ATTACH",
    sqlite3.SQLITE_DETACH: "DETACH",
    sqlite3.SQLITE_PRAGMA: "PRAGMA",
    sqlite3.SQLITE_TRANSACTION: "a transaction",
    sqlite3.SQLITE_SAVEPOINT: "a savepoint",
    sqlite3.SQLITE_REINDEX: "REINDEX",
    sqlite3.SQLITE_ANALYZE: "ANALYZE",
    sqlite3.SQLITE_FUNCTION: "this function",
}


class QueryError(ValueError):
    """The query cannot be answered; the message is for the model."""


@dataclass(frozen=True, slots=True)
class ReadLimits:
    """Per query."""

    max_rows: int = 100
    max_cell_chars: int = 500
    max_output_chars: int = 8000
    timeout_s: float = 10.0


class Database:
    """One database file; every query has a connection of its own, so threads may share this."""

    def __init__(self, path: str | Path, limits: ReadLimits) -> None:
        """Open once, to see whether it can be read.

        Raises:
            DataError: no such file, not a database, or one without tables.
        """
        self._path = Path(path)
        self._limits = limits
        if not self._path.is_file():
            raise DataError(f"{path}: no such file; --database names an SQLite database")
        self._uri = self._readable_uri()
        self.tables = self._names()
        """Tables and views, in the order of their names."""
        if not self.tables:
            raise DataError(f"{path}: the database has no tables")

    def query(self, sql: str) -> str:
        """The rows of one statement as text.

        Raises:
            QueryError: it cannot be answered; says why.
        """
        return self._run(sql)

    def list_tables(self) -> str:
        """Every table and view with its number of rows."""
        lines: list[str] = []
        for name in self.tables:
            try:
                count = self._run(f"SELECT count(*) FROM {_quoted(name)}").splitlines()[1]
            except QueryError:
                count = "?"
            lines.append(f"{name} ({count} {'row' if count == '1' else 'rows'})")
        return "\n".join(lines)

    def describe(self, table: str) -> str:
        """Columns with their types and keys, and the first rows.

        Raises:
            QueryError: there is no such table.
        """
        known = {name.casefold(): name for name in self.tables}
        name = known.get(table.strip().casefold())
        if name is None:
            raise QueryError(f"no such table: {table}{self._catalog()}")
        lines = [f"{name}:"]
        for _, column, kind, is_required, _, key in self._columns(name):
            notes = [kind or "any type", *["NOT NULL"] * bool(is_required), *["key"] * bool(key)]
            lines.append(f"- {column}: {', '.join(notes)}")
        return "\n".join([*lines, "First rows:", self._run(f"SELECT * FROM {_quoted(name)}", 3)])

    def _run(self, sql: str, max_rows: int = 0) -> str:
        max_rows = max_rows or self._limits.max_rows
        refused: list[str] = []
        deadline = time.monotonic() + self._limits.timeout_s
        try:
            with self._connection() as connection:
                connection.set_progress_handler(
                    lambda: time.monotonic() > deadline, _OPS_BETWEEN_CHECKS
                )
                connection.set_authorizer(_authorizer(refused))
                cursor = connection.execute(sql)
                if cursor.description is None:
                    raise QueryError("this is not a query that returns rows")
                return self._table(cursor, max_rows, is_sample=max_rows != self._limits.max_rows)
        except (sqlite3.Error, sqlite3.Warning) as error:
            raise QueryError(self._explain(str(error), refused)) from error
        except UnicodeEncodeError as error:
            raise QueryError("the query is not valid text") from error
        except MemoryError as error:
            raise QueryError("the query needs too much memory") from error

    def _table(self, cursor: sqlite3.Cursor, max_rows: int, is_sample: bool) -> str:
        limit = self._limits
        lines = [" | ".join(column[0] for column in cursor.description)]
        num_chars = len(lines[0])
        for num_rows, row in enumerate(cursor):
            line = " | ".join(_cell(value, limit.max_cell_chars) for value in row)
            num_chars += len(line) + 1
            if num_rows == max_rows or num_chars > limit.max_output_chars:
                rows = "1 row" if num_rows == 1 else f"{num_rows} rows"
                more = "there are more" if is_sample else "there are more: use WHERE, LIMIT or sums"
                return "\n".join([*lines, f"[... cut: the first {rows} are shown, {more}]"])
            lines.append(line)
        count = len(lines) - 1
        return "\n".join([*lines, f"({count} {'row' if count == 1 else 'rows'})"])

    def _explain(self, error: str, refused: Sequence[str]) -> str:
        if refused:
            return f"the database can only be read: {', '.join(dict.fromkeys(refused))} is refused"
        if error == "interrupted":
            return f"the query took longer than {self._limits.timeout_s:g} s and was ended"
        if error.startswith("You can only execute one statement"):
            return "only one statement per call"
        if error.startswith("Incorrect number of bindings"):
            return "write values into the query itself; there are no parameters"
        if error.startswith(("no such table", "no such column")):
            return error + self._catalog()
        return error

    def _catalog(self) -> str:
        """All tables with their columns, for an error reply."""
        tables = "; ".join(
            f"{name}({', '.join(str(column[1]) for column in self._columns(name))})"
            for name in self.tables
        )
        if len(tables) > _CATALOG_CHARS:
            tables = f"{tables[:_CATALOG_CHARS]} [... cut]"
        return f"\nTables: {tables}"

    def _columns(self, table: str) -> list[tuple]:
        with self._connection() as connection:
            return connection.execute(f"PRAGMA table_info({_quoted(table)})").fetchall()

    def _names(self) -> list[str]:
        try:
            with self._connection() as connection:
                rows = connection.execute(
                    "SELECT name FROM sqlite_master WHERE type IN ('table', 'view') "
                    "AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' ORDER BY name"
                ).fetchall()
        except sqlite3.Error as error:
            raise DataError(f"{self._path}: not an SQLite database ({error})") from error
        return [row[0] for row in rows]

    def _readable_uri(self) -> str:
        """Read-only, and immutable where even reading would need to write.

        That is so for a database in write-ahead mode that nobody writes to any more, in a folder
        that cannot be written to.
        """
        uri = f"file:{quote(str(self._path.resolve()))}?mode=ro"
        log = self._path.with_name(self._path.name + "-wal")
        if log.exists() and log.stat().st_size:
            return uri
        try:
            with contextlib.closing(sqlite3.connect(uri, uri=True)) as connection:
                connection.execute("SELECT 1 FROM sqlite_master").fetchall()
        except sqlite3.OperationalError:
            return f"{uri}&immutable=1"
        except sqlite3.DatabaseError:
            return uri  # not a database; `_names` says so
        return uri

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self._uri, uri=True, timeout=self._limits.timeout_s)
        try:
            connection.text_factory = lambda data: data.decode("utf-8", "replace")
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_VALUE_BYTES)
            connection.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, _MAX_SQL_BYTES)
            connection.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, _MAX_PATTERN_BYTES)
            for name, strip in _STRIPS.items():
                connection.create_function(name, 2, strip, deterministic=True)
            connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
            connection.execute("PRAGMA query_only = ON")
            connection.execute("PRAGMA trusted_schema = OFF")
            # Sorting must not write temporary files, nor fill the memory.
            connection.execute("PRAGMA temp_store = MEMORY")
            connection.execute(f"PRAGMA hard_heap_limit = {_HEAP_BYTES}")
            yield connection
        finally:
            connection.close()


def _stripping(strip: Callable[[str, str], str]) -> Callable[[object, object], str | None]:
    """SQLite's `trim(X, Y)`, which takes a minute for long X and Y."""

    def stripped(text: object, characters: object) -> str | None:
        if text is None or characters is None:
            return None
        return strip(_as_text(text), _as_text(characters))

    return stripped


def _as_text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


_STRIPS = {
    "trim": _stripping(str.strip),
    "ltrim": _stripping(str.lstrip),
    "rtrim": _stripping(str.rstrip),
}


def _authorizer(refused: list[str]):
    """What a query may do; notes in `refused` what it may not."""

    def authorize(
        action: int, first: str | None, second: str | None, _schema: str | None, _via: str | None
    ) -> int:
        if action in _ALLOWED:
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_FUNCTION and (second or "").lower() not in _REFUSED_FUNCTIONS:
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_PRAGMA and (first or "").lower() in _READING_PRAGMAS:
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_UPDATE and first == "sqlite_master":
            # How virtual tables and table functions (json_each, full-text search) declare their
            # columns. The schema itself cannot be updated: no setting permits it, and the file is
            # open for reading only.
            return sqlite3.SQLITE_OK
        refused.append(_ACTION_NAMES.get(action, "this statement"))
        return sqlite3.SQLITE_DENY

    return authorize


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _cell(value: object, max_chars: int) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    text = str(value)
    if len(text) > max_chars:
        text = f"{text[:max_chars]}[... cut: {max_chars} of {len(text)} characters shown]"
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("|", "\\|")
