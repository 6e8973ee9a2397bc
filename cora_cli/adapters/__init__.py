"""Adapters of any method: installed in a model, stored, loaded, merged and exported."""
