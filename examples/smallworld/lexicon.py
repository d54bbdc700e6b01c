"""Every text of the small world: names, prompts, wire-format skeletons and tool replies.

One source for all scripts of this folder, because the tokenizer, the demonstrations, the data set
rows and the recipe must agree to the character: a prompt that the tokenizer has not seen costs many
tokens and is foreign to the policy.

Invariants:
* names, relations and phrases are unique, and none of them occurs inside another name;
* nothing here depends on a seed: the world and the demonstrations draw from these lists.
"""

from __future__ import annotations

import json

BASE_URL = "https://smallworld.example/"

# The first hop of a question starts at a guild and reaches a person; later hops stay among people.
GUILD_RELATIONS = ("founder", "director", "patron", "architect")
PERSON_RELATIONS = ("mentor", "rival", "partner", "heir")
RELATIONS = GUILD_RELATIONS + PERSON_RELATIONS

NUM_GUILDS = 48
NUM_PEOPLE = 96


def _names(heads: str, middles: str, tails: str, count: int) -> tuple[str, ...]:
    """Spreads `count` names over all head-middle-tail combinations, in a fixed order."""
    parts = heads.split(), middles.split(), tails.split()
    sizes = [len(part) for part in parts]
    names: list[str] = []
    index = 0
    while len(names) < count:
        head = parts[0][index % sizes[0]]
        middle = parts[1][(index // sizes[0] + index) % sizes[1]]
        tail = parts[2][(index * 5 + index // sizes[0]) % sizes[2]]
        name = head + middle + tail
        if name not in names:
            names.append(name)
        index += 1
    return tuple(names)


GUILDS = _names("Zor Kel Vum Dray Tyx Quo Hax Brel", "ve mo ra ni", "x lt nd rk sk", NUM_GUILDS)
PEOPLE = _names("Al Be Ci Do El Fa Gi Ho Ju Ka Lu Me", "la ri no ve", "na so mi ta do", NUM_PEOPLE)

PLANNER_SERVER, PLANNER_TOOL = "browsing_agent", "search_and_browse"
WEB_SERVER, SEARCH_TOOL, SCRAPE_TOOL = "search_and_scrape_webpage", "google_search", "scrape"

# Word for word the suffix of the MATPO data sets ("requestion" included).
BOXED_SUFFIX = (
    " You should follow the format instruction in the requestion strictly"
    " and wrap the final answer in \\boxed{}."
)


def _schema(*required: str) -> str:
    """Renders a tool's schema as the data sets do: the repr of a Python dict, not JSON."""
    properties = {name: {"type": "string"} for name in required}
    return repr({"type": "object", "properties": properties, "required": list(required)})


_TOOLS_HEADER = "Here are the functions available in JSONSchema format:\n\n"
_CALL_RULE = (
    "\nCall one tool per message, at its end:\n<use_mcp_tool>\n<server_name>SERVER</server_name>\n"
    "<tool_name>TOOL</tool_name>\n<arguments>\n{JSON}\n</arguments>\n</use_mcp_tool>"
)
_BROWSE_SPEC = (
    f"## Server name: {PLANNER_SERVER}\n### Tool name: {PLANNER_TOOL}\n"
    f"Description: A worker looks up one fact.\nInput JSON schema: {_schema('subtask')}\n"
)
_WEB_SPEC = (
    f"## Server name: {WEB_SERVER}\n### Tool name: {SEARCH_TOOL}\n"
    f"Description: Web search.\nInput JSON schema: {_schema('q', 'gl', 'hl')}\n"
    f"### Tool name: {SCRAPE_TOOL}\n"
    f"Description: Text of a page.\nInput JSON schema: {_schema('url')}\n"
)
PLANNER_SYSTEM = f"You plan, workers browse. {_TOOLS_HEADER}{_BROWSE_SPEC}{_CALL_RULE}"
WORKER_SYSTEM = f"You browse for a planner. {_TOOLS_HEADER}{_WEB_SPEC}{_CALL_RULE}"
SINGLE_SYSTEM = f"You browse and answer. {_TOOLS_HEADER}{_WEB_SPEC}{_CALL_RULE}"
WORKER_USER_TEMPLATE = "Main task: {task}\nYour subtask: {subtask}"


def _call_open(server: str, tool: str, first_key: str) -> str:
    return (
        f"<use_mcp_tool>\n<server_name>{server}</server_name>\n<tool_name>{tool}</tool_name>\n"
        f'<arguments>\n{{"{first_key}": "'
    )


CALL_CLOSE = "\n</arguments>\n</use_mcp_tool>"
UNCLOSED = "\n</arguments>"  # the malformed ending of the demonstrations: the block is never closed
BROWSE_OPEN = _call_open(PLANNER_SERVER, PLANNER_TOOL, "subtask")
SEARCH_OPEN = _call_open(WEB_SERVER, SEARCH_TOOL, "q")
SCRAPE_OPEN = _call_open(WEB_SERVER, SCRAPE_TOOL, "url") + BASE_URL
ARGS_END = '"}'
SEARCH_ARGS_END = '", "gl": "us", "hl": "en"}'


def browse_call(subtask: str, closed: bool = True) -> str:
    """The planner's delegation of one subtask; `closed=False` leaves the block open."""
    return BROWSE_OPEN + subtask + ARGS_END + (CALL_CLOSE if closed else UNCLOSED)


def search_call(query: str, closed: bool = True) -> str:
    """A google_search call with the three required arguments."""
    return SEARCH_OPEN + query + SEARCH_ARGS_END + (CALL_CLOSE if closed else UNCLOSED)


def scrape_call(name: str, closed: bool = True) -> str:
    """A scrape call for the page of a name."""
    return SCRAPE_OPEN + name + ARGS_END + (CALL_CLOSE if closed else UNCLOSED)


def ask(relation: str, name: str) -> str:
    """A subtask or a search query for one fact."""
    return f"{relation} of {name}"


def report(relation: str, value: str) -> str:
    """What a worker reports, and what the single agent notes before it goes on."""
    return f"{relation}: {value}"


def boxed(answer: str) -> str:
    """The final answer."""
    return f"\\boxed{{{answer}}}"


def question_text(relations: tuple[str, ...], guild: str) -> str:
    """The question that follows `relations` from a guild, e.g. founder then mentor.

    Example: ("founder", "mentor"), "Zorvex" -> "Who is the mentor of the founder of Zorvex?"
    """
    return "Who is the " + " of the ".join(reversed(relations)) + f" of {guild}?"


def page_intro(name: str) -> str:
    """The first line of a page: all that a search result shows of it. It holds no fact."""
    # With the word "of", a search that requires every word of "founder of Zorvex" finds the page.
    return f"{name} is one of the {'guilds' if name in _GUILD_SET else 'people'}."


def page_text(name: str, facts: dict[str, str]) -> str:
    """A page: one line of introduction, then one line per fact."""
    return "\n".join(
        [page_intro(name), *(f"{relation}: {value}." for relation, value in facts.items())]
    )


def search_reply(query: str, hits: list[tuple[str, str]]) -> str:
    """What the bundled MCP server answers to google_search; `hits` are (name, snippet)."""
    parameters = {"q": query, "gl": "us", "hl": "en", "type": "search", "num": len(hits), "page": 1}
    organic = [
        {"title": name, "link": BASE_URL + name, "snippet": snippet, "position": rank}
        for rank, (name, snippet) in enumerate(hits, start=1)
    ]
    return json.dumps({"searchParameters": parameters, "organic": organic}, separators=(",", ":"))


def scrape_reply(name: str, text: str) -> str:
    """What the bundled MCP server answers to scrape."""
    reply = {"text": text, "metadata": {"title": name, "url": BASE_URL + name}}
    return json.dumps(reply, separators=(",", ":"))


def correction(call: str) -> str:
    """What the environment answers to an unclosed call (`megatron_matpo.agents.prompts`)."""
    for opening, tool in _TOOL_OF_OPENING.items():
        if opening in call:
            return tool + _NOT_CLOSED
    raise ValueError(f"not a call: {call!r}")


MISSING_REPORT = "The worker ended without a report (invalid_call)."
_NOT_CLOSED = (
    " was not executed: the call is not closed by </use_mcp_tool>.\nA call has this form:\n"
    "<use_mcp_tool>\n<server_name>SERVER</server_name>\n<tool_name>TOOL</tool_name>\n<arguments>\n"
    '{"ARGUMENT": "VALUE"}\n</arguments>\n</use_mcp_tool>'
)
_TOOL_OF_OPENING = {
    BROWSE_OPEN: f"{PLANNER_SERVER}/{PLANNER_TOOL}",
    SEARCH_OPEN: f"{WEB_SERVER}/{SEARCH_TOOL}",
    SCRAPE_OPEN: f"{WEB_SERVER}/{SCRAPE_TOOL}",
}
_GUILD_SET = frozenset(GUILDS)

# Longest first is not needed: the tokenizer takes the longest match. Each phrase becomes one token.
PHRASES = (
    "system\n", "user\n", "assistant\n",
    PLANNER_SYSTEM, WORKER_SYSTEM, SINGLE_SYSTEM, BOXED_SUFFIX,
    "Main task: ", "\nYour subtask: ", "Who is the ", " of the ", " of ",
    BROWSE_OPEN, SEARCH_OPEN, SCRAPE_OPEN,
    ARGS_END + CALL_CLOSE, ARGS_END + UNCLOSED,
    SEARCH_ARGS_END + CALL_CLOSE, SEARCH_ARGS_END + UNCLOSED,
    "\\boxed{", ".\\n", *(f"{relation}: " for relation in RELATIONS),
    " is one of the guilds.", " is one of the people.",
    '{"searchParameters":{"q":"', '","gl":"us","hl":"en","type":"search","num":',
    ',"page":1},"organic":[', '{"title":"', '","link":"' + BASE_URL, '","snippet":"',
    '","position":1}', '","position":2}', '","position":3}',
    '{"text":"', '","metadata":{"title":"', '","url":"' + BASE_URL, '"}}', '"organic":[',
    BASE_URL, MISSING_REPORT, _NOT_CLOSED, *_TOOL_OF_OPENING.values(),
)  # fmt: skip
