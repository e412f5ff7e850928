"""repro-sweep beside its peers, measured in one run: see README.md here."""
