"""A small MCP server over streamable HTTP that misbehaves on demand: `rogue_http_server.py PORT`.

The handshake works; every tool is a way to break an answer. See `answer`.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

STOP = threading.Event()
"""Set when the session ends, so that no thread outlives a test for long."""


def result(identity: object, text: str) -> bytes:
    content = {"content": [{"type": "text", "text": text}], "isError": False}
    return json.dumps({"jsonrpc": "2.0", "id": identity, "result": content}).encode()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.reply(405, b"")

    def do_DELETE(self) -> None:
        self.reply(200, b"")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        message = json.loads(body)
        identity, method = message.get("id"), message["method"]
        if identity is None:
            self.reply(202, b"")
        elif method == "initialize":
            info = {
                "protocolVersion": message["params"]["protocolVersion"],
                "capabilities": {"tools": {}},
                "serverInfo": {"name": "rogue", "version": "1"},
            }
            content = {"jsonrpc": "2.0", "id": identity, "result": info}
            self.reply(200, json.dumps(content).encode(), session="s1")
        elif method == "tools/list":
            tools = [{"name": "echo", "inputSchema": {"type": "object"}}]
            content = {"jsonrpc": "2.0", "id": identity, "result": {"tools": tools}}
            self.reply(200, json.dumps(content).encode())
        elif method == "tools/call":
            self.answer(message["params"]["name"], identity)
        else:
            self.reply(200, json.dumps({"jsonrpc": "2.0", "id": identity, "result": {}}).encode())

    def answer(self, tool: str, identity: object) -> None:
        good = result(identity, "fine")
        kind, _, argument = tool.partition("-")
        match kind:
            case "echo":
                self.reply(200, good)
            case "hang":
                STOP.wait(60)
                self.close_connection = True
            case "drip":
                self.start(200, "text/event-stream" if argument == "sse" else "application/json")
                while not STOP.wait(0.05):
                    self.chunk(b": still here\n" if argument == "sse" else b" ")
            case "flood":
                self.start(200, "text/event-stream" if argument == "sse" else "application/json")
                while not STOP.is_set():
                    self.chunk(b"data: " + b"x" * 2**20 if argument == "sse" else b" " * 2**20)
            case "status":
                self.reply(int(argument), b"<html>an error page</html>", kind="text/html")
            case "garbage":
                self.reply(200, b"\xff\xfe{not json")
            case "html":
                self.reply(200, b"<html>log in first</html>", kind="text/html")
            case "empty":
                self.reply(202, b"")
            case "big":
                good = result(identity, "x" * 10_000_000)
                if argument == "sse":
                    body = b"event: message\ndata: " + good + b"\n\n"
                    self.reply(200, body, kind="text/event-stream")
                else:
                    self.reply(200, good)
            case "cut":
                self.start(200, "application/json")
                self.chunk(good[:20])
                self.reset()
            case "reset":
                self.reset()
            case "redirect":
                self.reply(307, b"", location="https://elsewhere.example/mcp")
            case _:
                self.reply(400, b"no such tool", kind="text/plain")

    def reply(
        self,
        status: int,
        body: bytes,
        kind: str = "application/json",
        session: str = "",
        location: str = "",
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if session:
            self.send_header("Mcp-Session-Id", session)
        if location:
            self.send_header("Location", location)
        self.end_headers()
        self.wfile.write(body)

    def start(self, status: int, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def chunk(self, data: bytes) -> None:
        try:
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.flush()
        except OSError:  # the client has gone
            sys.exit()

    def reset(self) -> None:
        self.wfile.flush()
        time.sleep(0.05)
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        pass


if __name__ == "__main__":
    Server(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
