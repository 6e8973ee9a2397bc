"""Batches -> run directory."""
