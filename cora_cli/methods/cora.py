"""CoRA (arXiv 2409.02119) and its mirror: one factor starts as the common subspace of fine-tuned models."""

from cora_cli.methods.method import A_ALONE, A_AND_B, B_ALONE, Method


class FrozenBasis(Method):
    """FB: B is the basis and stays frozen; A starts at zero and is trained (equation 6). `--b-init` gives its ablations."""

    name = "fb"
    prefix = "cora-"
    paper = "2409.02119"
    summary = "B = basis, frozen; A = 0"
    b_init_is_free = True
    has_compact_form = True
    b_init, a_init, trained = "basis", "zeros", A_ALONE


class TrainableBasis(Method):
    """TB: B starts as the basis; A and B are trained."""

    name = "tb"
    prefix = "cora-"
    paper = "2409.02119"
    summary = "B = basis, A = 0"
    b_init_is_free = True
    b_init, a_init, trained = "basis", "zeros", A_AND_B


class FrozenInputBasis(Method):
    """The mirror of FB: A is a basis of the input side and stays frozen; B is trained."""

    name = "fa-basis"
    paper = "none: the mirror of fb"
    summary = "A = basis of the input side, frozen; B = 0"
    takes = frozenset({"alpha", "rslora"})
    b_init, a_init, trained = "zeros", "basis", B_ALONE
