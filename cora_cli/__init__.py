"""`cora`: LoRA with a common subspace of fine-tuned models as its B (arXiv 2409.02119)."""

from importlib.metadata import version

__version__ = version("cora-cli")
