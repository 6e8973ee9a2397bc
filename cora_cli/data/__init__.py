"""Records -> token batches: file formats, prompt templates, encoding, packing, and the built-in sets."""
