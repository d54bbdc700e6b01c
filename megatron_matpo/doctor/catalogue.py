"""All checks, in the order of the report. `docs/doctor.md` has the table that `table()` makes."""

from __future__ import annotations

from megatron_matpo.doctor.disk import (
    check_file_system,
    check_open_files,
    check_shared_memory,
    check_space,
    check_speed,
)
from megatron_matpo.doctor.gpus import check_devices, check_driver, check_precision, check_torch
from megatron_matpo.doctor.lines import Check
from megatron_matpo.doctor.network import (
    check_infiniband,
    check_interface,
    check_locked_memory,
)
from megatron_matpo.doctor.recipe import check_recipe
from megatron_matpo.doctor.services import check_judge, check_keys, check_node, check_servers
from megatron_matpo.doctor.software import (
    check_apex,
    check_flash_attn,
    check_sglang,
    check_trainer,
    check_transformer_engine,
)

CHECKS: tuple[Check, ...] = (
    Check(
        "recipe",
        "all that `matpo train` (or sft, or eval, if the recipe is for that) would refuse: "
        "settings, data, model, tokenizer",
        "the line says what was expected",
        check_recipe,
    ),
    Check(
        "gpu.driver",
        "nvidia-smi answers; fail: it does not; warn: a driver older than CUDA 13 needs (580)",
        "install or update the driver; or the forward-compatibility package (docs/docker.md)",
        check_driver,
    ),
    Check(
        "gpu.devices",
        "number of GPUs against `cluster.gpus_per_node`, model against `cluster.gpu`; warn: memory "
        "in use, unlike GPUs",
        "`--gres=gpu:N`; leave the node out; end what nvidia-smi lists",
        check_devices,
    ),
    Check(
        "gpu.torch",
        "torch, its CUDA and NCCL; fail: a GPU that nvidia-smi lists does not compute in torch",
        "CUDA_VISIBLE_DEVICES; the driver; torch as pyproject.toml pins it",
        check_torch,
        in_preflight=False,
        in_build=True,
    ),
    Check(
        "gpu.precision",
        "what `precision` comes to on these GPUs; fail: they cannot do it",
        "docs/precision.md",
        check_precision,
    ),
    Check(
        "env.trainer",
        "pinned versions; Megatron-Core imports",
        "`make setup`, or `pip install '.[trainer]'`",
        check_trainer,
        in_build=True,
    ),
    Check(
        "env.transformer_engine",
        "imports; fail: not on a machine with GPUs",
        "install it against this torch (Dockerfile)",
        check_transformer_engine,
        in_preflight=False,
        in_build=True,
    ),
    Check(
        "env.apex",
        "NVIDIA's, with its extensions; fail: its namesake, or extensions that do not load; warn: "
        "none on a machine with GPUs",
        "build it from source (Dockerfile)",
        check_apex,
        in_preflight=False,
        in_build=True,
    ),
    Check(
        "env.flash_attn",
        "imports; fail: installed, but does not load",
        "install it against this torch (Dockerfile), or uninstall it",
        check_flash_attn,
        in_preflight=False,
        in_build=True,
    ),
    Check(
        "rollout.sglang",
        "`rollout.python` has the pinned SGLang, and its server can be started (`--help`)",
        "`make setup`; `rollout.python=`",
        check_sglang,
        in_build=True,
    ),
    Check(
        "net.interface",
        "`cluster.interface` (or NCCL_SOCKET_IFNAME) has an address; several nodes without a name "
        "take the default route's; fail: no such interface; warn: there are several",
        "`cluster.interface=IFACE`",
        check_interface,
    ),
    Check(
        "net.infiniband",
        "ports are ACTIVE and /dev/infiniband is here; fail: none, where several nodes have GPUs",
        "ibstat; `docker run --device=/dev/infiniband`; NCCL_IB_HCA",
        check_infiniband,
    ),
    Check(
        "limit.memlock",
        "locked memory; warn: limited, where InfiniBand is",
        "`ulimit -l unlimited`",
        check_locked_memory,
    ),
    Check(
        "limit.files",
        "open files against `rollout.max_concurrent_episodes`",
        "`ulimit -n N`",
        check_open_files,
    ),
    Check(
        "disk.space",
        "room for `checkpoint.keep_last` + 1 checkpoints; fail: not even for one",
        "free some, `run.dir=`, `checkpoint.keep_last=`",
        check_space,
    ),
    Check(
        "disk.speed",
        "writes a file with fsync, deletes it; warn: below `doctor.min_disk_mb_s`; its time stamp "
        "against the clock is the line `disk.clock`",
        "a faster file system for `run.dir`; chrony for the clock",
        check_speed,
    ),
    Check(
        "disk.file_system",
        "type of the run folder's file system; warn: the cache of replies (SQLite) is on a network "
        "file system",
        "`tools.cache.path=` on a disk of the first node",
        check_file_system,
    ),
    Check(
        "disk.shm",
        "size of /dev/shm: 1 GiB for each GPU",
        "`--shm-size`, `--ipc=host`",
        check_shared_memory,
    ),
    Check(
        "keys",
        "variables that the recipe names are set; values are never shown",
        "`export NAME=...`",
        check_keys,
    ),
    Check(
        "tools.node",
        "Node 18 or newer, where a server of the recipe is a Node program",
        "install Node",
        check_node,
        in_build=True,
    ),
    Check(
        "tools.servers",
        "starts one process of every MCP server (or opens a session) and lists its tools; in full "
        "also asks a paid `google_search` one question, as `tools.search.NAME`",
        "docs/tools.md",
        check_servers,
    ),
    Check(
        "judge",
        "`GET BASE_URL/models` with the key, through the proxy; fail: no answer, or the key is "
        "refused; warn: the model is not in the list",
        "`reward.judge.*`, the key's value, HTTPS_PROXY",
        check_judge,
    ),
)

NODE_CHECKS: tuple[tuple[str, str, str], ...] = (
    (
        "nodes.meeting",
        "every node of the allocation sees the file that node 0 writes into `run.dir`, and can "
        "connect to it; fail: names those that did not come in `doctor.nodes_timeout_s`",
        "one shared `run.dir`; `cluster.interface=IFACE`; `--exclude` the node",
    ),
    (
        "nodes.clock",
        "clocks against node 0's; warn: more than `doctor.max_clock_skew_s`",
        "chrony or ntpd",
    ),
    (
        "nodes.allreduce",
        "an all-reduce over all GPUs (NCCL) or nodes (gloo), its bus bandwidth; fail: an error or "
        "`doctor.collective_timeout_s`, with the node that came least far; warn: below "
        "`doctor.min_allreduce_gb_s`, or half of what InfiniBand (several nodes) or NVLink have",
        "NCCL_DEBUG=INFO; ports, GPUDirect RDMA; `--exclude` the node",
    ),
    (
        "nodes.weight_sync",
        "a group of one rank of each node, formed as weight sync forms its own, and one bucket",
        "open ports between the nodes; NCCL_CUMEM_ENABLE the same everywhere",
    ),
)


def table() -> str:
    """The table of docs/doctor.md."""
    rows = ["| check | looks at | what to do | preflight | build |", "|---|---|---|---|---|"]
    for check in CHECKS:
        marks = [_mark(check.in_preflight), _mark(check.in_build)]
        rows.append(f"| `{check.name}` | {check.looks_at} | {check.fix} | {' | '.join(marks)} |")
    for name, looks_at, fix in NODE_CHECKS:
        rows.append(f"| `{name}` | {looks_at} | {fix} | several nodes | |")
    return "\n".join(rows) + "\n"


def _mark(value: bool) -> str:
    return "yes" if value else ""
