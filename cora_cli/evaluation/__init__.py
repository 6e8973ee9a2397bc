"""Evaluation: generate predictions for held-out records and score them with metrics."""
