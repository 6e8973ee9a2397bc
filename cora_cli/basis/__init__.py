"""Models -> common subspace: find and stream weights, merge (eq. 2), decompose (eq. 3-5, 7-9), the basis file."""
