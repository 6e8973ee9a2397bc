"""DoRA: LoRA on the directions of W's rows, with their magnitudes trained."""

from collections.abc import Mapping
from typing import Any, ClassVar

from cora_cli.methods.method import A_AND_B, Method, Shapes


class Dora(Method):
    """Each row of W + s·B·A is normalised and multiplied by a trained magnitude."""

    name = "dora"
    paper = "2402.09353"
    summary = "as lora on the directions of W's rows; their magnitudes are trained"
    b_init, a_init = "zeros", "kaiming"
    trained: ClassVar[Shapes] = {**A_AND_B, "lora_magnitude_vector.weight": ("out",)}
    peft_options: ClassVar[Mapping[str, Any]] = {"use_dora": True}
    step_0_is_base = "up to rounding"  # PEFT computes the magnitudes in the precision of W
    stored_as = "DoRA"
    lora_rank = None
