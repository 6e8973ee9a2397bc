"""Turn records into token batches: file formats, prompt templates, encoding, packing, and the built-in data sets."""
