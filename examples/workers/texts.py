"""Every text of the two examples: names, questions, calls, and what the tools answer.

One source for the scripts of this folder. System prompts are not here: they are rendered from the
recipes and from what the tool servers say of their tools, as a run does it (`system_prompts`).

Invariants:
* names, relations and phrases are unique, and none of them occurs inside another name;
* nothing here depends on a seed.
"""

from __future__ import annotations

from pathlib import Path

from megatron_matpo.agents.roster import make_roster
from megatron_matpo.agents.tools import ToolSpec
from megatron_matpo.config import load_recipe
from megatron_matpo.mcp_tools.python_server import TOOLS as PYTHON_TOOLS
from megatron_matpo.mcp_tools.sqlite_server import TOOLS as SQLITE_TOOLS

RECIPES = Path(__file__).parents[2] / "recipes"
EXAMPLES = {
    "calculator": ("python", PYTHON_TOOLS),
    "sqlite": ("database", SQLITE_TOOLS),
}
"""Recipe `example_NAME.yaml` -> its tool server and the server's tools."""


def system_prompts(example: str) -> tuple[str, str]:
    """(planner's, worker's) system prompt of a recipe, rendered as a run renders them."""
    server, tools = EXAMPLES[example]
    config = load_recipe(str(RECIPES / f"example_{example}.yaml"), [])
    specs = [
        ToolSpec(server, tool["name"], tool["description"], tool["inputSchema"]) for tool in tools
    ]
    roster = make_roster(config.agents, config.rollout, specs)
    (worker,) = roster.workers.values()
    return roster.planner.system_prompt(""), worker.system_prompt("")


# Every number of a question, and every result on the way to its answer, is one of these.
MAX_NUMBER = 199
NUMBERS = tuple(str(number) for number in range(MAX_NUMBER + 1))
OPERATORS = ("*", "+", "-")
# "What is given" by operator, then "what happens next" for a second step.
GIVEN = {
    "*": ("A shop has ", " boxes of ", " lamps."),
    "+": ("A shop has ", " lamps and buys ", "."),
    "-": ("A shop has ", " lamps and sells ", "."),
}
NEXT = {"+": (" Then it gets ", " more."), "-": (" Then it gives away ", ".")}
HOW_MANY = " How many lamps are there?"
BOXED_SUFFIX = " Answer in \\boxed{}."


def _names(heads: str, tails: str) -> tuple[str, ...]:
    return tuple(head + tail for head in heads.split() for tail in tails.split())


PRODUCTS = _names("Zor Kel Vum Dray Tyx Quo Hax Brel", "velax moklid raxnor nivesk")
COMPANIES = _names("Al Be Ci Do El Fa Gi Ho", "lanso rimita nodo verinta")
CITIES = _names("Port Fort Glen Lake", "ozar ubrin eska ilmo afen")
PEOPLE = _names("Ju Ka Lu Me", "larisso riveda nomita vetaro lidoma")
# Relation -> what its value is; the first step starts at a product and may lead to a company.
PRODUCT_COLUMNS = {"maker": COMPANIES, "seller": COMPANIES, "price": NUMBERS, "stock": NUMBERS}
COMPANY_COLUMNS = {"city": CITIES, "owner": PEOPLE, "founder": PEOPLE, "staff": NUMBERS}
LINKS = ("maker", "seller")
TABLES = {"products": PRODUCT_COLUMNS, "companies": COMPANY_COLUMNS}


def calculation(first: tuple[str, int, int], second: tuple[str, int] | None) -> str:
    """A word problem, e.g. ("*", 12, 7), ("+", 31): boxes of lamps, then some more."""
    head, middle, tail = GIVEN[first[0]]
    text = f"{head}{first[1]}{middle}{first[2]}{tail}"
    if second is not None:
        text += f"{NEXT[second[0]][0]}{second[1]}{NEXT[second[0]][1]}"
    return text + HOW_MANY


def expression(left: int, operator: str, right: int) -> str:
    """A subtask for the calculator, and its Python code."""
    return f"{left} {operator} {right}"


def lookup(columns: tuple[str, ...], product: str) -> str:
    """The question that follows `columns` from a product, e.g. maker then city."""
    return "What is the " + " of the ".join(reversed(columns)) + f" of {product}?"


def ask(column: str, name: str) -> str:
    """A subtask for the analyst."""
    return f"{column} of {name}"


def report(column: str, value: str) -> str:
    """What the analyst reports."""
    return f"{column}: {value}"


def boxed(answer: str) -> str:
    """The final answer."""
    return f"\\boxed{{{answer}}}"


def _call_open(server: str, tool: str, key: str, start: str) -> str:
    return (
        f"<use_mcp_tool>\n<server_name>{server}</server_name>\n<tool_name>{tool}</tool_name>\n"
        f'<arguments>\n{{"{key}": "{start}'
    )


