"""Proves that nothing which reads from the network imports what could run the bytes it reads."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "megatron_matpo"
DANGEROUS = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
# A pipe to its own child, which it started itself.
ALLOWED = {"mcp_tools/python_sandbox.py", "mcp_tools/sandbox_child.py"}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]


def calls(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def test_no_module_unpickles() -> None:
    found = {
        f"{name} imports {module}"
        for path in PACKAGE.rglob("*.py")
        for module in imports(path)
        if module in DANGEROUS and (name := path.relative_to(PACKAGE).as_posix()) not in ALLOWED
    }
    assert found == set()


def test_torch_files_are_not_loaded() -> None:
    """`torch.load` unpickles; weights are safetensors."""
    found = [path for path in PACKAGE.rglob("*.py") if "torch.load" in set(calls(path))]
    assert found == []


def test_object_collectives_stay_between_trainer_ranks() -> None:
    """They pickle, so no process that is not of the trainer may take part."""
    names = {"gather_object", "all_gather_object", "broadcast_object_list", "scatter_object_list"}
    users = {
        path.relative_to(PACKAGE).parts[0]
        for path in PACKAGE.rglob("*.py")
        if any(call.rsplit(".", 1)[-1] in names for call in calls(path))
    }
    assert users <= {"megatron", "trainer"}
