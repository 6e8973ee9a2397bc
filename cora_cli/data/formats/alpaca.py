"""Stanford Alpaca: an instruction, an optional input, and an output."""

from cora_cli.data.formats.shape import Shape

ALPACA = Shape(
    "Alpaca", "alpaca", ("instruction", "output"), incomplete_with=frozenset({"context"}), reads=frozenset({"input"})
)
