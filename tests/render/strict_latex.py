"""A parser that accepts the part of LaTeX which reports use, and refuses what pdflatex would stop at."""

import re

MATHS = frozenset(re.findall(r"\S+", "pm times geq leq surd Delta alpha kappa sigma cdot mathbf"))
KNOWN = MATHS | frozenset(
    re.findall(
        r"\S+",
        r"""documentclass usepackage setlength parindent parskip sloppy begin end centering small caption resizebox ifdim width linewidth
        else fi toprule midrule bottomrule addlinespace scriptsize allowbreak par smallskip parbox footnotesize section subsection item textbf ensuremath ldots
        textbackslash textasciitilde textasciicircum textless textgreater textbar textquotedbl \ { } $ & # % _ , |""",
    )
)
TOKEN = re.compile(
    r"\\(begin|end)\{(\w+)\}(?:\{([lrc]+)\}|\[\w+\])?|\\([A-Za-z]+\*?|.)|([{}$&#%_^])|([^\\{}$&#%_^]+)", re.DOTALL
)


class LatexError(Exception):
    """What pdflatex would say, with the line."""


def check(source: str) -> list[str]:
    """Raise `LatexError` unless the document is well-formed; returns the environments in the order in which they open."""
    parser = _Parser(source)
    for token in TOKEN.finditer(source):
        parser.line = source.count("\n", 0, token.start()) + 1
        border, environment, columns, command, special, text = token.groups()
        if border:
            parser.begin(environment, columns) if border == "begin" else parser.end(environment)
        elif command:
            parser.command(command.rstrip("*"))
        elif special:
            parser.special(special, source[token.end() :][:1])
        elif text:
            parser.text(text)
    parser.require(not parser.open and not parser.math, f"the document ends inside {parser.open or '$'}")
    return parser.environments


class _Parser:
    def __init__(self, source: str) -> None:
        self.open: list[str] = []
        self.environments: list[str] = []
        self.columns: list[int] = []
        self.cells, self.line, self.math = 0, 1, False
        self.braces: list[bool] = []  # of each open brace: whether it began mathematics
        self.next_is_maths = False

    def require(self, fine: bool, what: str) -> None:
        if not fine:
            raise LatexError(f"line {self.line}: {what}")

    def begin(self, environment: str, columns: str | None) -> None:
        self.open.append(environment)
        self.environments.append(environment)
        if environment == "tabular":
            self.columns.append(len(columns or ""))
            self.cells = 1

    def end(self, environment: str) -> None:
        self.require(bool(self.open) and self.open.pop() == environment, f"\\end{{{environment}}} without its beginning")
        if environment == "tabular":
            self.columns.pop()

    def command(self, name: str) -> None:
        self.require(name in KNOWN, f"undefined control sequence \\{name}")
        self.require(name not in MATHS or self.in_maths, f"\\{name} outside of mathematics")
        self.next_is_maths = name == "ensuremath"
        if name == "\\":
            self.require(bool(self.columns), "a line break outside of a table")
            self.require(self.cells == self.columns[-1], f"{self.cells} cells in a row of {self.columns[-1]} columns")
            self.cells = 1

    def special(self, sign: str, following: str) -> None:
        if sign == "{":
            self.open.append("{")
            self.braces.append(self.next_is_maths)
            self.next_is_maths = False
        elif sign == "}":
            self.require(bool(self.open) and self.open.pop() == "{", "} without {")
            self.braces.pop()
        elif sign == "$":
            self.math = not self.math
        elif sign == "&":
            self.require(bool(self.columns), "& outside of a table")
            self.cells += 1
        elif sign in "_^":
            self.require(self.in_maths, f"{sign} outside of mathematics")
        else:
            self.require(sign == "%" and following == "\n", f"{sign} in the text")

    def text(self, text: str) -> None:
        strange = re.search(r"[^\n\x20-\x7eÀ-ÖØ-öø-ÿ]", text)
        self.require(strange is None, f"{strange and hex(ord(strange[0]))} is unknown to pdflatex")

    @property
    def in_maths(self) -> bool:
        return self.math or any(self.braces)
