"""The style and the scripts of HTML pages, as files of their own languages; `read` gives one as text."""

from importlib.resources import files


def read(name: str) -> str:
    """The text of a file in this folder."""
    return files(__name__).joinpath(name).read_text(encoding="utf-8")
