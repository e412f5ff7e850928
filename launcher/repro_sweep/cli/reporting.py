"""Has a sweep's report written by a process of its own: drawing needs Optuna, plotly and some seconds."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

_PATIENCE_S = 120.0


async def write_report(directory: Path) -> str | None:
    """Write the report of the sweep in a directory; returns what went wrong, None if nothing did."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "repro_sweep.reporting",
        str(directory),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(_PATIENCE_S):
            _, errors = await process.communicate()
    except (TimeoutError, asyncio.CancelledError) as error:
        process.kill()
        await process.wait()
        if isinstance(error, asyncio.CancelledError):
            raise
        return f"it took longer than {_PATIENCE_S:.0f} s"
    if process.returncode == 0:
        return None
    lines = errors.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"its process ended with status {process.returncode}"
