"""Weight matrices -> basis: merge (equation 2), decompose (equations 3-5 and 7-9), write."""
