"""``python -m slurm.testbed``."""

from __future__ import annotations

import sys

from slurm.testbed.cli import main

sys.exit(main())
