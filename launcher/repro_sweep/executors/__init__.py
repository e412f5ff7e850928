"""Executors: what starts and stops workers somewhere. One file each, found by name."""
