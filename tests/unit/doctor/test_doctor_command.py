"""Proves `matpo doctor` from outside: exit codes, JSON, modes, secrets, deadlines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_matpo.config.doctor import DoctorConfig
from megatron_matpo.doctor import command
from megatron_matpo.doctor.catalogue import CHECKS, NODE_CHECKS, table
from megatron_matpo.doctor.child import ask, ask_python
from megatron_matpo.doctor.command import Request, doctor, read_site, run_checks
from megatron_matpo.doctor.lines import Check, Line
from megatron_matpo.doctor.nodes import exit_code
from megatron_matpo.doctor.text import as_text, redact
from megatron_matpo.errors import ConfigError
from tests.helpers.doctor_site import site_of

ROOT = Path(__file__).parents[3]
QUICKSTART = str(ROOT / "recipes" / "quickstart.yaml")
KEY = 'sk-planted-"98765\\43210'  # JSON writes it in another way


def matpo(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "megatron_matpo", "doctor", *arguments]
    return subprocess.run(
        argv, capture_output=True, text=True, cwd=ROOT, env=os.environ | env, timeout=200
    )


def test_the_preflight_of_the_quickstart_is_one_line(tmp_path):
    done = matpo("--preflight", QUICKSTART, f"run.dir={tmp_path}", "doctor.min_disk_mb_s=0")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("doctor: ") and done.stdout.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_failure_is_exit_code_1_and_json_has_it_without_the_keys(tmp_path):
    """The planted key is quoted by the server that fails, and named by the recipe."""
    recipe = tmp_path / "recipe.yaml"
    code = "import os, sys; sys.exit('who is ' + os.environ['SERPER_API_KEY'])"
    servers = {"s": {"command": "python", "args": ["-c", code], "env_from": ["SERPER_API_KEY"]}}
    settings = {"base_url": "http://127.0.0.1:9", "deadline_s": 100}
    judge = {"grader": "judge", "judge": settings}
    content = {"base": QUICKSTART, "tools": {"servers": servers}, "reward": judge}
    recipe.write_text(json.dumps(content))
    arguments = ["--preflight", str(recipe), f"run.dir={tmp_path}"]
    keys = {"SERPER_API_KEY": KEY, "OPENAI_API_KEY": KEY}
    done = matpo("--json", *arguments, **keys)
    assert done.returncode == 1
    lines = {line["name"]: line for line in json.loads(done.stdout)}
    assert lines["tools.servers.s"]["status"] == "fail"
    assert "who is ***" in lines["tools.servers.s"]["seen"]
    assert lines["keys"]["status"] == "pass"
    assert lines["judge"]["status"] == "fail"
    assert set(lines["keys"]) == {"name", "status", "seen", "fix", "node"}
    text = matpo(*arguments, **keys)
    assert text.returncode == 1
    assert "doctor: " in text.stdout and "2 FAILED" in text.stdout
    said = done.stdout + done.stderr + text.stdout + text.stderr
    assert KEY not in said and json.dumps(KEY)[1:-1] not in said and "98765" not in said


def test_what_cannot_be_read_at_all_is_exit_code_2(tmp_path):
    done = matpo("--preflight", str(tmp_path / "none.yaml"))
    assert done.returncode == 2
    assert "no such recipe file" in done.stderr
    done = matpo("--preflight", QUICKSTART, "run.steps=0", f"run.dir={tmp_path}")
    assert done.returncode == 2
    assert "run.steps=0: must be at least 1" in done.stdout
    with pytest.raises(ConfigError, match=r"doctor\.disk_test_mib=0"):
        read_site(Request(overrides=("doctor.disk_test_mib=0",)))


def test_wrong_values_of_a_recipe_are_lines_and_the_rest_is_still_checked():
    site = read_site(Request(QUICKSTART, ("rollout.top_p=7", "no.such=1")))
    (check,) = (check for check in CHECKS if check.name == "recipe")
    lines = check.run(site)
    assert [line.status for line in lines] == ["fail", "fail"]
    assert "no" in lines[0].seen and "rollout.top_p=7" in lines[1].seen


def test_a_recipe_is_for_whichever_command_takes_it(tmp_path):
    (check,) = (check for check in CHECKS if check.name == "recipe")
    (line,) = check.run(read_site(Request(QUICKSTART)))
    assert line.seen == f"{QUICKSTART} is in order for matpo train"
    (line,) = check.run(replace(read_site(Request(QUICKSTART)), num_nodes=2))
    assert line.seen == "cluster.num_nodes=1: the doctor was started on 2 nodes"
    demos = tmp_path / "demos.jsonl"
    messages = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    demos.write_text(json.dumps({"messages": messages}) + "\n")
    sft = (f"sft.data={demos}", "data.train=", "eval.sets=[]")
    (line,) = check.run(read_site(Request(QUICKSTART, sft)))
    assert (line.status, line.seen.endswith("for matpo sft")) == ("pass", True)
    (line,) = check.run(read_site(Request(QUICKSTART, (*sft, f"sft.data={demos}x"))))
    assert line.seen == f"sft.data={demos}x: no such file"
    (line,) = check.run(read_site(Request(QUICKSTART, ("data.train=/nowhere", "eval.sets=[]"))))
    assert line.seen.startswith("data.train=/nowhere: ")


def test_an_override_in_the_recipes_place_is_an_override(monkeypatch, capsys):
    from megatron_matpo.__main__ import main

    asked: list[Request] = []
    monkeypatch.setattr(command, "doctor", lambda request: asked.append(request) or 0)
    assert main(["doctor", "cluster.gpus_per_node=8", "--build", "run.name=x"]) == 0
    assert main(["doctor", "r.yaml", "--json"]) == 0
    assert asked == [
        Request("", ("cluster.gpus_per_node=8", "run.name=x"), "build"),
        Request("r.yaml", (), "full", True),
    ]


def check_of(name: str, run, **flags: bool) -> Check:
    return Check(name, "something", "do something", run, **flags)


def test_checks_that_break_or_hang_are_lines_and_the_others_go_on(tmp_path):
    release = threading.Event()

    def breaks(_):
        raise ZeroDivisionError("oops")

    def hangs(_):
        release.wait(60)
        return []

    def works(_):
        return [Line("works", "pass", "fine")]

    site = site_of(tmp_path, doctor=DoctorConfig(check_timeout_s=0.2))
    command_grace = command._GRACE_S
    try:
        command._GRACE_S = 0.0
        checks = tuple(check_of(run.__name__, run) for run in (breaks, hangs, works))
        lines = run_checks(site, checks)
    finally:
        command._GRACE_S = command_grace
        release.set()
    assert [(line.name, line.status) for line in lines] == [
        ("breaks", "fail"),
        ("hangs", "fail"),
        ("works", "pass"),
    ]
    assert "ZeroDivisionError: oops" in lines[0].seen
    assert "no answer in 0.2 s" in lines[1].seen and "doctor.check_timeout_s" in lines[1].fix


def test_modes_choose_checks_and_a_build_says_what_it_leaves_out(tmp_path):
    def fine(_):
        return [Line("ran", "pass", "")]

    checks = (
        check_of("quick", fine),
        check_of("slow", fine, in_preflight=False),
        check_of("soft", fine, in_build=True),
    )
    site = site_of(tmp_path)
    assert len(run_checks(site, checks)) == 3
    assert len(run_checks(replace(site, mode="preflight"), checks)) == 2
    lines = run_checks(replace(site, mode="build"), checks)
    assert [(line.name, line.status) for line in lines] == [
        ("ran", "pass"),
        ("quick", "skipped"),
        ("slow", "skipped"),
    ]


def test_one_line_stands_for_what_passes_on_all_nodes():
    lines = [
        Line("gpu.driver", "pass", "580", node="0 (a)"),
        Line("gpu.driver", "pass", "581", node="1 (b)"),
        Line("gpu.driver", "fail", "none", "repair", node="2 (c)"),
    ]
    text = as_text(lines, is_brief=False).splitlines()
    assert text[0].split(maxsplit=2)[2] == "node 0 (a), 1 (b): 580"
    assert text[1].split(maxsplit=2)[2] == "node 2 (c): none"
    assert text[2].split() == ["->", "repair"]
    assert text[3] == "doctor: 2 passed, 1 FAILED"
    assert as_text(lines[:2], is_brief=True) == "doctor: 2 passed\n"
    same = [Line("disk.shm", "warn", "64 MB", "more", node=f"{i} (n)") for i in range(5)]
    same.append(Line("disk.shm", "warn", "32 MB", "more", node="5 (n)"))
    text = as_text(same, is_brief=True).splitlines()
    assert text[0].split(maxsplit=2)[2] == "node 0 (n), 1 (n), 2 (n) and 2 more: 64 MB"
    assert text[2].split(maxsplit=2)[2] == "node 5 (n): 32 MB"


def test_redaction_takes_longer_secrets_first():
    assert redact("abcdef abcd", ["abcdef", "abcd"]) == "*** ***"


def test_children_are_ended_with_their_own_children(tmp_path):
    marker = tmp_path / "alive"
    script = f"(sleep 2; touch {marker}) & sleep 60"
    answer = ask(["sh", "-c", script], 0.3)
    assert answer.problem.startswith("no answer in")
    time.sleep(2.5)
    assert not marker.exists()


def test_a_childs_words_count_until_it_dies():
    answer = ask_python(sys.executable, "tell(a=1); import os; os.abort()", 30.0)
    assert answer.told == {"a": 1}
    assert "SIGABRT" in answer.problem
    answer = ask_python(sys.executable, "tell(a=1); raise KeyError('gone')", 30.0)
    assert answer.problem == "KeyError: 'gone'"
    assert ask(["/nowhere/x"], 1.0).problem == "/nowhere/x: No such file or directory"


def test_the_exit_code_says_whether_this_node_is_to_blame():
    lines = [Line("a", "fail", "", node="2 (c)"), Line("b", "warn", "", node="0 (a)")]
    assert [exit_code(lines, node, 3) for node in range(3)] == [3, 3, 1]
    assert exit_code([Line("a", "fail", "about all")], 0, 3) == 3
    assert exit_code([Line("a", "fail", "")], 0, 1) == 1
    assert exit_code(lines[1:], 0, 3) == 0


def test_a_wrong_recipe_is_the_exit_code_of_a_wrong_configuration():
    lines = [Line("recipe", "fail", "", node="1 (b)"), Line("a", "fail", "", node="1 (b)")]
    assert [exit_code(lines, node, 2) for node in range(2)] == [2, 2]


def test_the_documents_table_is_that_of_the_code():
    text = (ROOT / "docs" / "doctor.md").read_text()
    assert table() in text
    assert len({*(check.name for check in CHECKS), *(row[0] for row in NODE_CHECKS)}) == 26


def test_exit_code_is_0_with_warnings(tmp_path, capsys, monkeypatch):
    line = Line("only", "warn", "so so", "perhaps")
    monkeypatch.setattr(command, "CHECKS", (check_of("only", lambda _: [line]),))
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    assert doctor(Request(overrides=(f"run.dir={tmp_path}",), mode="preflight")) == 0
    assert "doctor: 0 passed, 1 warnings" in capsys.readouterr().out
