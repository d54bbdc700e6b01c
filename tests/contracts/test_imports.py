"""Proves who imports whom: the table of docs/architecture.md, on the syntax trees of all files.

Downward only (the order below), no cycles between modules, heavy packages only where allowed. What
a subprocess imports by name (`python -m`) is not seen.
"""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "megatron_matpo"

# Each may import itself and what comes before it, except for BANNED.
ORDER = [
    *(
        "types",
        "errors",
        "wire",
        "config",
        "planning",
        "simulation",
        "cache",
        "ports",
        "obs",
        "checkpoint_files",
        "algo",
        "data",
        "agents",
        "mcp_tools",
        "rewards",
        "bound_store",
    ),
    *("rollout", "evaluation", "megatron", "weight_sync", "trainer", "launch", "prepare", "doctor"),
    *("command_line", "__main__"),
]
RUNS = ("rollout", "evaluation", "megatron", "weight_sync", "trainer", "launch")
BANNED = {
    "rollout": {"megatron", "algo"},
    "evaluation": {"algo", "agents", "mcp_tools"},
    "megatron": {"rollout", "evaluation", "agents", "mcp_tools", "rewards"},
    "weight_sync": {"rollout", "evaluation", "agents", "mcp_tools", "rewards"},
    "config": {"types", "wire"},
    "planning": {"types", "wire"},
    "simulation": {"types", "wire"},
    "launch": {"trainer", "megatron", "weight_sync", "algo", "agents", "mcp_tools", "rewards"},
    "prepare": {*("obs", "algo", "rewards"), *RUNS},
    "doctor": {*("algo", "data", "agents", "trainer", "megatron", "evaluation", "prepare")},
    "__main__": {"trainer", "megatron", "weight_sync", "rollout"},
}
# Of `rollout` the supervisor may know only how an engine is started.
LAUNCH_FROM_ROLLOUT = {"megatron_matpo.rollout.engine_command"}

# Heavy package -> who may import it (packages, or single files).
HEAVY = {
    "torch": {
        "algo",
        "megatron",
        "weight_sync",
        "trainer",
        "bound_store.py",
        "launch/torchrun.py",
        "launch/rendezvous.py",
        "doctor/collectives.py",
    },
    "megatron": {"megatron"},
    "transformer_engine": {"megatron"},
    "safetensors": {"megatron"},
    "omegaconf": {"config"},
    "yaml": {"config", "obs", "simulation"},
    "pyarrow": {"data"},
    "tokenizers": {"data"},
    "mcp": {"mcp_tools"},
    "httpx2": {"mcp_tools"},
    "orjson": {"rollout"},
    "aiohttp": {"rollout", "rewards", "mcp_tools"},
    "openai": set(),  # the judge needs one POST
    "wandb": {"obs"},
    "nemo_run": {"launch"},
    "transformers": set(),
    "sglang": set(),
    "ray": set(),
}
# Only inside functions: a run that does not use them must not need them.
LAZY = {"wandb", "openai", "nemo_run", "transformer_engine", "pyarrow"}
# Run by the rollout environment's Python, where SGLang lives; nothing of ours imports them.
OTHER_ENVIRONMENT = "rollout/sglang_cpu/"


@dataclass(frozen=True)
class Import:
    file: str
    """Relative to the package."""
    module: str
    """Absolute name of what is imported."""
    is_lazy: bool

    @property
    def owner(self) -> str:
        return part_of(self.file)


def part_of(file: str) -> str:
    return file.split("/")[0].removesuffix(".py")


def own_files() -> list[Path]:
    files = sorted((ROOT / PACKAGE).rglob("*.py"))
    inside = [file for file in files if OTHER_ENVIRONMENT not in file.as_posix()]
    assert len(inside) > 20, "the package was found"
    return inside


def imports_of(file: Path) -> Iterator[Import]:
    name = file.relative_to(ROOT / PACKAGE).as_posix()
    tree = ast.parse(file.read_text())
    # Inside functions, or for the type checker alone.
    lazy = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING")
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(name, alias.name, id(node) in lazy)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            assert node.module is not None
            for alias in node.names:
                yield Import(name, f"{node.module}.{alias.name}", id(node) in lazy)


def all_imports() -> list[Import]:
    return [item for file in own_files() for item in imports_of(file)]


def own_part(module: str) -> str | None:
    """Package of ours that `module` belongs to; None for all others."""
    names = module.split(".")
    if names[0] != PACKAGE or len(names) < 2 or names[1] not in ORDER:
        return None
    return names[1]


def test_every_package_has_its_place():
    parts = {part_of(file.relative_to(ROOT / PACKAGE).as_posix()) for file in own_files()}
    assert parts - {"__init__"} <= set(ORDER)


def test_packages_import_downward_only():
    wrong = []
    for item in all_imports():
        part = own_part(item.module)
        if part is None or part == item.owner:
            continue
        is_below = item.owner in ORDER and ORDER.index(part) < ORDER.index(item.owner)
        if not is_below or part in BANNED.get(item.owner, set()):
            wrong.append(f"{item.file} imports {item.module}")
    assert wrong == []


def test_the_supervisor_knows_only_how_an_engine_is_started():
    used = {
        item.module.rsplit(".", 1)[0]
        for item in all_imports()
        if item.owner == "launch" and own_part(item.module) == "rollout"
    }
    assert used <= LAUNCH_FROM_ROLLOUT


def test_heavy_packages_are_imported_only_where_allowed():
    wrong = []
    for item in all_imports():
        allowed = HEAVY.get(item.module.split(".")[0])
        if allowed is not None and not {item.owner, item.file} & allowed:
            wrong.append(f"{item.file} imports {item.module}")
    assert wrong == []


def test_optional_packages_are_imported_inside_functions():
    wrong = [
        f"{item.file} imports {item.module}"
        for item in all_imports()
        if item.module.split(".")[0] in LAZY and not item.is_lazy
    ]
    assert wrong == []


def test_modules_have_no_import_cycles():
    names = {
        ".".join((PACKAGE, *file.relative_to(ROOT / PACKAGE).with_suffix("").parts)): file
        for file in own_files()
    }
    modules = {name.removesuffix(".__init__"): file for name, file in names.items()}
    graph: dict[str, set[str]] = {}
    for name, file in modules.items():
        graph[name] = set()
        for item in imports_of(file):
            target = item.module
            while target and target not in modules:
                target = target.rpartition(".")[0]
            # Importing a package for its own submodule is no cycle.
            if target not in ("", name, PACKAGE) and not item.is_lazy:
                graph[name].add(target)
    graphlib.TopologicalSorter(graph).prepare()
