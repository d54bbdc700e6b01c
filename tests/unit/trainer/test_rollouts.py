"""Where batches come from: what each failure of the manager becomes, and replay."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from megatron_matpo.config.rollout import RolloutConfig
from megatron_matpo.errors import DataError, DeadlineError, RolloutError
from megatron_matpo.obs.stop_request import is_stop_requested, request_stop
from megatron_matpo.trainer.rollouts import ManagerRollouts, ReplayRollouts
from megatron_matpo.trainer.stopping import StopRequested
from megatron_matpo.wire import encode, recording_path
from tests.helpers.episodes import make_batch

BATCH = make_batch(1)


class FakeManager(BaseHTTPRequestHandler):
    """Speaks the manager's HTTP interface; the requested step says how it behaves."""

    def do_GET(self):
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
        if body["step"] == 1:
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
        server.ready, server.requests = True, []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def rollouts(server, run_dir=Path("."), step_timeout_s=20.0, start_timeout_s=1.0, **config):
    return ManagerRollouts(
        RolloutConfig(step_timeout_s=step_timeout_s, **config),
        f"http://127.0.0.1:{server.server_port}",
        "secret-token",
        lambda data: data,
        run_dir,
        is_first_rank=True,
        start_timeout_s=start_timeout_s,
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
