"""A real MCP server over stdio with one tool, which waits and then returns some text.

    python sleeping_tools.py

`search(q, wait_s, num_chars)` answers after `wait_s` seconds; any number of calls may wait at the
same time. Imports little, so that starting it is about as cheap as starting Python can be.
"""

import heapq
import json
import os
import select
import time
from pydoc_data.topics import topics

TEXT = "\n".join(topics.values())
NUMBER = {"type": "number"}
TOOLS = [
    {
        "name": "search",
        "description": "Search the web and return the text of the best page.",
        "inputSchema": {
            "type": "object",
            "properties": {"q": {"type": "string"}, "wait_s": NUMBER, "num_chars": NUMBER},
            "required": ["q", "wait_s", "num_chars"],
        },
    }
]


def result_of(message: dict) -> dict:
    """The result of a request; a tool call's is due when it has waited."""
    match message["method"]:
        case "initialize":
            return {
                "protocolVersion": message["params"]["protocolVersion"],
                "capabilities": {"tools": {}},
                "serverInfo": {"name": "sleeping", "version": "1"},
            }
        case "tools/list":
            return {"tools": TOOLS}
        case "tools/call":
            arguments = message["params"]["arguments"]
            num_chars = int(arguments["num_chars"])
            start = int(arguments["wait_s"] * 1e6) % (len(TEXT) - num_chars)
            text = TEXT[start : start + num_chars]
            return {"content": [{"type": "text", "text": text}], "isError": False}
    return {}


def main() -> None:
    """Serve until stdin ends."""
    waiting: list[tuple[float, int, dict]] = []
    rest = b""
    while True:
        left_s = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        if select.select([0], [], [], left_s)[0]:
            chunk = os.read(0, 1 << 18)
            if not chunk:
                return
            *lines, rest = (rest + chunk).split(b"\n")
            now = time.monotonic()
            for message in map(json.loads, lines):
                if "id" in message:
                    arguments = message.get("params", {}).get("arguments", {})
                    due = now + arguments.get("wait_s", 0.0)
                    heapq.heappush(waiting, (due, message["id"], message))
        answers = []
        while waiting and waiting[0][0] <= time.monotonic():
            _, identity, message = heapq.heappop(waiting)
            answer = {"jsonrpc": "2.0", "id": identity, "result": result_of(message)}
            answers.append(json.dumps(answer).encode() + b"\n")
        data = b"".join(answers)
        while data:
            data = data[os.write(1, data) :]


if __name__ == "__main__":
    main()
