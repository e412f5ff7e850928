"""Bringing a sweep's results to where people look at them: a background projection of the ledger into MLflow."""
