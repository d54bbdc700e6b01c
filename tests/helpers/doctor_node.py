"""`python -m tests.helpers.doctor_node SECONDS ARGUMENTS`: a node whose clock is that far ahead."""

from __future__ import annotations

import sys
import time

from megatron_matpo.doctor.command import Request, doctor


def main() -> None:
    ahead_s = float(sys.argv[1])
    request = Request(overrides=tuple(sys.argv[2:]), mode="preflight", is_json=True)
    sys.exit(doctor(request, clock=lambda: time.time() + ahead_s))


if __name__ == "__main__":
    main()
