"""One file per training method: what starts where, what is trained, and how it is stored. `registry` collects them."""
