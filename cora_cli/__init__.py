"""`cora`: LoRA with a common subspace of fine-tuned models as its B (arXiv 2409.02119)."""

__version__: str


def __getattr__(name: str) -> str:
    """`__version__`, looked up when it is asked for: `__main__` must come before the imports that this takes."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import version

    return version("cora-cli")
