"""Models, adapters and bases -> numbers on whether they share a subspace, and a verdict by a stated rule."""
