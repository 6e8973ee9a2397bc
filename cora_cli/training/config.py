"""The settings of `cora train`, and every check that needs nothing but their values.

One frozen object holds the complete request; a run directory records it as `config.yaml`.
"""

import dataclasses
import functools
import re
import typing
from typing import TYPE_CHECKING, Any, Literal

from cora_cli.errors import CoraError, UsageError
from cora_cli.methods.method import A, AInit, BInit, Method
from cora_cli.methods.plan import AdapterPlan, AdapterRequest
from cora_cli.methods.registry import DEFAULT, METHODS, OPTIONAL_SETTINGS, OWN_SETTINGS, Mode, plan_adapter, taken_settings
from cora_cli.reading import checked, read_yaml
from cora_cli.rundir import RunDirectory
from cora_cli.settings import (
    ATTENTIONS,
    LARGEST_RANK,
    MOST,
    DtypeName,
    TemplateName,
    check_date,
    given,
    range_problems,
    setting,
)

AUTO: Literal["auto"] = "auto"
DEFAULT_RATE = 3e-4
DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj")
Reporter = Literal["none", "tensorboard", "wandb", "trackio"]
_WHAT, _DATA, _OPTIM, _RUN = "Method", "Data", "Optimisation", "Run"
_ONE_METHOD = "Settings of single modes"
_KERNELS = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?(:[\w.-]+)?")
_OF_METHODS = frozenset(own.name for own in OWN_SETTINGS)
NOT_PART_OF_THE_RESULT = frozenset(
    {
        "output_dir",
        "resume",
        "stop_at",
        "dry_run",
        "rate_from",
        "processes",
        "report_to",
        "device",
        "save_steps",
        "keep_checkpoints",
        "save_tokenizer",
        "validation_loss",
        "tokens_per_row",
        "attention",
        "compile",
        "liger",
        "shard",
        "model",
        "dataset",
        "test_dataset",
        "columns",
        "subset",
        "split",
        "basis",
        "start_models",
    }
)
"""Settings that may differ between a run and its resumption: they do not change the result beyond rounding, or they locate an input whose content
hash is compared anyway."""


