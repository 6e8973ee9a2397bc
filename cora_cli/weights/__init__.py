"""Read the weight matrices of models and adapters, one at a time."""
