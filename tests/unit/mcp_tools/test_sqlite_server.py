"""The SQLite server over real databases: reading, what is refused, limits, and its command line."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_matpo.agents.tools import ToolReply
from megatron_matpo.config.tools import McpServerConfig
from megatron_matpo.errors import DataError
from megatron_matpo.mcp_tools import sqlite_server
from megatron_matpo.mcp_tools.pool import McpToolBox
from megatron_matpo.mcp_tools.sqlite_read import Database, QueryError, ReadLimits
from tests.helpers.rogue import with_box

ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c"


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    path = tmp_path / "my shop?.sqlite"  # the name has to be quoted in a URI
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE items (name TEXT PRIMARY KEY, price REAL NOT NULL, tag)")
        connection.executemany(
            "INSERT INTO items VALUES (?, ?, ?)",
            [("lamp", 2.5, None), ("rug", 40, b"\x00\xff"), ("a|b", 1, "two\nlines\\")],
        )
        connection.execute('CREATE VIEW "cheap ""ones" AS SELECT name FROM items WHERE price < 3')
    connection.close()
    return path


def refusal(database: Database, sql: str) -> str:
    with pytest.raises(QueryError) as caught:
        database.query(sql)
    return str(caught.value)


def test_rows_come_as_text(shop: Path) -> None:
    database = Database(shop, ReadLimits())
    assert database.query("SELECT name, price FROM items ORDER BY price") == (
        "name | price\na\\|b | 1.0\nlamp | 2.5\nrug | 40.0\n(3 rows)"
    )
    assert database.query("SELECT tag FROM items WHERE name = 'lamp'") == "tag\nNULL\n(1 row)"
    assert database.query("SELECT tag FROM items WHERE name = 'rug'") == "tag\n<2 bytes>\n(1 row)"
    assert database.query("SELECT tag FROM items WHERE name = 'a|b'") == (
        "tag\ntwo\\nlines\\\\\n(1 row)"
    )
    assert database.query("SELECT 1 WHERE 0") == "1\n(0 rows)"
    assert database.query("VALUES (1);") == "column1\n1\n(1 row)"


def test_tables_and_columns(shop: Path) -> None:
    database = Database(shop, ReadLimits())
    assert database.list_tables() == 'cheap "ones (2 rows)\nitems (3 rows)'
    assert database.describe("ITEMS ").startswith(
        "items:\n- name: TEXT, key\n- price: REAL, NOT NULL\n- tag: any type\nFirst rows:\n"
        "name | price | tag\nlamp | 2.5 | NULL"
    )
    assert database.describe('cheap "ones').startswith('cheap "ones:\n- name: TEXT')
    with pytest.raises(QueryError) as caught:
        database.describe("orders")
    catalog = 'Tables: cheap "ones(name); items(name, price, tag)'
    assert str(caught.value) == f"no such table: orders\n{catalog}"
    assert refusal(database, "SELECT cost FROM items") == f"no such column: cost\n{catalog}"
    assert refusal(database, "SELECT * FROM orders") == f"no such table: orders\n{catalog}"


@pytest.mark.parametrize(
    "sql",
    [
        "DELETE FROM items",
        "INSERT INTO items VALUES ('x', 1, 1)",
        "INSERT INTO items VALUES ('x', 1, 1) RETURNING name",
        "UPDATE items SET price = 0",
        "DROP TABLE items",
        "CREATE TABLE t (a)",
        "CREATE TEMP TABLE t (a)",
        "CREATE VIRTUAL TABLE t USING fts5(a)",
        "ALTER TABLE items ADD COLUMN x",
        "UPDATE sqlite_master SET sql = ''",
        "ATTACH '{folder}/other.db' AS other",
        "VACUUM INTO '{folder}/copy.db'",
        "VACUUM",
        "REINDEX",
        "ANALYZE",
        "BEGIN",
        "SAVEPOINT a",
        "PRAGMA journal_mode = WAL",
        "PRAGMA query_only = OFF",
        "PRAGMA writable_schema = ON",
        "PRAGMA hard_heap_limit = 0",
        "PRAGMA user_version = 3",
        "SELECT load_extension('x')",
        "SELECT fts3_tokenizer('simple')",
        "SELECT writefile('{folder}/out', 'x')",
        "SELECT readfile('/etc/passwd')",
        "SELECT 1; DELETE FROM items",
    ],
)
def test_nothing_can_be_written_and_no_other_file_be_read(shop: Path, sql: str) -> None:
    content, folder = shop.read_bytes(), sorted(os.listdir(shop.parent))
    database = Database(shop, ReadLimits())
    assert refusal(database, sql.format(folder=shop.parent))
    assert shop.read_bytes() == content
    assert sorted(os.listdir(shop.parent)) == folder


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        ("DELETE FROM items", "the database can only be read: DELETE is refused"),
        ("ATTACH 'x' AS y", "ATTACH is refused"),
        ("SELECT 1; SELECT 2", "only one statement per call"),
        ("SELECT ?", "there are no parameters"),
        ("SELEC 1", 'near "SELEC": syntax error'),
        ("SELECT (1", "incomplete input"),
        ("-- nothing", "not a query that returns rows"),
        ("SELECT \ud800", "not valid text"),
        ("SELECT 1\0", "null character"),
        ("SELECT zeroblob(1000000000)", "too big"),
        # One call of these would take minutes, and no deadline ends it.
        ("SELECT instr(zeroblob(2000000), zeroblob(1000000))", "too big"),
        ("SELECT 'x' LIKE hex(zeroblob(20000))", "pattern too complex"),
        ("SELECT '" + "x" * 200_000 + "'", "too large"),
    ],
)
def test_reasons_are_for_the_model(shop: Path, sql: str, said: str) -> None:
    assert said in refusal(Database(shop, ReadLimits()), sql)


def test_trim_is_sqlites_and_ends_soon(shop: Path) -> None:
    database = Database(shop, ReadLimits())
    sql = (
        "SELECT trim('xyaxy', 'xy'), ltrim('xxa', 'x'), rtrim('axx', 'x'), trim(' a '), "
        "trim(1.50, '0'), trim(NULL, 'x'), trim('x', NULL), trim('a', ''), trim(x'4161', 'A')"
    )
    with sqlite3.connect(":memory:") as plain:
        expected = ["NULL" if value is None else value for value in plain.execute(sql).fetchone()]
    plain.close()
    assert database.query(sql).splitlines()[1] == " | ".join(expected)
    long = "trim(hex(zeroblob(200000)), replace(hex(zeroblob(80000)), '0', 'b') || '0')"
    assert database.query(f"SELECT length({long}) AS n") == "n\n0\n(1 row)"


def test_table_functions_and_full_text_search_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "text.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE VIRTUAL TABLE notes USING fts5(body)")
        connection.execute("INSERT INTO notes VALUES ('the bell is loud')")
    connection.close()
    database = Database(path, ReadLimits())
    assert database.query("SELECT body FROM notes WHERE notes MATCH 'bell'").endswith("(1 row)")
    assert database.query("SELECT value FROM json_each('[1, 2]')") == "value\n1\n2\n(2 rows)"
    assert "(1 row)" in database.query("SELECT name FROM pragma_table_info('notes')")
    assert "body" in database.query("PRAGMA table_info(notes)")


def test_rows_and_characters_are_limited_with_a_mark(shop: Path) -> None:
    database = Database(shop, ReadLimits(max_rows=2, max_cell_chars=3, max_output_chars=60))
    assert database.query("SELECT price FROM items ORDER BY price") == (
        "price\n1.0\n2.5\n"
        "[... cut: the first 2 rows are shown, there are more: use WHERE, LIMIT or sums]"
    )
    assert database.query("SELECT price FROM items LIMIT 2").endswith("(2 rows)")
    assert database.query("SELECT 'abcdef' AS a") == (
        "a\nabc[... cut: 3 of 6 characters shown]\n(1 row)"
    )
    wide = database.query(f"SELECT {', '.join(['name'] * 20)} FROM items")
    assert wide.splitlines()[-1].startswith("[... cut: the first 0 rows are shown")
    everything = database.query(f"{ENDLESS.replace('count(*)', 'x')}")
    assert "there are more" in everything, "endless rows end with the row limit"


def test_a_slow_query_is_ended_and_others_go_on(shop: Path) -> None:
    database = Database(shop, ReadLimits(timeout_s=1.0))
    with ThreadPoolExecutor(4) as pool:
        slow = [pool.submit(refusal, database, ENDLESS) for _ in range(2)]
        quick = pool.submit(database.query, "SELECT 1")
        assert quick.result() == "1\n1\n(1 row)"
        for item in slow:
            assert item.result() == "the query took longer than 1 s and was ended"


def test_a_sort_that_does_not_end_is_ended_too(shop: Path) -> None:
    database = Database(shop, ReadLimits(timeout_s=1.0))
    joined = ", ".join(f"items t{i}" for i in range(30))
    said = refusal(database, f"SELECT * FROM {joined} ORDER BY random()")
    assert "longer than 1 s" in said or "memory" in said


def test_a_writer_beside_it_is_seen_and_not_blocked(shop: Path) -> None:
    database = Database(shop, ReadLimits())
    with sqlite3.connect(shop) as writer:
        writer.execute("INSERT INTO items VALUES ('vase', 7, NULL)")
    writer.close()
    assert "vase" in database.query("SELECT name FROM items")


def test_a_write_ahead_log_is_read_with_its_content(shop: Path) -> None:
    writer = sqlite3.connect(shop)
    writer.execute("PRAGMA journal_mode = WAL")
    writer.execute("INSERT INTO items VALUES ('vase', 7, NULL)")
    writer.commit()
    assert shop.with_name(shop.name + "-wal").stat().st_size > 0
    assert "vase" in Database(shop, ReadLimits()).query("SELECT name FROM items")
    writer.close()


@pytest.mark.skipif(os.getuid() == 0, reason="root can write to any folder")
def test_a_write_ahead_database_in_a_folder_that_cannot_be_written_to(shop: Path) -> None:
    writer = sqlite3.connect(shop)
    writer.execute("PRAGMA journal_mode = WAL")
    writer.close()
    shop.parent.chmod(0o555)
    try:
        assert "lamp" in Database(shop, ReadLimits()).query("SELECT name FROM items")
    finally:
        shop.parent.chmod(0o755)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file; --database names an SQLite database"),
        (b"this is a text" * 100, "not an SQLite database"),
        (b"", "the database has no tables"),
    ],
)
def test_what_is_not_a_database_stops_the_start(
    tmp_path: Path, content: bytes | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.db"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=said):
        Database(path, ReadLimits())
    assert sqlite_server.main(["--database", str(path)]) == 2
    assert said in capsys.readouterr().err


def test_through_the_pool(shop: Path, tmp_path: Path) -> None:
    async def body(box: McpToolBox) -> None:
        assert [spec.name for spec in box.specs()] == ["list_tables", "describe_table", "query"]
        reply = await box.call("a", "query", {"sql": "SELECT count(*) FROM items"})
        assert reply == ToolReply("count(*)\n3\n(1 row)", False)
        assert "items (3 rows)" in (await box.call("a", "list_tables", {})).text
        assert "price" in (await box.call("a", "describe_table", {"table": "items"})).text
        bad = await box.call("a", "query", {"sql": "SELECT cost FROM items"})
        assert bad.is_error and bad.text.startswith("Error: no such column: cost\nTables: ")
        missing = await box.call("a", "query", {})
        assert missing.is_error and "'sql' is required" in missing.text

    arguments = ["-m", "megatron_matpo.mcp_tools.sqlite_server", "--database", str(shop)]
    with_box(tmp_path, {"a": McpServerConfig("python", args=arguments, start_timeout_s=60)}, body)


def test_a_running_query_does_not_keep_the_server_alive(shop: Path) -> None:
    command = [sys.executable, "-m", "megatron_matpo.mcp_tools.sqlite_server"]
    arguments = ["--database", str(shop), "--timeout-s", "1000"]
    call = (
        '{"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": '
        f'{{"name": "query", "arguments": {{"sql": "{ENDLESS}"}}}}}}\n'
    )
    done = subprocess.run(
        [*command, *arguments], input=call.encode(), capture_output=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, b"")
