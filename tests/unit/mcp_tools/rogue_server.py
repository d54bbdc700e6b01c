"""A small MCP server that misbehaves on demand: `rogue_server.py MODE [ARGUMENT]`.

At start: `exit` (says why on stderr), `garbage` (prints lines that are no messages), `mute` (never
answers), `slow` (answers after ARGUMENT seconds), `banner` (one line of garbage, then works),
`stubborn` (ignores SIGTERM and the end of stdin), `flaky` (exits at every start but the first;
ARGUMENT is a counter file). The tools of a server that runs are in `call`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time

LOCK = threading.Lock()


def write(message: object) -> None:
    with LOCK:
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()


def text(value: str, is_error: bool = False) -> dict[str, object]:
    return {"content": [{"type": "text", "text": value}], "isError": is_error}


def call(name: str, arguments: dict[str, object]) -> dict[str, object]:
    """Result or {"error": ...} of a tool."""
    match name:
        case "echo":
            return text(str(arguments.get("text", "")))
        case "sleep":
            time.sleep(float(str(arguments["seconds"])))
            return text(f"slept {arguments['seconds']}")
        case "big":
            return text("x" * int(str(arguments["chars"])))
        case "die":
            os._exit(7)
        case "die_once":
            marker = str(arguments["marker"])
            if not os.path.exists(marker):
                open(marker, "w").close()
                print("dying as told", file=sys.stderr, flush=True)
                os._exit(7)
            return text("survived")
        case "pid":
            return text(str(os.getpid()))
        case "env":
            return text(json.dumps(dict(os.environ)))
        case "refuse":
            return {"error": {"code": -32602, "message": "q is required"}}
        case "code_of_closed":
            return {"error": {"code": -32000, "message": "my own error"}}
        case "outage":
            return {"error": {"code": -32603, "message": f"fetch failed {os.environ.get('KEY')}"}}
        case "tool_error":
            return text("no such page", is_error=True)
        case "nonsense":
            return {"content": "not a list"}
        case "parts":
            image = {"type": "image", "data": "AAAA", "mimeType": "image/png"}
            return {"content": [{"type": "text", "text": "one"}, image]}
        case "structured":
            return {"content": [], "structuredContent": {"a": 1}}
        case "half_pair":
            with LOCK:
                raw = '{"content":[{"type":"text","text":"cut \\ud83d"}],"isError":false}'
                return {"raw": raw}
        case "stderr":
            for part in arguments["parts"]:  # type: ignore[attr-defined]
                print(part, end="", file=sys.stderr, flush=True)
                time.sleep(0.05)
            return text("written")
        case "babble":  # lines that are no messages, without end
            while True:
                with LOCK:
                    print("debug output", flush=True)
                time.sleep(0.01)
        case "drip":  # an answer that never ends, a byte at a time
            while True:
                os.write(1, b" ")
                time.sleep(0.01)
        case "flood":
            while True:
                os.write(1, b"x" * 2**16)
        case "unasked":
            for number in range(100):
                write({"jsonrpc": "2.0", "id": 10_000 + number, "result": {}})
                write({"jsonrpc": "2.0", "method": "notifications/nobody_knows"})
            return text("after all")
        case "noise":
            print("debug output on stdout", flush=True)
            return text("after noise")
    return {"error": {"code": -32601, "message": f"no tool {name}"}}


def answer(message: dict[str, object]) -> None:
    method, identity = message.get("method"), message.get("id")
    params = message.get("params") or {}
    assert isinstance(params, dict)
    if identity is None:
        return
    if method == "initialize":
        server = {"name": "rogue", "version": "1"}
        result: dict[str, object] = {
            "protocolVersion": "2024-11-05",
            "capabilities": {"tools": {}},
            "serverInfo": server,
        }
    elif method == "tools/list":
        # Two pages, to see that all are read.
        names = ["echo", "sleep"] if "cursor" not in params else ["die", "pid"]
        tools = [{"name": name, "inputSchema": {"type": "object"}} for name in names]
        result = {"tools": tools} | ({} if "cursor" in params else {"nextCursor": "2"})
    elif method == "tools/call":
        result = call(str(params["name"]), params.get("arguments") or {})
        if "raw" in result:
            with LOCK:
                print(f'{{"jsonrpc":"2.0","id":{identity},"result":{result["raw"]}}}')
                sys.stdout.flush()
            return
    else:
        result = {}
    body = {"error": result["error"]} if "error" in result else {"result": result}
    write({"jsonrpc": "2.0", "id": identity} | body)


def main() -> None:
    mode, *rest = [*sys.argv[1:], "ok"]
    if mode == "exit":
        print("cannot find my configuration", file=sys.stderr)
        sys.exit(3)
    if mode == "garbage":
        print("<html>this is not a protocol</html>", flush=True)
        time.sleep(60)
    if mode == "mute":
        time.sleep(60)
    if mode == "slow":
        time.sleep(float(rest[0]))
    if mode == "banner":
        print("Rogue server 1.0 is listening", flush=True)
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if mode == "flaky":
        with open(rest[0], "a+") as file:
            file.write("x")
            file.seek(0)
            if len(file.read()) > 1:
                sys.exit(4)
    for line in sys.stdin:
        message = json.loads(line)
        if mode == "single":
            answer(message)
        else:
            threading.Thread(target=answer, args=(message,), daemon=True).start()
    if mode == "stubborn":
        time.sleep(60)


if __name__ == "__main__":
    main()