_CLOSE = '"}\n</arguments>\n</use_mcp_tool>'
_NEVER_CLOSED = '"}\n</arguments>'
CALCULATE_OPEN = _call_open("calculator", "calculate", "subtask", "")
ASK_OPEN = _call_open("analyst", "ask_database", "subtask", "")
CODE_OPEN = _call_open("python", "run_python", "code", "print(")
SQL_OPEN = _call_open("database", "query", "sql", "SELECT ")
# How a call ends: well, or as one of the demonstrated mistakes.
ENDS = {"good": _CLOSE, "unclosed": _NEVER_CLOSED}
CODE_ENDS = {"good": ")" + _CLOSE, "unclosed": ")" + _NEVER_CLOSED, "broken": _CLOSE}
SQL_ENDS = {"good": "'" + _CLOSE, "unclosed": "'" + _NEVER_CLOSED}


def delegate(opening: str, subtask: str, end: str = "good") -> str:
    """A planner's call of its worker."""
    return opening + subtask + ENDS[end]


def code_call(code: str, end: str = "good") -> str:
    """The calculator's call; `broken` code lacks the closing bracket."""
    return CODE_OPEN + code + CODE_ENDS[end]


def sql_call(column: str, table: str, name: str, end: str = "good") -> str:
    """The analyst's call."""
    return f"{SQL_OPEN}{column} FROM {table} WHERE name = '{name}{SQL_ENDS[end]}"


def table_reply(column: str, values: list[str]) -> str:
    """What the SQLite server answers to a query of one column."""
    count = "1 row" if len(values) == 1 else f"{len(values)} rows"
    return "\n".join([column, *values, f"({count})"])


def no_column(column: str) -> str:
    """What it answers when a table does not have the column."""
    return f"Error: no such column: {column}{_TABLES}"


def syntax_error(code: str) -> str:
    """What the Python server answers to code without its closing bracket."""
    return f"{_BROKEN_LINE}{code}{_NEVER_CLOSED_BRACKET}"


_TABLES = "\nTables: " + "; ".join(
    f"{table}(name, {', '.join(columns)})" for table, columns in sorted(TABLES.items())
)
_BROKEN_LINE = '  File "<code>", line 1\n    print('
_NEVER_CLOSED_BRACKET = "\n         ^\nSyntaxError: '(' was never closed"
_CALL_FORM = (
    " was not executed: the call is not closed by </use_mcp_tool>.\nA call has this form:\n"
    "<use_mcp_tool>\n<server_name>SERVER</server_name>\n<tool_name>TOOL</tool_name>\n<arguments>\n"
    '{"ARGUMENT": "VALUE"}\n</arguments>\n</use_mcp_tool>'
)
_CALLED = {
    CALCULATE_OPEN: "calculator/calculate",
    ASK_OPEN: "analyst/ask_database",
    CODE_OPEN: "python/run_python",
    SQL_OPEN: "database/query",
}


def correction(call: str) -> str:
    """What the environment answers to an unclosed call (`megatron_matpo.agents.prompts`)."""
    (name,) = (name for opening, name in _CALLED.items() if call.startswith(opening))
    return name + _CALL_FORM


MISSING_REPORT = "The worker ended without a report (invalid_call)."


def prompt_pieces() -> list[str]:
    """The lines of all system prompts, each with its line break; one token each."""
    lines = [
        line
        for example in EXAMPLES
        for prompt in system_prompts(example)
        for line in prompt.splitlines(keepends=True)
    ]
    return [line for line in dict.fromkeys(lines) if len(line) > 1]


PHRASES = (
    "system\n", "user\n", "assistant\n", BOXED_SUFFIX, "Main task: ", "\nYour subtask: ",
    *dict.fromkeys(part for parts in GIVEN.values() for part in parts if len(part) > 1),
    *dict.fromkeys(part for parts in NEXT.values() for part in parts if len(part) > 1),
    HOW_MANY, *(f" {operator} " for operator in OPERATORS),
    "What is the ", " of the ", " of ",
    *(f"{column}: " for columns in TABLES.values() for column in columns),
    *(column for columns in TABLES.values() for column in columns),
    *(f" FROM {table} WHERE name = '" for table in TABLES),
    CALCULATE_OPEN, ASK_OPEN, CODE_OPEN, SQL_OPEN,
    *ENDS.values(), *CODE_ENDS.values(), *SQL_ENDS.values(),
    "\\boxed{", "\n(1 row)", "(0 rows)", "Error: no such column: ",
    _TABLES, _BROKEN_LINE, _NEVER_CLOSED_BRACKET, MISSING_REPORT, _CALL_FORM,
    *_CALLED.values(),
)  # fmt: skip
