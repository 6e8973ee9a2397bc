"""What several test files of the embedded parts need."""

from cora_cli import embedded


def present(name: str) -> bool:
    """Whether the part of that name is complete in the cache."""
    return next(asset.present for asset in embedded.status() if asset.name == name)
