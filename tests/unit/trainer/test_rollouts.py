"""Where batches come from: what each failure of the manager becomes, and replay."""

import asyncio
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from megatron_matpo.config.rollout import RolloutConfig
from megatron_matpo.errors import DataError, DeadlineError, RolloutError
from megatron_matpo.obs.stop_request import is_stop_requested, request_stop
from megatron_matpo.rollout.client import ManagerClient
from megatron_matpo.rollout.fleet import Fleet
from megatron_matpo.rollout.health import Event
from megatron_matpo.trainer.membership import ManagerMembership
from megatron_matpo.trainer.rollouts import ManagerRollouts, ReplayRollouts
from megatron_matpo.trainer.stopping import StopRequested
from megatron_matpo.weight_sync.membership import Member, Which
from megatron_matpo.wire import encode, recording_path
from tests.helpers.episodes import make_batch

BATCH = make_batch(1)


class FakeManager(BaseHTTPRequestHandler):
    """Speaks the manager's HTTP interface; the requested step says how it behaves."""

    def do_GET(self):
        if self.path == "/fleet":
            self._send(200, json.dumps({"version": 3, "engines": self.server.engines}).encode())
            return
        if self.path.startswith("/in_flight"):
            return self._send(200, self.path.encode())
        self._send(200, json.dumps({"ready": self.server.ready, "detail": "warming up"}).encode())

    def do_POST(self):
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/in_flight":
            self.server.requests.append((self.headers["Authorization"], raw))
            return self._send(204, b"")
        body = json.loads(raw)
        self.server.requests.append((self.headers["Authorization"], body))
        self.server.paths.append(self.path)
        if self.path.startswith("/fleet/"):
            self._send(400, b'{"error": "no engine 9"}') if body["engines"] == [9] else (
                self._send(200, b"{}")
            )
        elif self.server.refits:
            self._send(202, json.dumps({"refit": [self.server.refits.pop()]}).encode())
        elif body["step"] == 1:
            self._send(200, encode(BATCH))
        elif body["step"] == 2:
            self._send(500, json.dumps({"error": "5 of 8 episodes failed", "type": "x"}).encode())
        elif body["step"] == 3:
            time.sleep(3)
        elif body["step"] == 4:
            self._send(502, b"<html>bad gateway</html>")
        else:
            self.connection.close()

    def _send(self, code, data):
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with HTTPServer(("127.0.0.1", 0), FakeManager) as server:
        server.ready, server.requests, server.paths = True, [], []
        server.refits, server.engines = [], []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def client_of(server, step_timeout_s=20.0, start_timeout_s=1.0):
    return ManagerClient(
        f"http://127.0.0.1:{server.server_port}",
        "secret-token",
        start_timeout_s=start_timeout_s,
        step_timeout_s=step_timeout_s,
    )


def rollouts(server, run_dir=Path("."), step_timeout_s=20.0, refit=None, **config):
    return ManagerRollouts(
        RolloutConfig(step_timeout_s=step_timeout_s, **config),
        client_of(server, step_timeout_s),
        lambda data: data,
        run_dir,
        is_first_rank=True,
        refit=refit,
    )


def test_a_batch_arrives_whole(server):
    source = rollouts(server)
    source.connect()
    assert source.collect(1, 7, position=40) == BATCH
    (authorization, body) = server.requests[0]
    assert authorization == "Bearer secret-token"
    assert body == {"step": 1, "policy_version": 7, "split": "train", "position": 40}


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (2, "step 2: 5 of 8 episodes failed"),
        (4, "HTTP 502"),
        (5, r"broke off .* logs/manager\.log"),
    ],
)
def test_failures_are_rollout_errors_that_say_why(server, step, message):
    with pytest.raises(RolloutError, match=message) as caught:
        rollouts(server).collect(step, 0)
    assert "secret-token" not in str(caught.value)


def test_the_deadline_names_its_setting(server):
    with pytest.raises(DeadlineError, match=r"after 0\.5 s \(rollout\.step_timeout_s\)"):
        rollouts(server, step_timeout_s=0.5).collect(3, 0)


def test_a_manager_that_never_gets_ready(server):
    server.ready = False
    with pytest.raises(DeadlineError, match=r"run\.start_timeout_s\): warming up"):
        rollouts(server).connect()


