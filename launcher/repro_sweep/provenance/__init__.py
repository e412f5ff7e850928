"""Where a trial comes from: its source, its environment."""
