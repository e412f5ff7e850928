"""What this machine is called, and where on it sockets have room."""

from __future__ import annotations

import os
import socket
import tempfile


def name() -> str:
    """This machine's name: within a SLURM job its node's, which need not be the one that the machine has itself.

    Two processes with the same name see each other's sockets and process ids. With different names they may all the
    same be on one machine; that only makes the way between them longer.
    """
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def folder_for_sockets(longest: int) -> str:
    """The folder for temporary files, or ``/tmp`` if its path is longer: that of a socket has 108 bytes at most.

    Others may write there too, so sockets belong into a private folder in it.
    """
    folder = tempfile.gettempdir()
    return folder if len(folder) <= longest else "/tmp"  # noqa: S108
