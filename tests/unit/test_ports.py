"""Proves that taken ports are named and that runs started side by side never share a port."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from megatron_matpo import ports
from megatron_matpo.errors import MatpoError

HOST = "127.0.0.1"


@pytest.fixture(autouse=True)
def release_after():
    yield
    for port in list(ports._held):
        ports._release(port)


def test_free_ports_are_distinct_and_can_be_bound():
    found = ports.free_ports(HOST, 20)
    assert len(set(found)) == 20
    for port in found:
        with socket.socket() as server:
            server.bind((HOST, port))


def test_processes_that_choose_at_the_same_time_get_different_ports():
    code = (
        "import random, sys; from megatron_matpo import ports; "
        # The same sequence of guesses in every process: only the locks can keep them apart.
        "ports.random.SystemRandom = lambda generator=random.Random(1): generator; "
        "print(*ports.free_ports('127.0.0.1', 5), flush=True); sys.stdin.read()"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    found = [run.stdout.readline().split() for run in runs if run.stdout]
    for run in runs:
        run.communicate(timeout=10)
    assert len({port for line in found for port in line}) == 15


def test_ports_are_free_again_when_the_process_has_ended():
    base = ports.free_ports(HOST, 1)[0]
    ports._release(base)
    code = f"from megatron_matpo import ports; ports.free_ports('{HOST}', 1, {base})"
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], check=True, timeout=10)


def test_a_base_port_gives_consecutive_ports():
    base = ports.free_ports(HOST, 1)[0]
    ports._release(base)
    assert ports.free_ports(HOST, 1, base) == [base]


def test_a_taken_port_is_named_with_the_setting_and_the_process():
    with socket.socket() as server:
        server.bind((HOST, 0))
        server.listen(1)
        port = server.getsockname()[1]
        with pytest.raises(MatpoError) as caught:
            ports.free_ports(HOST, 2, port)
    text = str(caught.value)
    assert caught.value.exit_code == 1
    assert f"port {port} on {HOST} is taken" in text
    assert f"(pid {os.getpid()})" in text
    assert f"cluster.base_port={port}" in text
    assert ports._held == {}


def test_a_port_that_another_run_has_reserved_is_refused():
    port = ports.free_ports(HOST, 1)[0]
    with pytest.raises(MatpoError, match="another run has reserved it"):
        ports.free_ports(HOST, 1, port)


def test_a_range_must_end_at_the_last_port():
    with pytest.raises(MatpoError, match="up to 65535"):
        ports.free_ports(HOST, 3, 65534)
