"""The searchers: each is one file that says which point of the space is tried next."""
