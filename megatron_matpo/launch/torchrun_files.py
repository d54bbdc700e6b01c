"""Names that the torchrun process and the supervisor share (the supervisor imports no torch)."""

EXITS_FILES = "trainer-exits-*.txt"
"""In `status/`, one for each node that trains: `RANK CODE TIME` lines of failed trainer ranks, the
earliest first; TIME is in Unix seconds."""


def exits_file(node: int) -> str:
    """Name of a node's file."""
    return EXITS_FILES.replace("*", str(node))
