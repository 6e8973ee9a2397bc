"""Experiments that combine the other commands: grids and the demo."""
