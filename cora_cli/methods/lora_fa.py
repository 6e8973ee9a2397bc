"""LoRA-FA: the random A is frozen."""

from cora_cli.methods.method import B_ALONE, Method


class LoraFa(Method):
    """W' = W + s·B·A with A random and frozen.

    PEFT has an optimizer of this name too, which corrects B's gradient by (AAᵀ)⁻¹. The method of the paper is the frozen A, and all
    methods share one optimizer here, so that a difference between runs is one between the methods.
    """

    name = "lora-fa"
    paper = "2308.03303"
    summary = "A random, frozen; B = 0"
    b_init, a_init, trained = "zeros", "kaiming", B_ALONE
