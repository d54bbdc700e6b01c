"""Section `doctor`: deadlines and bounds of `matpo doctor`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DoctorConfig:
    """How long the checks may take, and what they take for too slow."""

    check_timeout_s: float = 120.0
    """Deadline of one check of this node; they run at the same time."""
    nodes_timeout_s: float = 300.0
    """How long to wait for the nodes of the allocation, which may still be unpacking an image, and
    for each of their answers."""
    collective_timeout_s: float = 300.0
    """Deadline of the all-reduce and of forming the groups, the import of torch included."""
    disk_test_mib: int = 256
    """Size of the file that measures the run folder's disk; `--preflight` writes 16 MiB at most."""
    min_disk_mb_s: float = 100.0
    """A warning below. 100 MB/s: a checkpoint of 200 GB from 16 nodes takes two minutes."""
    allreduce_mib: int = 256
    """What every rank hands to the all-reduce; a tenth on CPUs."""
    min_allreduce_gb_s: float = 0.0
    """A warning below, in GB/s of bus bandwidth; 0: half of what the links between the ranks have
    on paper."""
    max_clock_skew_s: float = 1.0
    """A warning above, between two nodes, and between a node and the file system's server."""
    search_query: str = "matpo"
    """What is asked of a paid search in the full check, which costs one search; empty: nothing."""
