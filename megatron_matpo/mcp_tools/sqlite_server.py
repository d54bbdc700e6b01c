"""MCP server over one SQLite database that nobody can write to: tables, columns, queries.

    python -m megatron_matpo.mcp_tools.sqlite_server --database shop.sqlite

What cannot be answered is a reply that says why, with the tables where that helps; the call counts
as an error of the tool, not of the infrastructure.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from megatron_matpo.errors import DataError
from megatron_matpo.mcp_tools.sqlite_read import Database, QueryError, ReadLimits
from megatron_matpo.mcp_tools.stdio import (
    Reply,
    StdioServer,
    Tool,
    positive_float,
    positive_int,
    text_argument,
)

DESCRIPTION = "MCP server over one SQLite database, read-only: list_tables, describe_table, query."
NAME = "megatron_matpo sqlite"

TOOLS: list[dict[str, Any]] = [
    {
        "name": "list_tables",
        "description": "List the tables and views of the database, with their numbers of rows.",
        "inputSchema": {"type": "object", "properties": {}},
    },
    {
        "name": "describe_table",
        "description": "Show the columns of a table or view, and its first rows.",
        "inputSchema": {
            "type": "object",
            "properties": {"table": {"type": "string", "description": "Name of the table"}},
            "required": ["table"],
        },
    },
    {
        "name": "query",
        "description": "Run one SQL query that reads (SQLite dialect). Returns its rows.",
        "inputSchema": {
            "type": "object",
            "properties": {"sql": {"type": "string", "description": "One SELECT statement"}},
            "required": ["sql"],
        },
    },
]


def make_tools(database: Database) -> dict[str, Tool]:
    """The tools over a database."""

    def answer(read: Callable[[], str]) -> Reply:
        try:
            return Reply(read())
        except QueryError as error:
            return Reply(f"Error: {error}", is_error=True)

    return {
        "list_tables": lambda _: answer(database.list_tables),
        "describe_table": lambda arguments: answer(
            lambda: database.describe(text_argument(arguments, "table"))
        ),
        "query": lambda arguments: answer(lambda: database.query(text_argument(arguments, "sql"))),
    }


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code (2: the database cannot be used)."""
    parser = argparse.ArgumentParser(prog="sqlite_server", description=DESCRIPTION)
    parser.add_argument("--database", required=True, help="an SQLite file")
    default = ReadLimits()
    parser.add_argument("--max-rows", type=positive_int, default=default.max_rows)
    parser.add_argument("--max-cell-chars", type=positive_int, default=default.max_cell_chars)
    parser.add_argument("--max-output-chars", type=positive_int, default=default.max_output_chars)
    parser.add_argument("--timeout-s", type=positive_float, default=default.timeout_s)
    parser.add_argument("--max-concurrency", type=positive_int, default=4)
    options = parser.parse_args(argv)
    limits = ReadLimits(
        options.max_rows, options.max_cell_chars, options.max_output_chars, options.timeout_s
    )
    try:
        database = Database(options.database, limits)
    except DataError as error:
        print(f"sqlite_server: {error}", file=sys.stderr)
        return 2
    print(f"sqlite_server: {len(database.tables)} tables", file=sys.stderr, flush=True)
    StdioServer(NAME, TOOLS, make_tools(database), options.max_concurrency).run()


if __name__ == "__main__":
    sys.exit(main())
