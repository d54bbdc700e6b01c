"""What a user gets wrong: one clear message, the right exit code, within seconds, nothing left."""

import socket
import time

import pyarrow.parquet as pq
import pytest

from tests.helpers.matpo import QUICKSTART, run_matpo, wait_until_gone

pytestmark = [pytest.mark.smoke, pytest.mark.timeout(300)]
CONFIGURATION, RUN_TIME = 2, 1


def fails(tmp_path, *overrides, limit_s):
    started = time.monotonic()
    done = run_matpo("train", QUICKSTART, f"run.dir={tmp_path}", "run.name=bad", *overrides)
    assert time.monotonic() - started < limit_s, done.stdout
    assert wait_until_gone(tmp_path / "bad") == []
    assert "Traceback" not in done.stdout.split("last lines of")[0], done.stdout
    return done.returncode, done.stdout


def test_missing_model_folder(tmp_path):
    code, text = fails(tmp_path, "model.path=/nowhere/model", limit_s=20)
    assert code == CONFIGURATION
    assert "model.path=/nowhere/model" in text


def test_parquet_without_a_column(tmp_path):
    table = pq.read_table("examples/smallworld/data/matpo_train.parquet")
    file = tmp_path / "cut.parquet"
    pq.write_table(table.drop_columns(["reward_model"]), file)
    code, text = fails(tmp_path, f"data.train={file}", limit_s=20)
    assert code == CONFIGURATION
    assert "reward_model" in text
    assert str(file) in text


def test_tensor_parallel_that_does_not_divide(tmp_path):
    code, text = fails(tmp_path, "parallel.tensor=3", limit_s=20)
    assert code == CONFIGURATION
    assert "parallel.tensor=3" in text


def test_several_mistakes_are_told_together(tmp_path):
    overrides = ["rollout.num_server=2", "precision=fp7", "parallel.tensor=3"]
    code, text = fails(tmp_path, *overrides, limit_s=20)
    assert code == CONFIGURATION
    assert "rollout.num_servers" in text
    assert "precision" in text
    assert "parallel.tensor=3" in text


def test_port_already_taken(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, text = fails(tmp_path, f"cluster.base_port={port}", limit_s=20)
    assert code == RUN_TIME
    assert str(port) in text
    assert "cluster.base_port" in text


def test_engine_that_dies_at_start(tmp_path):
    code, text = fails(tmp_path, "rollout.engine_args=[--no-such-flag]", limit_s=90)
    assert code == RUN_TIME
    assert "engine-0" in text
    assert "--no-such-flag" in text


def test_mcp_program_that_does_not_exist(tmp_path):
    key = "tools.servers.search_and_scrape_webpage.command"
    code, text = fails(tmp_path, f"{key}=no-such-program", limit_s=20)
    assert code == CONFIGURATION
    assert "no-such-program" in text


def test_mcp_server_that_exits_at_start(tmp_path):
    key = "tools.servers.search_and_scrape_webpage.args"
    code, text = fails(tmp_path, f"{key}=[-m,no_such_module]", limit_s=60)
    assert code == RUN_TIME
    assert "search_and_scrape_webpage" in text
    assert "no_such_module" in text
