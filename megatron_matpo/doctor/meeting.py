"""How the doctors of all nodes find each other: node 0 listens, and says where in the run folder.

    node 0                                   node R
    run.dir/.matpo-doctor-ID.json  ------->  reads where to connect, and a token
    accepts  <-----------------------------  {"token", "rank", "name"}
    {"do": ..., ...}  -------------------->  answers with one object

One JSON object per line. Only node 0 asks; a node answers one question after the other. A node that
does not see the file, or cannot connect, says so itself; node 0 names those that did not come.
A file that an earlier start left behind holds an address where nobody listens, or another token.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_matpo.errors import DeadlineError
from megatron_matpo.launch.nodes import Node

_POLL_S = 0.1
_CONNECT_TIMEOUT_S = 2.0
_HELLO_TIMEOUT_S = 5.0
_MAX_LINE_BYTES = 1 << 24
Message = dict[str, Any]


class PeerLostError(Exception):
    """The other side is gone, or did not answer in time; says which."""


class Link:
    """One connection, in lines of JSON."""

    def __init__(self, connection: socket.socket) -> None:
        """Takes the connection over."""
        self._socket = connection
        self._file = connection.makefile("rb")
        self.own_address: str = connection.getsockname()[0]

    def send(self, message: Mapping[str, Any]) -> None:
        """Send one object.

        Raises:
            PeerLostError: the connection broke.
        """
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise PeerLostError(f"the connection broke ({error})") from error

    def receive(self, timeout_s: float) -> Message:
        """The next object.

        Raises:
            PeerLostError: none came in time, or the connection broke.
        """
        self._socket.settimeout(timeout_s)
        try:
            line = self._file.readline(_MAX_LINE_BYTES)
        except TimeoutError as error:
            raise PeerLostError(f"no answer in {timeout_s:.0f} s") from error
        except OSError as error:
            raise PeerLostError(f"the connection broke ({error})") from error
        if not line.endswith(b"\n"):
            raise PeerLostError("it ended")
        try:
            message = json.loads(line)
        except ValueError as error:
            raise PeerLostError("it does not speak the doctor's language") from error
        return message if isinstance(message, dict) else {}

    def close(self) -> None:
        """Hang up."""
        with contextlib.suppress(OSError):
            self._file.close()
            self._socket.close()


@dataclass
class Peer:
    """A node as node 0 sees it."""

    rank: int
    name: str
    link: Link

    @property
    def label(self) -> str:
        """As `Line.node`."""
        return f"{self.rank} ({self.name})"


def _meeting_file(folder: Path, node: Node) -> Path:
    return folder / f".matpo-doctor-{node.launch_id}.json"


class Host:
    """Node 0's side; a context manager."""

    def __init__(self, folder: Path, node: Node, addresses: list[str]) -> None:
        """Listen, and write where.

        Raises:
            OSError: the folder cannot be written to.
        """
        self._num_others = node.count - 1
        self._token = secrets.token_hex(16)
        self._file = _meeting_file(folder, node)
        # All addresses: the nodes try those of the file one after the other, and need the token.
        self._listener = socket.create_server(("", 0), backlog=max(8, self._num_others))
        port = self._listener.getsockname()[1]
        text = json.dumps({"addresses": addresses, "port": port, "token": self._token})
        partial = self._file.with_suffix(f".{secrets.token_hex(4)}")
        partial.touch(mode=0o600)
        partial.write_text(text)
        partial.replace(self._file)
        self.peers: dict[int, Peer] = {}

    def __enter__(self) -> Host:
        """For `with`."""
        return self

    def __exit__(self, *_: object) -> None:
        """Hang up, and remove the file."""
        for peer in self.peers.values():
            peer.link.close()
        self._listener.close()
        self._file.unlink(missing_ok=True)

    def gather(self, timeout_s: float) -> None:
        """Wait until all nodes are there, or the time is over; `peers` says who came."""
        deadline = time.monotonic() + timeout_s
        while len(self.peers) < self._num_others:
            left = deadline - time.monotonic()
            if left <= 0:
                return
            self._listener.settimeout(left)
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                return
            link = Link(connection)
            try:
                hello = link.receive(_HELLO_TIMEOUT_S)
            except PeerLostError:
                link.close()
                continue
            rank = hello.get("rank")
            is_ours = secrets.compare_digest(str(hello.get("token")), self._token)
            if not is_ours or not isinstance(rank, int):
                link.close()
                continue
            self.peers[rank] = Peer(rank, str(hello.get("name")), link)


def join(folder: Callable[[], Path], node: Node, timeout_s: float) -> Link:
    """The link to node 0.

    Raises:
        DeadlineError: says how far it came: no file, or nobody at the addresses that it names.
    """
    deadline = time.monotonic() + timeout_s
    problem = ""
    while time.monotonic() < deadline:
        file = _meeting_file(folder(), node)
        try:
            # Listing the folder makes a network file system look again.
            os.listdir(file.parent)
            meeting = json.loads(file.read_text())
        except (OSError, ValueError):
            problem = (
                f"{file} did not appear: node 0 has not started, or this folder is not the same "
                "one on both nodes"
            )
            time.sleep(_POLL_S)
            continue
        problem = "node 0 has no address on the interface that is named (net.interface)"
        for address in meeting["addresses"]:
            try:
                connection = socket.create_connection(
                    (address, meeting["port"]), _CONNECT_TIMEOUT_S
                )
            except OSError as error:
                problem = f"node 0 cannot be reached at {address}: {error.strerror or error}"
                continue
            link = Link(connection)
            hello = {"token": meeting["token"], "rank": node.index}
            link.send({**hello, "name": node.name})
            return link
        time.sleep(_POLL_S)
    raise DeadlineError(f"{problem} (doctor.nodes_timeout_s={timeout_s:g})")
