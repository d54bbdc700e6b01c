"""Names that the torchrun process and the supervisor share (the supervisor imports no torch)."""

EXITS_FILE = "trainer-exits.txt"
"""In `status/`: one `RANK CODE` line per failed trainer rank, the earliest first."""
