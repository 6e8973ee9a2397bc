"""The interface of a training method: one base class whose defaults describe plain LoRA.

A method is a subclass in a file of this package; `registry` finds it there, and everything else (flags, checks, counts, estimates,
export, the table in the documentation) follows from it. The command line imports these files, so torch and PEFT are imported
inside the functions that use them.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from cora_cli.basis.choices import Side
from cora_cli.errors import CoraError, UsageError
from cora_cli.methods.plan import AdapterPlan, AdapterRequest

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel

    from cora_cli.basis.artifact import Basis
    from cora_cli.methods.parts.layers import LinearWeight

AInit = Literal["zeros", "gaussian", "kaiming"]
BInit = Literal["basis", "zeros", "ones", "random", "orthonormal", "gradient"]

A, B = "lora_A.weight", "lora_B.weight"
A_INNER, B_INNER = "lora_A.inner", "lora_B.inner"
"""The trained part of a factor that is a product with a frozen outer part (`parts.factored.Factored`)."""
A_LINK, B_LINK = "lora_A.link", "lora_B.link"
"""The trained part of a factor that is a chain of frozen links and a trained one (`parts.links.Links`). Other computed factors
(`parts.computed.Computed`) have names of their own for their trained tensors."""
Shapes = Mapping[str, tuple[str, ...]]
"""Trained tensors of a layer, named as PEFT stores them, with their shapes in the symbols `out`, `in`, `r` and a method's own."""
A_ALONE: Shapes = {A: ("r", "in")}
B_ALONE: Shapes = {B: ("out", "r")}
A_AND_B: Shapes = {**A_ALONE, **B_ALONE}
LINKS: Shapes = {A_LINK: ("r", "in"), B_LINK: ("out", "r")}
AS_THE_FILE_SAYS = "as the file says"
SHARED_SETTINGS = frozenset({"alpha", "rslora", "a_init"})
"""Settings of `cora train` that several methods take and others do not; `Method.takes` names a method's own choice of them."""


@dataclasses.dataclass(frozen=True)
class MethodSetting:
    """A flag of one method. Its default is always None, so that runs recorded before it existed stay resumable."""

    name: str
    type: Any
    help: str

    @property
    def flag(self) -> str:
        """As the command line spells it."""
        return f"--{self.name.replace('_', '-')}"


START_EXAMPLES = MethodSetting(
    "start_examples",
    int,
    "Starts from data: number of training examples for the start, the first ones of the training set; default: the mode's own.",
)


@dataclasses.dataclass(frozen=True)
class Step:
    """An optimizer step of a run: its number, from 1 to `total`, and the optimizer that takes it.

    `examples` are those of the training set, `batch` those of a complete step.
    """

    number: int
    total: int
    optimizer: "torch.optim.Optimizer"
    examples: int = 1
    batch: int = 1