def test_engines_that_wait_for_weights_get_them_and_the_same_request_goes_on(server):
    server.refits = [1, 0]
    refitted = []
    assert rollouts(server, refit=refitted.append).collect(1, 7, position=4) == BATCH
    assert refitted == [7, 7]
    bodies = [body for _, body in server.requests]
    assert len(bodies) == 3 and bodies[0] == bodies[1] == bodies[2]


def test_another_rank_refits_when_the_first_says_so(server):
    words, refitted = [b"refit", encode(BATCH)], []
    source = ManagerRollouts(
        RolloutConfig(),
        client_of(server),
        lambda data: words.pop(0),
        Path("."),
        is_first_rank=False,
        refit=refitted.append,
    )
    assert source.collect(1, 7) == BATCH
    assert refitted == [7] and server.requests == []


def test_members_are_whom_the_manager_calls_living_or_waiting(server):
    fleet = Fleet.unwatched(["a", "b", "c", "d"])
    fleet.lost({1: "gone"})
    fleet.lost({2: "gone"})
    fleet._apply(2, Event.ANSWERED, "answers")
    fleet.refit_began([3])
    server.engines = fleet.snapshot()["engines"]
    membership = ManagerMembership(client_of(server))
    members = {which: asyncio.run(membership.members(which)) for which in Which}
    assert members[Which.LIVING] == [Member(0, 0), Member(2, 1), Member(3, 0)]
    assert members[Which.WAITING] == [Member(2, 1), Member(3, 0)]
    assert [member.index for member in members[Which.ALL]] == [0, 1, 2, 3]
    assert "engine-1 is dead: gone" in asyncio.run(membership.describe())


def test_the_manager_is_told_what_became_of_a_push(server):
    membership = ManagerMembership(client_of(server))

    async def tell():
        await membership.refit_began([0, 1])
        await membership.refitted(5, [0])
        await membership.lost({1: "no answer"})

    asyncio.run(tell())
    assert server.paths == ["/fleet/refitting", "/fleet/refitted", "/fleet/lost"]
    assert [body for _, body in server.requests] == [
        {"engines": [0, 1]},
        {"version": 5, "engines": [0]},
        {"engines": {"1": "no answer"}},
    ]
    with pytest.raises(RolloutError, match="no engine 9"):
        asyncio.run(membership.refit_began([9]))


def test_replay_reads_recordings_and_names_what_is_missing(tmp_path):
    recording_path(tmp_path, 7).write_bytes(encode(BATCH))
    source = ReplayRollouts(str(tmp_path), lambda: is_stop_requested(tmp_path))
    source.connect()
    assert source.collect(7, 99) == BATCH
    with pytest.raises(DataError, match=r"rollout\.replay=.*step_000008\.rollout"):
        source.collect(8, 99)
    request_stop(tmp_path, "a test")
    with pytest.raises(StopRequested):
        source.collect(7, 99)


def test_a_request_to_stop_ends_the_wait_for_a_batch(server, tmp_path):
    source = rollouts(server, tmp_path)
    threading.Timer(0.3, request_stop, (tmp_path, "a test")).start()
    with pytest.raises(StopRequested):
        source.collect(3, 0)  # FakeManager answers step 3 after 3 s
    assert len(server.requests) == 1
    with pytest.raises(StopRequested):
        source.collect(1, 0)
    assert len(server.requests) == 1, "nothing more is asked for"


def test_groups_in_flight_come_from_the_manager_and_go_back_to_it(server, tmp_path):
    source = rollouts(server)
    assert source.in_flight(7) == b"", "a synchronous run has nothing in flight, and asks nobody"
    assert rollouts(server, max_staleness=1).in_flight(7) == b"/in_flight?step=7"
    assert rollouts(server, over_sample=0.5).in_flight(7) == b"/in_flight?step=7"
    source.restore(None)
    source.restore(tmp_path)  # the checkpoint of a synchronous run
    assert server.requests == []
    (tmp_path / "in_flight.rollout").write_bytes(b"groups")
    source.restore(tmp_path)
    assert server.requests == [("Bearer secret-token", b"groups")]
    assert source.in_flight(8) == b"/in_flight?step=8", "some of them may be left"