@dataclasses.dataclass(frozen=True)
class _SharedSettings:
    """The settings that are not one method's own."""

    model: str = setting(
        "Base model: hub id with optional @revision, a directory, or builtin:smollm2.", panel=_WHAT, names="model"
    )
    dataset: str = setting(
        "Hub id, a .json, .jsonl, .csv, .tsv or .parquet file, a folder of datasets.save_to_disk, or builtin:instruct, builtin:code, …",
        panel=_DATA,
        names="dataset",
    )
    output_dir: str = setting("Run directory; must not contain another run.", panel=_RUN)
    mode: Mode = setting(
        "Training method: lora, fb (B = basis, frozen), tb (B = basis, trained), full (all weights, no adapter), or a baseline; "
        "docs/methods.md describes each.",
        DEFAULT,
        panel=_WHAT,
    )
    basis: str | None = setting(
        "Basis file from `cora extract-basis`: required by fb and tb, of the input side by fa-basis, optional for lora-mini.",
        None,
        panel=_WHAT,
        names="basis",
    )
    start: Literal["mean-delta"] | None = setting(
        "What the base model is changed by before the adapter: mean-delta, the mean of the ΔW of --start-models, which stays frozen.",
        None,
        panel=_WHAT,
    )
    start_models: tuple[str, ...] | None = setting(
        "Models fine-tuned from the base model, comma-separated, for --start mean-delta and for modes that start from models.",
        None,
        panel=_WHAT,
        names="model",
    )
    rank: int = setting(
        "Rank r of the adapter; it uses the first r columns of the basis, so r ≤ R.", 48, panel=_WHAT, most=LARGEST_RANK
    )
    alpha: float | None = setting("Numerator of the scaling s = alpha / r. Default: 2 r.", None, panel=_WHAT)
    rslora: bool = setting("Scale by alpha / √r instead of alpha / r.", False, panel=_WHAT)
    a_init: AInit | None = setting("Start of A, instead of the mode's default.", None, panel=_WHAT)
    b_init: BInit | None = setting(
        "Start of B in fb and tb, instead of the basis; gradient: leading left singular vectors of ∂L/∂W in the first training examples.",
        None,
        panel=_WHAT,
    )
    target_modules: tuple[str, ...] = setting("Linear layers to adapt, comma-separated.", DEFAULT_TARGETS, panel=_WHAT)
    dropout: float = setting(
        "LoRA dropout on the input of A; examples that share a prompt prefix share its mask.", 0.0, panel=_WHAT
    )
    compact: bool = setting("Store only A and the hash of the basis; B is rebuilt from the basis file.", False, panel=_WHAT)
    columns: tuple[str, ...] | None = setting(
        "Columns to use where they are not recognised, comma-separated: prompt=COLUMN,response=COLUMN, with input=COLUMN if there is one, or "
        "messages=COLUMN, or text=COLUMN.",
        None,
        panel=_DATA,
    )
    subset: str | None = setting("Subset (configuration) of a hub data set.", None, panel=_DATA)
    split: str | None = setting("Split to read of a data set that has several. Default: train.", None, panel=_DATA)
    test_dataset: str | None = setting(
        "Data set whose records are held out, instead of a part of --dataset; of one with several splits, the split test.",
        None,
        panel=_DATA,
        names="dataset",
    )
    test_size: float | None = setting(
        "Held-out records: a count, or a fraction below 1. Default: the built-in set's own split, otherwise 0.1.",
        None,
        panel=_DATA,
    )
    validation_size: int | None = setting(
        "Training records to set aside as a validation set, measured after training. Select settings such as the learning rate by them, "
        "not by the held-out records.",
        None,
        panel=_DATA,
    )
    validation_loss: bool = setting(
        "Measure the loss on the validation records after training; without it they are only kept apart.", True, panel=_DATA
    )
    split_seed: int = setting(
        "Seed of the split into training and held-out records; use the same one for all runs that you compare.", 0, panel=_DATA
    )
    limit: int | None = setting("Train only on the first N training records.", None, panel=_DATA)
    template: TemplateName = setting(
        "Prompt template; auto: the tokenizer's chat template if it has one, otherwise Alpaca's.", "auto", panel=_DATA
    )
    template_date: str | None = setting(
        "Date, as YYYY-MM-DD, for a chat template that writes the current one into its prompts. Default: today; a resumption and the "
        "evaluation of the run use it again.",
        None,
        panel=_DATA,
    )
    train_on: Literal["last", "all"] = setting(
        "Answers of a conversation that carry loss: only the last one, or each after the conversation up to it. Held-out and validation "
        "loss are always those of the last answer.",
        "last",
        panel=_DATA,
    )
    max_length: int = setting(
        "Maximum length of an example in tokens; longer prompts are cut from the left.", 1024, panel=_DATA, most=MOST
    )
    learning_rate: float | Literal["auto"] = setting(
        "Peak learning rate; tune it separately for each mode. auto: proposed from the curvature of the loss before the first step, which takes "
        "some 17 gradients of 4 examples in float32.",
        DEFAULT_RATE,
        panel=_OPTIM,
    )
    epochs: float = setting("Passes over the training records.", 1.0, panel=_OPTIM, most=MOST)
    max_steps: int | None = setting("Optimizer steps, instead of --epochs.", None, panel=_OPTIM, most=MOST)
    batch_size: int = setting("Examples per process and micro-batch, packed into one row.", 16, panel=_OPTIM, most=MOST)
    tokens_per_row: int | None = setting(
        "Split a micro-batch whose row is longer into rows of at most N tokens, one after the other: less memory, the same gradients up to "
        "rounding.",
        None,
        panel=_OPTIM,
        most=MOST,
    )
    gradient_accumulation: int = setting(
        "Micro-batches per optimizer step; the loss is the mean over all their tokens.", 1, panel=_OPTIM, most=MOST
    )
    warmup_ratio: float = setting(
        "Fraction of the steps over which the learning rate warms up, rounded up to a step.", 0.03, panel=_OPTIM
    )
    lr_schedule: Literal["linear", "cosine", "constant", "constant-decay"] = setting(
        "Learning-rate schedule after warm-up; constant-decay: constant, then linear to 0 over the last fifth of the steps.",
        "linear",
        panel=_OPTIM,
    )
    weight_decay: float = setting("AdamW's weight decay.", 0.0, panel=_OPTIM)
    max_grad_norm: float = setting("Clip the gradient norm to this value; 0 disables clipping.", 1.0, panel=_OPTIM)
    gradient_checkpointing: bool = setting(
        "Recompute activations in the backward pass: less memory, more time.", False, panel=_OPTIM
    )
    attention: str = setting(
        "Attention of packed rows on CUDA: auto, varlen (torch's FlashAttention), flex, flash-attn, sdpa, or a repository of kernels on the hub.",
        "auto",
        panel=_OPTIM,
    )
    compile: bool = setting(
        "Compile the model's layers with torch.compile: pays off in long runs. The result is the same up to rounding.",
        False,
        panel=_OPTIM,
    )
    liger: bool = setting(
        "Use the kernels of liger-kernel for norms and feed-forward layers, on CUDA. The result is the same up to rounding.",
        False,
        panel=_OPTIM,
    )
    eval_steps: int | None = setting(
        "Also measure the held-out loss every N steps, not only before and after training.", None, panel=_RUN
    )
    eval_limit: int | None = setting("Measure the held-out loss only on the first N held-out records.", None, panel=_RUN)
    save_steps: int = setting("Write a checkpoint every N steps.", 50, panel=_RUN, most=MOST)
    keep_checkpoints: int = setting("Number of most recent checkpoints to keep.", 2, panel=_RUN, most=MOST)
    seed: int = setting("Seed of random starts, data order and dropout.", 0, panel=_RUN)
    resume: bool = setting(
        "Continue the run in --output-dir from its last complete checkpoint; start a new run if there is none.",
        False,
        panel=_RUN,
    )
    stop_at: int | None = setting(
        "Stop after optimizer step N of the schedule with a checkpoint and the validation loss, stops/N.json; --resume continues.",
        None,
        panel=_RUN,
    )
    dry_run: bool = setting(
        "Print parameters, steps, tokens, peak memory by part, the cards that it fits, and one example, then exit. Needs the model's "
        "configuration and tokenizer, but no weights and no GPU; --device cpu plans for a processor.",
        False,
        panel=_RUN,
    )
    rate_from: str | None = setting(
        "With --dry-run: also print the time that the steps will take at the rate of this finished run.", None, panel=_RUN
    )
    processes: int | None = setting(
        "With --dry-run: plan for N processes, as torchrun would start them; the memory is that of each.",
        None,
        panel=_RUN,
        most=MOST,
    )
    probe: str | None = setting(
        "Instead of training, measure the run before its first step and write FILE (JSON): the gradient's energy in the span of B, and the "
        "largest eigenvalue of the loss's Hessian in the trained parameters. Takes a gradient, and two for each Hessian-vector product.",
        None,
        panel=_RUN,
    )
    probe_examples: int | None = setting(
        "With --probe: number of training examples to measure on, the last ones of the training set. Default: 32.",
        None,
        panel=_RUN,
        most=MOST,
    )
    save_tokenizer: bool = setting(
        "Also store the tokenizer with the adapter, where others look for it; mode full always stores it.", False, panel=_RUN
    )
    report_to: Reporter = setting(
        "Also report to this tracker, through the transformers Trainer; log.jsonl is always written.", "none", panel=_RUN
    )
    device: str = setting("auto, cpu, cuda or cuda:<index>.", "auto", panel=_RUN)
    dtype: DtypeName = setting("auto: bf16 where the hardware supports it, otherwise fp32.", "auto", panel=_RUN)
    load_in_4bit: bool = setting(
        "Keep the base model in 4 bits (NF4) while the adapter is trained, as QLoRA does; needs the package bitsandbytes.",
        False,
        panel=_RUN,
    )
    shard: Literal["none", "fsdp"] = setting(
        "fsdp: divide the base model among the processes of torchrun, each layer gathered while it computes (FSDP2). Each takes less memory, and "
        "the result is the same up to rounding.",
        "none",
        panel=_RUN,
    )
    trust_remote_code: bool = setting("Run code from the model's repository. Only for authors you trust.", False, panel="Risky")

    def __post_init__(self) -> None:
        """Check everything that needs no file or model, and report all problems together."""
        problems = range_problems(self)
        if problem := check_date(self.template_date):
            problems.append(problem)
        problems += [
            f"--{name.replace('_', '-')} must be {need}, not {getattr(self, name)}"
            for name, ok, need in (
                ("learning_rate", self.learning_rate == AUTO or self.learning_rate > 0, "positive"),
                ("epochs", self.epochs > 0, "positive"),
                ("max_steps", self.max_steps is None or self.max_steps >= 1, "at least 1"),
                ("batch_size", self.batch_size >= 1, "at least 1"),
                ("tokens_per_row", self.tokens_per_row is None or self.tokens_per_row >= 1, "at least 1"),
                (
                    "attention",
                    self.attention in ATTENTIONS or bool(_KERNELS.fullmatch(self.attention)),
                    f"{', '.join(ATTENTIONS)}, or a repository such as kernels-community/flash-attn2",
                ),
                ("gradient_accumulation", self.gradient_accumulation >= 1, "at least 1"),
                ("warmup_ratio", 0 <= self.warmup_ratio < 1, "at least 0 and below 1"),
                ("weight_decay", self.weight_decay >= 0, "at least 0"),
                ("max_grad_norm", self.max_grad_norm >= 0, "at least 0"),
                ("max_length", self.max_length >= 2, "at least 2"),
                ("validation_size", self.validation_size is None or self.validation_size >= 1, "at least 1"),
                ("limit", self.limit is None or self.limit >= 1, "at least 1"),
                ("eval_steps", self.eval_steps is None or self.eval_steps >= 1, "at least 1"),
                ("eval_limit", self.eval_limit is None or self.eval_limit >= 1, "at least 1"),
                ("save_steps", self.save_steps >= 1, "at least 1"),
                ("keep_checkpoints", self.keep_checkpoints >= 1, "at least 1"),
                ("stop_at", self.stop_at is None or self.stop_at >= 1, "at least 1"),
                ("processes", self.processes is None or self.processes >= 1, "at least 1"),
                ("probe_examples", self.probe_examples is None or self.probe_examples >= 1, "at least 1"),
            )
            if not ok
        ]
        if self.stop_at is not None and self.validation_size is None:
            problems.append("--stop-at needs --validation-size: the validation loss is its result")
        if self.stop_at is not None and not self.validation_loss:
            problems.append("--stop-at has the validation loss as its result; leave out --no-validation-loss")
        if self.columns:
            from cora_cli.data.formats.columns import chosen_shape

            chosen_shape(self.columns)
        if self.rate_from is not None and not self.dry_run:
            problems.append("--rate-from has no effect without --dry-run; leave it out")
        if self.processes is not None and not self.dry_run:
            problems.append(
                "--processes is for --dry-run; `torchrun --nproc-per-node N -m cora_cli train …` trains in N processes"
            )
        problems += self._probe_problems()
        method = METHODS[self.mode]
        problems += self._auto_problems(method)
        allowed = taken_settings(method)
        if not method.is_adapter:
            inapplicable = ["basis", "b_init", "compact", "start", "start_models", *sorted(OPTIONAL_SETTINGS)]
            reason = f"applies to adapters, not to mode {self.mode}"
        else:
            inapplicable, reason = sorted(OPTIONAL_SETTINGS - allowed), f"does not apply to mode {self.mode}"
        problems += [f"--{name.replace('_', '-')} {reason}" for name in inapplicable if self._asked_for(name)]
        problems += self._hardware_problems(method)
        if method.is_adapter:
            problems += self._start_problems(method)
        problems += method.problems(vars(self))
        if problems:
            raise UsageError("; ".join(problems))
        if (plan := self.adapter_plan()) is not None:
            self._check_b(method, plan)
            if self.learning_rate == AUTO and not method.can_train(plan):
                raise UsageError(
                    f"--learning-rate auto does not go with mode {self.mode}, which trains nothing here; give a number"
                )

    def _probe_problems(self) -> list[str]:
        """Sentences on `--probe` and `--probe-examples`."""
        if self.probe is None:
            unused = self.probe_examples is not None
            return ["--probe-examples has no effect without --probe FILE; leave it out"] if unused else []
        refused = {
            "--dry-run, which needs no weights": self.dry_run,
            "--dtype bf16: differences of its gradients have too few digits": self.dtype == "bf16",
            "--load-in-4bit, which keeps no weights to take a gradient of": self.load_in_4bit,
            "--shard": self.shard != "none",
        }
        return [f"--probe does not go with {what}; leave out one of them" for what, given in refused.items() if given]

    def _auto_problems(self, method: Method) -> list[str]:
        """Sentences on `--learning-rate auto`."""
        if self.learning_rate != AUTO:
            return []
        refused = {
            f"mode {self.mode}: it was measured on adapters; give a number": not method.is_adapter,
            "--load-in-4bit, with which curvature has not been measured; give a number": self.load_in_4bit,
            "--shard: the curvature is measured in one process; give a number": self.shard != "none",
            "--probe-examples: it has examples of its own; leave that out": self.probe is not None
            and self.probe_examples is not None,
        }
        return [f"--learning-rate auto does not go with {what}" for what, given in refused.items() if given]

    @property
    def peak_rate(self) -> float:
        """The learning rate; while it is to be proposed, the default in its place, for what does not depend on it."""
        return DEFAULT_RATE if self.learning_rate == AUTO else self.learning_rate

    def _hardware_problems(self, method: Method) -> list[str]:
        """Sentences on `--load-in-4bit` and `--shard`."""
        found, observed = [], method.observes(self.b_init)
        mode = f"mode {self.mode} with --b-init {self.b_init}" if method.b_init_is_free and observed else f"mode {self.mode}"
        if self.load_in_4bit and (not method.trains_on_four_bit or observed == "gradient"):
            found.append(f"--load-in-4bit does not apply to {mode}, which needs the weights themselves")
        if self.shard != "none" and self.load_in_4bit:
            found.append(
                "--shard divides weights that are stored as numbers, not those of --load-in-4bit; leave out one of them"
            )
        if self.shard != "none" and method.needs_complete_base:
            found.append(
                f"--shard does not apply to mode {self.mode}, which changes the weights of the base model in each step"
            )
        if self.compile and self.liger:
            found.append("--compile does not go with --liger, whose kernels torch.compile cannot trace; leave out one of them")
        if self.shard != "none" and (self.compile or self.liger):
            found.append(
                f"--{'compile' if self.compile else 'liger'} does not go with --shard, which gathers the layers' weights itself; leave out one of them"
            )
        if self.shard != "none" and observed:
            found.append(f"--shard does not apply to {mode}, whose start needs passes through the complete model")
        return found

    def _start_problems(self, method: Method) -> list[str]:
        """Sentences on `--start`, `--start-models` and `--start-examples`."""
        found, models = [], self.start_models or ()
        if self.start is not None and not method.takes_mean_start:
            if self.mode == self.start:
                found.append(f"mode {self.mode} is that start already; leave out --start {self.start}")
            else:
                found.append(
                    f"--start {self.start} is stored as a part of a LoRA, and mode {self.mode} is stored as {method.stored_as}; train on W + mean "
                    "instead: `cora train --mode mean-delta …`, then `cora merge` of that run, whose output is the --model"
                )
        if self.start is not None and self.compact:
            found.append(f"--compact stores only A, which would lose the models of --start {self.start}; leave out --compact")
        needed = self.start is not None or method.start_from in ("models", "adapters")
        if needed and not models:
            what = f"--start {self.start}" if self.start is not None else f"mode {self.mode}"
            found.append(f"{what} needs --start-models A,B,…: models that were fine-tuned from the base model")
        if models and not needed:
            found.append(f"--start-models has no effect in mode {self.mode} without --start mean-delta; leave it out")
        if twice := next((one for one in models if models.count(one) > 1), None):
            found.append(f"--start-models names {twice} twice")
        examples = getattr(self, "start_examples", None)
        if examples is not None and examples < 1:
            found.append(f"--start-examples must be at least 1, not {examples}")
        return found

    def _check_b(self, method: Method, plan: AdapterPlan) -> None:
        """Raise `UsageError` where `--compact` or `--basis` contradicts the start of B."""
        if self.compact and plan.trains_b:
            also = "also trains B" if A in method.trained else "trains B"
            raise UsageError(f"--compact stores only A, but mode {self.mode} {also}; leave out --compact")
        if self.compact and plan.b_init == "gradient":
            raise UsageError(
                "--compact stores only A, and a B from the gradient cannot be rebuilt from a file or a seed; leave out --compact"
            )
        if self.compact and not method.has_compact_form:
            raise UsageError(f"--compact needs a B that is frozen from a basis or a seed, which mode {self.mode} does not have")
        if plan.needs_basis and not self.basis:
            maker = "`cora extract-basis --side input`" if plan.basis_side == "input" else "`cora extract-basis`"
            otherwise = ", or another start by --b-init" if method.b_init_is_free else ""
            raise UsageError(f"mode {self.mode} needs --basis FILE, written by {maker}{otherwise}")
        if self.basis and not plan.needs_basis:
            raise UsageError(f"--basis has no effect where B starts as {plan.b_init}; leave it out")

    def _asked_for(self, name: str) -> bool:
        """Whether an optional setting was given, even as 0; a method's own may also be given as false."""
        return getattr(self, name) is not None and (name in _OF_METHODS or getattr(self, name) is not False)

    def adapter_plan(self) -> AdapterPlan | None:
        """The adapter that this configuration asks for; None for full fine-tuning. Raises `UsageError` for contradictions."""
        return self._adapter_plan

    def notices(self) -> list[str]:
        """Sentences on the settings of an adapter that have no effect; a user may keep them from another mode."""
        if (plan := self.adapter_plan()) is None:
            names, where = ["rank", "target_modules", "dropout"], f"in mode {self.mode}, which has no adapter"
        else:
            overruled = self.mode == "peft"
            names = [name for name in ("rank", "target_modules") if overruled and getattr(plan, name) != getattr(self, name)]
            where = "with --peft-config, which states it"
        return [f"{flag} has no effect {where}" for flag in given(self, names)]

    @functools.cached_property
    def _adapter_plan(self) -> AdapterPlan | None:
        own = {setting.name: getattr(self, setting.name) for setting in METHODS[self.mode].settings}
        request = AdapterRequest(
            rank=self.rank,
            alpha=2.0 * self.rank if self.alpha is None else self.alpha,
            rslora=self.rslora,
            target_modules=self.target_modules,
            dropout=self.dropout,
            seed=self.seed,
            b_init=self.b_init,
            a_init=self.a_init,
            has_basis=bool(self.basis),
            start=self.start,
            own={name: value for name, value in own.items() if value is not None},
        )
        return plan_adapter(self.mode, request)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for YAML, readable by `--config`; unset ones are left out, and so is what makes a command no run."""
        others = ("dry_run", "probe", "probe_examples")
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in others}
        values |= {name: list(value) for name, value in values.items() if isinstance(value, tuple)}
        return {name: value for name, value in values.items() if value is not None}

    def result_settings(self) -> dict[str, Any]:
        """The settings that determine the result; a resumed run must have the same ones.

        Settings that came after the first version are left out at their defaults, as in the records of runs from before.
        """
        later = {"load_in_4bit": False, "train_on": "last"}
        left_out = NOT_PART_OF_THE_RESULT | {name for name, default in later.items() if getattr(self, name) == default}
        return {name: value for name, value in self.as_dict().items() if name not in left_out}


if TYPE_CHECKING:
    TrainConfig = _SharedSettings
else:
    TrainConfig = dataclasses.make_dataclass(
        "TrainConfig",
        [(own.name, own.type | None, setting(own.help, None, panel=_ONE_METHOD)) for own in OWN_SETTINGS],
        bases=(_SharedSettings,),
        frozen=True,
        namespace={"__module__": __name__, "__doc__": "Every setting of `cora train`: the shared ones and each method's own."},
    )


def config_of_run(run: RunDirectory, **changes: Any) -> TrainConfig:
    """The settings that a run recorded, with `changes`. Raises `CoraError` naming the file where they are missing or damaged."""
    values = read_yaml(run.config, "configuration of the run")
    hints = typing.get_type_hints(TrainConfig)
    if unknown := sorted(values.keys() - hints):
        raise CoraError(f"{run.config} is damaged or from another version of cora: it has the unknown key {unknown[0]}")
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    for name in values.keys() - lists.keys():
        checked(values[name], hints[name], f"{run.config}: {name}")
    try:
        return TrainConfig(**{**values, **lists, **changes})
    except TypeError as error:
        raise CoraError(f"{run.config} is damaged: {error}") from error
