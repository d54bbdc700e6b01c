"""Proves that pyproject.toml, requirements, the image and the documents name the same versions."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from megatron_matpo.doctor.gpus import MIN_DRIVER
from megatron_matpo.doctor.pins import same_version

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What a document says of another version on purpose: (document, text).
OTHERS: set[tuple[str, str]] = set()


def exact(requirement: str) -> tuple[str, str] | None:
    """(package, version) of an exact pin."""
    parsed = Requirement(requirement)
    (specifier,) = parsed.specifier if len(parsed.specifier) == 1 else (None,)
    if specifier is None or specifier.operator != "==":
        return None
    return parsed.name.lower().replace("_", "-"), specifier.version


def pyproject_pins() -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    requirements = [*project["dependencies"], *(item for extra in extras for item in extra)]
    return dict(pin for item in requirements if (pin := exact(item)))


def file_pins(file: Path) -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in file.read_text().splitlines()]
    requirements = [line for line in lines if line and not line.startswith("-")]
    found = dict(pin for item in requirements if (pin := exact(item)))
    assert len(found) == len(requirements), f"{file.name} pins everything exactly, and once"
    return found


def argument(name: str) -> str:
    """Default of one of the Dockerfile's arguments."""
    (value,) = re.findall(rf'^ARG {name}="?([^"\n]+)"?$', DOCKERFILE, re.MULTILINE)
    return value


PINS = pyproject_pins()


@pytest.mark.parametrize(
    "file", sorted((ROOT / "requirements").glob("*.txt")), ids=lambda f: f.name
)
def test_requirements_agree_with_pyproject(file):
    pins = file_pins(file)
    assert pins
    wrong = {
        name: (have, PINS[name]) for name, have in pins.items() if PINS.get(name, have) != have
    }
    assert wrong == {}


def test_the_two_environments_agree_on_what_passes_between_them():
    """Tensors over torch.distributed, and a model folder that both read."""
    trainer = file_pins(ROOT / "requirements" / "trainer-cpu.txt")
    rollout = file_pins(ROOT / "requirements" / "rollout-cpu.txt")
    shared = ("torch", "transformers", "tokenizers", "safetensors")
    assert {name: trainer[name] for name in shared} == {name: rollout[name] for name in shared}


def test_the_image_is_that_of_the_pinned_sglang():
    assert argument("SGLANG_IMAGE") == f"lmsysorg/sglang:v{PINS['sglang']}"
    compose = (ROOT / "docker-compose.yaml").read_text()
    assert re.findall(r"lmsysorg/sglang:v([\d.]+)", compose) == [PINS["sglang"]]


def test_transformer_engine_is_one_that_megatron_core_asks_for():
    wanted = [
        Requirement(text)
        for text in importlib.metadata.requires("megatron-core") or []
        if Requirement(text).name.lower().replace("_", "-") == "transformer-engine"
    ]
    assert wanted, "Megatron-Core says which it takes"
    version = argument("TRANSFORMER_ENGINE_VERSION")
    assert all(version in item.specifier for item in wanted)


def test_flash_attention_is_not_newer_than_transformer_engine_takes():
    assert Version(argument("FLASH_ATTN_VERSION")) <= Version("2.8.3")


def test_sources_are_fixed():
    assert re.fullmatch(r"[0-9a-f]{40}", argument("APEX_COMMIT"))
    for name in ("SGLANG_IMAGE", "NODE_IMAGE", "PYTHON_IMAGE"):
        assert re.search(r":v?\d+\.\d+\.\d+|@sha256:[0-9a-f]{64}$", argument(name)), name
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert bases and all(re.fullmatch(r"\$\{[A-Z]+_IMAGE\}", base) for base in bases)
    assert re.findall(r"pip install (?:--no-build-isolation )?([a-z]\S*)", DOCKERFILE) == []


@pytest.mark.parametrize(
    ("pattern", "package"),
    [
        (r"SGLang (\d+\.\d+\.\d+)", "sglang"),
        (r"sglang(?:==|:v)(\d+\.\d+\.\d+)", "sglang"),
        (r"Megatron-Core (\d+\.\d+\.\d+)", "megatron-core"),
        (r"megatron-core(?:==| )(\d+\.\d+\.\d+)", "megatron-core"),
        (r"\btorch(?:==| )(\d+\.\d+\.\d+)", "torch"),
        (r"(?:nemo-run==|NeMo-Run )(\d+\.\d+\.\d+)", "nemo-run"),
        (r"transformers(?:==| )(\d+\.\d+\.\d+)", "transformers"),
    ],
)
def test_documents_name_the_pinned_versions(pattern, package):
    wrong = [
        (document.name, match[0])
        for document in DOCUMENTS
        for match in re.finditer(pattern, document.read_text())
        if match[1] != PINS[package]
    ]
    assert set(wrong) <= OTHERS


def test_the_images_document_names_what_the_image_has():
    text = (ROOT / "docs" / "docker.md").read_text()
    names = ("SGLANG_IMAGE", "TRANSFORMER_ENGINE_VERSION", "FLASH_ATTN_VERSION", "APEX_COMMIT")
    for name in names:
        assert argument(name) in text, name
    assert f"R{MIN_DRIVER}" in text


def test_a_build_tag_is_not_another_version():
    assert same_version("2.13.0+cu130", "2.13.0")
    assert not same_version("2.13.1", "2.13.0")
