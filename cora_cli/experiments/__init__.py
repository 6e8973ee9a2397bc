"""Whole experiments made of the other commands."""
