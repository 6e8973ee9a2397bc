"""The mean of the changes that earlier models made to W, by itself: nothing is trained."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from cora_cli.basis.choices import Side
from cora_cli.methods.method import Method, Shapes
from cora_cli.methods.plan import AdapterPlan, AdapterRequest


class MeanDelta(Method):
    """W' = W + (1/n)·Σ ΔW_k over the n models of `--start-models`; a run of it takes no step and is evaluated like any other."""

    name = "mean-delta"
    paper = "none: the mean of ΔW"
    summary = "W plus the mean of the models' ΔW, frozen"
    takes = frozenset()
    b_init, a_init = "zeros", "zeros"
    trained: ClassVar[Shapes] = {}
    trained_in_words = "nothing"
    start_from = "models"
    step_0_is_base = "no: it is W + mean of ΔW"
    lora_rank = "sum of the models' ranks"
    notes = (
        "The mean is that of the products ΔW = s·B·A, not of the factors, over the layers of `--target-modules`. It needs `--start-models A,B,…`: "
        "adapters on the base model, or complete models, whose ΔW is decomposed. Nothing is trained, so a run takes no step and `--rank` has no "
        "effect. `--start mean-delta` puts the same mean below any other mode that is stored as a LoRA: training is then that on W + mean, from which "
        "modes that read W, its gradient or the inputs of layers compute their starts. Other modes are refused; they train on W + mean after `cora merge` of a run of "
        "this mode. The mean is kept next to W as a product of factors, since adding it to W in bf16 would round much of it "
        "away, and is stored as part of the LoRA, whose rank is r plus the sum of the models' ranks. So `cora merge`, `cora export` and "
        "`cora evaluate` start from the original base model. The run records the models and their hashes, and is resumed only with the same "
        "ones."
    )

    @property
    def takes_mean_start(self) -> bool:
        """It is the mean already."""
        return False

    def problems(self, settings: Mapping[str, Any]) -> list[str]:
        """Dropout acts in training alone."""
        return ["--dropout does not apply to mode mean-delta, which trains nothing"] if settings["dropout"] else []

    def resolve(self, request: AdapterRequest) -> AdapterRequest:
        """One pair of zeros, which is not stored."""
        return dataclasses.replace(request, rank=1, alpha=1.0, start=self.name)

    def can_train(self, plan: AdapterPlan) -> bool:
        """Never."""
        return False

    def freezes(self, factor: str) -> bool:
        """Both."""
        return True

    def parameters(self, shapes: Mapping[str, tuple[int, int]], plan: AdapterPlan) -> int:
        """None at all."""
        return 0

    def trained_names(self, layers: Iterable[str], adapter: str) -> set[str]:
        """None at all."""
        return set()

    def start_directions(self, plan: AdapterPlan, basis: Any, name: str, features: int, side: Side) -> None:
        """None: nothing is trained from them."""
