"""Puts the tables of a finished `make demo` between the README's markers, so that they are never typed by hand."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARKED = re.compile(r"(<!-- demo:begin -->\n).*?(<!-- demo:end -->)", re.DOTALL)


def main() -> None:
    """Replace the marked part of README.md by the body of `report.md` (default: demo/report.md)."""
    report = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "demo" / "report.md"
    readme = ROOT / "README.md"
    _, _, body = report.read_text(encoding="utf-8").partition("\n")
    text, replaced = MARKED.subn(lambda match: f"{match[1]}{body.strip()}\n{match[2]}", readme.read_text(encoding="utf-8"))
    if replaced != 1:
        sys.exit("README.md has no part between <!-- demo:begin --> and <!-- demo:end -->")
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
