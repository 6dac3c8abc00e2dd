"""Metrics for `evaluate`: every folder can be given to `evaluate.load` by its path."""
