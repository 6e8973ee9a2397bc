"""Batches -> a run directory."""
