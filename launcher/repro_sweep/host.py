"""What this machine is called."""

from __future__ import annotations

import os
import socket


def name() -> str:
    """This machine's name: within a SLURM job its node's, which need not be the one that the machine has itself.

    Two processes with the same name see each other's sockets and process ids. With different names they may all the
    same be on one machine; that only makes the way between them longer.
    """
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
