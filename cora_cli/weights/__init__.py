"""Weight matrices of models and of adapters, read one at a time."""
