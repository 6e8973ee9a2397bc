"""Finished runs to the hub, and the check of what came from there: publish, verify."""