class Method:
    """One training method. Class attributes say what it is; the methods below say what it does where plain LoRA does not suffice."""

    name: ClassVar[str]
    """The value of `--mode`."""
    paper: ClassVar[str]
    """arXiv number, or what to cite instead."""
    summary: ClassVar[str]
    """Starts and frozen parts in one line."""
    prefix: ClassVar[str] = ""
    """Prefix of the name in the names of a grid's rows."""
    optimizer_name: ClassVar[str] = "AdamW"
    """The optimizer that `optimizer` returns, as papers call it."""
    is_adapter: ClassVar[bool] = True
    """Whether the base model stays frozen; False for full fine-tuning."""
    takes_transposed: ClassVar[bool] = True
    """Whether it applies to layers that store W as (in, out), GPT-2's."""

    runs_in_several_processes: ClassVar[bool] = True
    """Whether PyTorch's data parallelism can train it; not where the number of parameters changes."""
    needs_complete_base: ClassVar[bool] = False
    """Whether it reads or changes W between forward passes, so that `--shard` cannot divide W among processes."""

    # Settings
    takes: ClassVar[frozenset[str]] = SHARED_SETTINGS
    """The shared settings that mean something to this method."""
    settings: ClassVar[tuple[MethodSetting, ...]] = ()
    """Flags that only this method has."""
    b_init_is_free: ClassVar[bool] = False
    """Whether `--b-init` may replace the start of B."""
    uses_basis_if_given: ClassVar[bool] = False
    """Whether B starts as the basis when there is one, and as `b_init` otherwise."""
    has_compact_form: ClassVar[bool] = False
    """Whether `--compact` applies: B is frozen and can be rebuilt from the basis file or the seed."""

    # Starts and trained tensors
    b_init: ClassVar[str]
    a_init: ClassVar[str]
    trained: ClassVar[Shapes]
    """Empty where a file decides."""
    trained_in_words: ClassVar[str | None] = None
    """For the documentation, where `trained` alone would mislead because layers share a tensor."""
    peft_options: ClassVar[Mapping[str, Any]] = {}
    """Entries of PEFT's `LoraConfig` that differ from plain LoRA's."""
    reads_weights: ClassVar[bool] = False
    """Whether a start is computed from W, so that r is at most the smaller dimension of W."""
    start_from: ClassVar[Literal["models", "adapters", "gradient", "inputs"] | None] = None
    """What else a start is computed from: the models of `--start-models`, which may have to be adapters, or the gradient of W or the inputs
    of the layer in the first examples of the training data (`parts.layers.Observed`)."""
    DEFAULT_EXAMPLES: ClassVar[int] = 64
    """How many examples that are, unless `--start-examples` says it."""
    subtracts_start: ClassVar[bool] = False
    """Whether s·B₀·A₀ is subtracted from W, so that training begins at the base model."""
    step_0_is_base: ClassVar[str] = "yes"
    """For the documentation: whether the first forward pass is the base model's."""

    # Storage
    stored_as: ClassVar[str] = "LoRA"
    """The form on disk, as PEFT calls it."""
    plain_peft_loads: ClassVar[bool] = True
    """Whether plain PEFT loads what is stored. Otherwise the trained tensors are stored, and plain PEFT refuses their type."""
    lora_rank: ClassVar[str | None] = "r"
    """The rank at which the trained adapter equals a plain LoRA; None where no LoRA equals it."""
    nested_ranks: ClassVar[bool] = False
    """Whether the first b pairs of A and B with s = alpha / b are an adapter of their own, for every b ≤ r."""
    learns_distribution: ClassVar[bool] = False
    """Whether `posterior` has something to store, so that `cora evaluate` averages draws."""
    notes: ClassVar[str] = ""
    """For the documentation: what the paper leaves open, and where this method differs from the authors' code or from PEFT's."""

    @property
    def file_stem(self) -> str:
        """The name as the names of files and rows contain it."""
        return self.prefix + self.name.replace("+", "-plus")

    @property
    def trains_on_four_bit(self) -> bool:
        """Whether the base may be held in 4 bits; not where the start is computed from W, or W itself is trained."""
        return self.is_adapter and not self.reads_weights and self.start_from != "gradient"

    @property
    def takes_mean_start(self) -> bool:
        """Whether `--start mean-delta` applies: what is stored is a LoRA, of which the mean can be a part."""
        return self.stored_as.startswith("LoRA") and self.lora_rank is not None

    def problems(self, settings: Mapping[str, Any]) -> list[str]:
        """Sentences on values of `cora train` that this method cannot work with."""
        return []

    def notices(self, plan: AdapterPlan) -> list[str]:
        """Sentences on values that a user may not have meant."""
        return []

    def resolve(self, request: AdapterRequest) -> AdapterRequest:
        """The request with defaults of the method's own settings filled in. Raises `UsageError` for contradictions."""
        return request

    def plan(self, request: AdapterRequest) -> AdapterPlan:
        """Check a request and turn it into a plan. Raises `UsageError` for a contradiction or a number out of range."""
        if request.a_init is not None and "a_init" not in self.takes:
            raise UsageError(f"--a-init does not apply to mode {self.name}: its A starts as {self.a_init}")
        request = self.resolve(request)
        if request.rank < 1:
            raise UsageError(f"--rank must be at least 1, not {request.rank}")
        if not request.alpha > 0:
            raise UsageError(f"--alpha must be positive, not {request.alpha}")
        if not 0 <= request.dropout < 1:
            raise UsageError(f"--dropout must be at least 0 and below 1, not {request.dropout}")
        if not request.target_modules:
            raise UsageError("--target-modules must name at least one module")
        return AdapterPlan(
            mode=self.name,
            b_init=request.b_init or ("basis" if request.has_basis and self.uses_basis_if_given else self.b_init),
            a_init=request.a_init or self.a_init,
            trains_b=B in self.trained,
            rank=request.rank,
            alpha=request.alpha,
            rslora=request.rslora or bool(self.peft_options.get("use_rslora")),
            target_modules=request.target_modules,
            dropout=request.dropout,
            seed=request.seed,
            own={**request.own, **({"start": request.start} if request.start else {})},
        )

    def for_run(self, plan: AdapterPlan, learning_rate: float, warmup: int) -> AdapterPlan:
        """The plan with what the optimizer's settings decide filled in; `warmup` is the number of steps of the warm-up."""
        return plan

    def for_model(self, plan: AdapterPlan, heads: int | None) -> AdapterPlan:
        """The plan with what the model decides filled in; `heads` is its number of attention heads, None where it states none."""
        return plan

    @property
    def adapters_only(self) -> str | None:
        """The mode in words where it starts from adapters and from no other models; else None."""
        return f"mode {self.name}" if self.start_from == "adapters" else None

    def needs_basis(self, b_init: str | None = None) -> bool:
        """Whether a factor starts as a basis, given the requested start of B."""
        return "basis" in (b_init or self.b_init, self.a_init)

    def observes(self, b_init: str | None = None) -> Literal["gradient", "inputs"] | None:
        """What of the layers a start is computed from in the first training examples, given the requested start of B."""
        if b_init == "gradient":
            return "gradient"
        return self.start_from if self.start_from in ("gradient", "inputs") else None

    def scales_inputs(self, plan: AdapterPlan) -> bool:
        """Whether the inputs that a start is computed from are divided by the largest of each example."""
        return False

    def check_run(self, plan: AdapterPlan, layers: Collection[str], steps: int) -> None:
        """Raise `CoraError` where the method cannot run for so many optimizer steps on the adapted `layers`."""

    def inputs(self, plan: AdapterPlan) -> dict[str, Any]:
        """Values that were read from the user's files and determine the result; part of a run's fingerprint."""
        return {}

    def b_width(self, plan: AdapterPlan) -> int:
        """Number of columns in the start of B, set by the flag `width_flag`."""
        return plan.rank

    @property
    def width_flag(self) -> str:
        """The flag that sets `b_width`."""
        return "--rank"

    def bounded_sides(self, plan: AdapterPlan) -> tuple[int, ...]:
        """Dimensions of W (0: out, 1: in) that `b_width` cannot exceed, because a start needs as many directions."""
        if self.reads_weights or self.observes(plan.b_init) == "gradient":
            return (0, 1)
        return (0,) if plan.b_init == "orthonormal" else ()

    def check_layer(self, plan: AdapterPlan, name: str, linear: "LinearWeight") -> None:
        """Raise `CoraError` where the method cannot adapt the layer `name` as planned. Only shapes are known yet, no values."""
        if linear.transposed and not self.takes_transposed:
            raise CoraError(
                f"mode {self.name} does not apply to {name}, a layer that stores its weight as (in, out); choose another mode"
            )
        smaller = min(linear.in_features, linear.out_features)
        if (self.reads_weights or self.observes(plan.b_init) == "gradient") and plan.rank > smaller:
            start = f" with --b-init {plan.b_init}" if self.b_init_is_free else ""
            raise CoraError(f"mode {self.name}{start} needs --rank ≤ {smaller} for {name}, not {plan.rank}")

    def check_layers(self, plan: AdapterPlan, linears: "Mapping[str, LinearWeight]") -> None:
        """As `check_layer`, of all adapted layers by name."""
        for name, linear in linears.items():
            self.check_layer(plan, name, linear)

    def can_train(self, plan: AdapterPlan) -> bool:
        """False where the gradient stays zero: ∂L/∂A = s·Bᵀ(∂L/∂W) with B = 0 frozen, ∂L/∂B with A = 0 frozen, both with A = B = 0."""
        if not self.trained or not self.trained.keys() <= {A, B}:
            return True
        a_receives = A in self.trained and plan.b_init != "zeros"
        b_receives = B in self.trained and plan.a_init != "zeros"
        return a_receives or b_receives

    def starts_at_base(self, plan: Mapping[str, Any]) -> bool:
        """Whether step 0 is exactly the base model, by the recorded plan: a factor of the product B·A is zero."""
        return "zeros" in (plan.get("a_init"), plan.get("b_init")) and not plan.get("start")

    def layer_parameters(self, out: int, inside: int, plan: AdapterPlan) -> int | None:
        """Trained parameters of one layer with W (out, in); None where a file decides."""
        sizes = {"out": out, "in": inside, "r": plan.rank, **self.symbols(plan)}
        return sum(math.prod(sizes[symbol] for symbol in shape) for shape in self.trained.values()) if self.trained else None

    def symbols(self, plan: AdapterPlan) -> dict[str, int]:
        """Values of the method's own symbols in `trained`."""
        return {}

    def parameters(self, shapes: Mapping[str, tuple[int, int]], plan: AdapterPlan) -> int | None:
        """Trained parameters of a model whose adapted layers have `shapes`, name -> (out, in); None where a file decides."""
        # A model has many layers but few shapes, and the plan of a grid asks once for every row.
        layers = Counter(shapes.values())
        counts = {shape: self.layer_parameters(*shape, plan) for shape in layers}
        known = [count * layers[shape] for shape, count in counts.items() if count is not None]
        return sum(known) if len(known) == len(counts) else None

    def start_flops(self, out: int, inside: int, plan: AdapterPlan) -> float:
        """Arithmetic of computing one layer's start, for time estimates."""
        return 0.0

    def configuration(self, plan: AdapterPlan) -> "PeftConfig":
        """PEFT's configuration. Raises `CoraError` where a file asks for something that cannot be trained here."""
        from peft import LoraConfig

        return LoraConfig(
            **{
                **common_options(plan),
                **{"lora_alpha": plan.alpha, "lora_dropout": plan.dropout, "use_rslora": plan.rslora},
                **self.peft_options,
            }
        )

    def ranks(self, plan: AdapterPlan, linears: "Mapping[str, LinearWeight]") -> dict[str, int]:
        """The rank of each layer of a method that shares out ranks among them; empty where all have `--rank`."""
        return {}

    def shares_out_ranks(self, plan: AdapterPlan) -> bool:
        """Whether `ranks` depends on the data, so that the numbers of a plan, where all layers have `--rank`, are not those of the run."""
        return False

    def starts(
        self, plan: AdapterPlan, basis: "Basis | None", name: str, linear: "LinearWeight"
    ) -> "tuple[torch.Tensor | torch.nn.Module, torch.Tensor | torch.nn.Module] | None":
        """A (r, in) and B (out, r) of the layer `name` before training; None where PEFT computes them.

        A module takes the place of PEFT's linear layer; its `weight` is the matrix that it multiplies by outside of training.
        """
        from cora_cli.methods.parts.starts import start_a, start_b

        width = self.b_width(plan)
        return start_a(plan, name, linear.in_features, basis), start_b(plan, basis, name, linear.out_features, width)

    def start_directions(
        self, plan: AdapterPlan, basis: "Basis | None", name: str, features: int, side: Side
    ) -> "torch.Tensor | None":
        """Columns (features, k) that span the start of B, or of Aᵀ for the input side; None where it is zero or computed from W."""
        from cora_cli.methods.parts.starts import start_a, start_b

        if side == "output":
            drawn = plan.b_init in ("basis", "ones", "random", "orthonormal")
            return start_b(plan, basis, name, features, self.b_width(plan)) if drawn else None
        drawn = plan.a_init in ("basis", "gaussian", "kaiming")
        return start_a(plan, name, features, basis).T if drawn else None

    def holds_start(self, side: Side) -> bool:
        """Whether the stored adapter itself contains the start of that side: frozen, or next to what was subtracted from W."""
        factor = "lora_B" if side == "output" else "lora_A"
        return self.subtracts_start or not any(key.startswith(factor) for key in self.trained)

    def install_error(self, plan: AdapterPlan, error: Exception) -> CoraError | None:
        """The user's error behind an exception that PEFT raised while it built the layers; None where it is a programming error."""
        return None

    def after_install(self, model: "PeftModel", plan: AdapterPlan) -> None:
        """Called once, when all starts are in place: ties parameters together, for example."""

    def finished_links(self, plan: AdapterPlan) -> int:
        """How many frozen copies of the trained parameters the adapter has gathered at the end of a run."""
        return 0

    def trained_names(self, layers: Iterable[str], adapter: str) -> set[str]:
        """Full names of the trained parameters of a PEFT model whose adapted layers are `layers`; empty where a file decides."""
        keys = [key.partition(".") for key in self.trained]
        return {f"base_model.model.{layer}.{first}.{adapter}{dot}{rest}" for layer in layers for first, dot, rest in keys}

    def freezes(self, factor: str) -> bool:
        """Whether `lora_A` or `lora_B` has no trained part."""
        return bool(self.trained) and not any(key.startswith(factor) for key in self.trained)

    @property
    def takes_laplace(self) -> bool:
        """Whether `cora laplace` applies: it trains A and B of each layer as they are."""
        return self.trained == A_AND_B and not self.subtracts_start

    @property
    def stored_as_trained(self) -> bool:
        """Whether the stored tensors are the trained ones; not for a LoRA of computed factors or a difference from the start."""
        if not self.plain_peft_loads:
            return True
        computed = any(key.startswith(("lora_A.", "lora_B.")) for key in self.trained.keys() - {A, B})
        return not self.subtracts_start and not computed

    def optimizer(
        self, model: "PeftModel", kind: Any, options: dict[str, Any], weight_decay: float, plan: AdapterPlan
    ) -> "torch.optim.Optimizer | None":
        """An optimizer of class `kind` with `options` (learning rate, betas, …); None for the Trainer's own choice of groups."""
        return None

    def posterior(self, model: "PeftModel", plan: AdapterPlan) -> "dict[str, torch.Tensor] | None":
        """By layer, the standard deviation (r,) of each row of A, relative to the row; None for a method that learns no distribution."""
        return None

    def added_loss(self, model: "torch.nn.Module", plan: AdapterPlan) -> "torch.Tensor | None":
        """A scalar that is added to the mean response loss of each micro-batch; None for nothing."""
        return None

    def before_step(self, model: "PeftModel", plan: AdapterPlan, step: Step) -> None:
        """Called before the first micro-batch of a step."""

    def after_step(self, model: "PeftModel", plan: AdapterPlan, step: Step) -> None:
        """Called after the optimizer has taken a step and before a checkpoint of it is written.

        A method keeps what it remembers from step to step in buffers of the adapter's layers, which checkpoints contain, and draws
        random numbers from the seed and the step, so that a resumed run and every process have the same ones.
        """


def common_options(plan: AdapterPlan) -> dict[str, Any]:
    """What every configuration of PEFT takes."""
    return {"r": plan.rank, "target_modules": list(plan.target_modules), "task_type": "CAUSAL_LM"}
