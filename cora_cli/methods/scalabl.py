"""ScalaBL: a LoRA that learns a Gaussian over r numbers of each layer, by variational inference in an r-dimensional space."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from cora_cli.basis.choices import Side
from cora_cli.errors import CoraError
from cora_cli.methods.method import B, Method, MethodSetting, Shapes, Step
from cora_cli.methods.plan import AdapterPlan

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from cora_cli.basis.artifact import Basis
    from cora_cli.methods.parts.layers import LinearWeight
    from cora_cli.methods.parts.sampled import Sampled


class ScalaBl(Method):
    """ΔW = s·B·diag(e^a + e^b ⊙ z)·V with B (out, r), V (r, in), a and b (r,) trained and z ~ N(0, I) drawn in each step.

    AdamW follows the negative log-likelihood of the sampled weights. After it, plain SGD follows the divergence of N(e^a, e^2b) from the
    prior N(0, 1) with a rate that doubles from step to step in cycles of M steps.
    """

    name = "scalabl"
    paper = "2506.21408"
    summary = "B = 0; A = diag(e^a)·V, the singular values and vectors of LoRA's random A; each step adds noise of the learned size e^b to e^a"
    takes = frozenset({"alpha", "rslora"})
    DEFAULT_DEVIATION, DEFAULT_RATE = 0.05, 0.2
    settings = (
        MethodSetting(
            "scalabl_deviation",
            float,
            f"Mode scalabl: ε; the standard deviations start between ε/√2 and ε; default {DEFAULT_DEVIATION:g}.",
        ),
        MethodSetting(
            "kl_learning_rate",
            float,
            f"Mode scalabl: learning rate of the divergence from the prior; default {DEFAULT_RATE:g}.",
        ),
        MethodSetting(
            "kl_direction",
            Literal["posterior-prior", "prior-posterior"],
            "Mode scalabl: posterior-prior (KL of the posterior from the prior, as in an evidence lower bound; the default), or prior-posterior, "
            "as in the authors' code.",
        ),
    )
    b_init, a_init = "zeros", "singular"
    trained: ClassVar[Shapes] = {
        "lora_A.directions": ("r", "in"),
        "lora_A.log_mean": ("r", "1"),
        "lora_A.log_deviation": ("r", "1"),
        B: ("out", "r"),
    }
    trained_in_words = "V r·in + a r + b r + B out·r"
    stored_as = "LoRA (the mean) and e^b"
    learns_distribution = True
    notes = (
        "The size of row k of A is Gaussian with mean e^a_k and standard deviation e^b_k. V and e^a start as the right singular vectors and "
        "the singular values of A ~ U(±1/√in), e^b between ε/√2 and ε with ε `--scalabl-deviation`. One z is drawn in each step from the seed, "
        "for all micro-batches and processes; the authors draw one in each forward pass, which is the same without "
        "`--gradient-accumulation`. AdamW takes the step of the loss; SGD then takes one along KL(N(e^a, e^2b)‖N(0, 1)), which is no part of "
        "the loss in `log.jsonl`. Its rate is `--kl-learning-rate` × the schedule's share of the learning rate × 2^j / (2^(M + 1) − 1), where "
        "j counts the steps from 1 to M and starts again, and M = ⌊100·n^(π/8) / batch⌋ for n training records. A run of much fewer than M "
        "steps therefore hardly sees the prior. The authors' code (SRI-CSL/BayesAdapt) computes KL(prior‖posterior), the reverse of an "
        "evidence lower bound, which widens e^b towards 1 at the end of each cycle; `--kl-direction prior-posterior` does that. They adapt "
        "q, v and the head, with r = 8, alpha = 16 and a learning rate of 1e-4. Held-out losses, the stored LoRA, `cora merge` and `cora "
        "export` are the mean, z = 0; e^b is stored next to it, and `cora evaluate` averages the probabilities of 10 draws of z, or of "
        "`--draws`; 0 is the mean."
    )

    def symbols(self, plan: AdapterPlan) -> dict[str, int]:
        """a and b have one column."""
        return {"1": 1}

    def problems(self, settings: Mapping[str, Any]) -> list[str]:
        """ε is positive and the rate not negative."""
        found = []
        deviation, rate = settings["scalabl_deviation"], settings["kl_learning_rate"]
        if deviation is not None and not deviation > 0:
            found.append(f"--scalabl-deviation must be positive, not {deviation}")
        if rate is not None and rate < 0:
            found.append(f"--kl-learning-rate must be at least 0, not {rate}")
        return found

    def check_layer(self, plan: AdapterPlan, name: str, linear: "LinearWeight") -> None:
        """A has r singular values."""
        super().check_layer(plan, name, linear)
        if plan.rank > linear.in_features:
            raise CoraError(f"mode scalabl needs --rank ≤ {linear.in_features} for {name}, not {plan.rank}")

    def starts(
        self, plan: AdapterPlan, basis: "Basis | None", name: str, linear: "LinearWeight"
    ) -> "tuple[Sampled, torch.Tensor]":
        """The singular values and vectors of LoRA's A with small deviations, and B = 0."""
        import torch

        from cora_cli.methods.parts.sampled import Sampled
        from cora_cli.methods.parts.starts import seeded

        _, values, directions = self._decomposed(plan, name, linear.in_features)
        epsilon = plan.own.get("scalabl_deviation", self.DEFAULT_DEVIATION)
        share = torch.rand(plan.rank, 1, generator=seeded(plan.seed, name, "deviations"))
        deviation = epsilon * (1 / math.sqrt(2) + (1 - 1 / math.sqrt(2)) * share)
        return Sampled(directions, values.log()[:, None], deviation.log()), torch.zeros(linear.out_features, plan.rank)

    def start_directions(
        self, plan: AdapterPlan, basis: "Basis | None", name: str, features: int, side: Side
    ) -> "torch.Tensor | None":
        """The columns of Vᵀ."""
        return self._decomposed(plan, name, features)[2].T if side == "input" else None

    def posterior(self, model: "PeftModel", plan: AdapterPlan) -> "dict[str, torch.Tensor]":
        """e^b / e^a, since A's rows have the size e^a."""
        return {name: (a.log_deviation - a.log_mean).exp()[:, 0] for name, a in _sampled(model)}

    def before_step(self, model: "PeftModel", plan: AdapterPlan, step: Step) -> None:
        """Draw z, and find the rate at which the step follows the divergence."""
        import torch

        from cora_cli.methods.parts.starts import seeded

        group = step.optimizer.param_groups[0]
        share = group["lr"] / group["initial_lr"] if group.get("initial_lr") else 1.0
        rate = plan.own.get("kl_learning_rate", self.DEFAULT_RATE) * share * cycle_weight(step)
        for name, a in _sampled(model):
            device = a.log_mean.device
            generator = seeded(plan.seed, name, f"z of step {step.number}", device)
            a.noise, a.rate = torch.randn(plan.rank, 1, generator=generator, device=device), rate

    def after_step(self, model: "PeftModel", plan: AdapterPlan, step: Step) -> None:
        """Take the step along the divergence, and return to the mean."""
        import torch

        from cora_cli.methods.parts.sampled import divergence

        for _, a in _sampled(model):
            with torch.enable_grad():
                value = divergence(a.log_mean, a.log_deviation, plan.own.get("kl_direction", "posterior-prior"))
                gradients = torch.autograd.grad(value, (a.log_mean, a.log_deviation))
            with torch.no_grad():
                a.log_mean.sub_(gradients[0], alpha=a.rate)
                a.log_deviation.sub_(gradients[1], alpha=a.rate)
            a.noise = None

    def _decomposed(self, plan: AdapterPlan, name: str, in_features: int) -> "tuple[torch.Tensor, ...]":
        import torch

        from cora_cli.methods.parts.starts import kaiming_uniform

        random = kaiming_uniform(plan, name, "A", (plan.rank, in_features))
        u, values, v = torch.linalg.svd(random, full_matrices=False)
        return u, values, v.contiguous()


def cycle_weight(step: Step) -> float:
    """2^j / (2^(M + 1) − 1) of a step: j goes from 1 to M = ⌊100·n^(π/8) / batch⌋, over and over."""
    length = max(1, int(100 * step.examples ** (math.pi / 8) / step.batch))
    j: int = (step.number - 1) % length + 1
    return 2**j / (2 ** (length + 1) - 1)


def _sampled(model: "PeftModel") -> "list[tuple[str, Sampled]]":
    from cora_cli.methods.parts.layers import ADAPTER, lora_layers

    return [(name, layer.lora_A[ADAPTER]) for name, layer in lora_layers(model)]
