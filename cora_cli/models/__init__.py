"""Resolve model references to local directories, and load models from them."""
