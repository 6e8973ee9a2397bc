"""`cora inspect`: measures whether models, adapters and basis files share a subspace, and gives a verdict by a printed rule."""
