"""Hydra's way to repro-sweep: ``hydra/sweeper=repro_sweep``."""
