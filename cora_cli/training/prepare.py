"""Everything that a training run needs, checked before its first file is written: data, model, basis, tokens, Trainer arguments.

It reads headers and records but no weights, so that mistakes are reported within seconds. `run` does the training.
"""

import dataclasses
import importlib.util
import re
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from cora_cli.adapters.install import target_linears
from cora_cli.basis.artifact import Basis, read_basis, stand_in_basis
from cora_cli.data.encode import EncodedSet, Example, encode_records
from cora_cli.data.split import Choice, DataSplit, load_split
from cora_cli.data.templates import Template, choose_template
from cora_cli.device import Hardware, PackedAttention, is_installed, select_hardware, select_packed_attention
from cora_cli.errors import CoraError
from cora_cli.methods.method import Method
from cora_cli.methods.parts.layers import linear_weight
from cora_cli.methods.plan import AdapterPlan
from cora_cli.methods.registry import method_of
from cora_cli.models.causality import require_causal
from cora_cli.models.configuration import balances_experts, load_configuration, remove_dropout
from cora_cli.models.fused import split_parts, split_projections, wanted_views
from cora_cli.models.loading import check_names, context_length, skeleton_as_stored
from cora_cli.models.model_path import ModelPath
from cora_cli.models.quantized import check_four_bit, kind_stated, require_four_bit
from cora_cli.models.references import resolve_model
from cora_cli.models.skeleton import build_skeleton
from cora_cli.models.tokenizer import load_tokenizer
from cora_cli.models.trained_on import check_code
from cora_cli.progress import note, say
from cora_cli.training.arguments import number_of_processes, total_steps, warmup_steps
from cora_cli.training.batching import cannot_pack
from cora_cli.training.config import TrainConfig
from cora_cli.training.fast_paths import LIGER_MISSING, layers_to_compile
from cora_cli.weights.sources import open_source
from cora_cli.weights.start_models import StartModels

Found = TypeVar("Found")


class Shared:
    """What several runs read alike, such as records, tokens and the model's configuration: read once and kept."""

    def __init__(self) -> None:
        self._found: dict[Hashable, Any] = {}

    def once(self, key: Hashable, read: Callable[[], Found]) -> Found:
        """What `read` returned the first time that it was called for `key`."""
        if key not in self._found:
            self._found[key] = read()
        found: Found = self._found[key]
        return found


_NO_FOUR_BIT = frozenset(
    {
        *("C3A", "DEFT", "DELORA", "FROD", "GLORA", "GRALORA", "HRA", "LN_TUNING", "LOHA", "LOKR", "OSF", "PEANUT", "PSOFT"),
        *("SUPERTUNING", "TINYLORA", "UNILORA"),
    }
)
"""Methods of PEFT that read the weights of the base, or their shape, or change what they multiply to."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The checked inputs of a run. `attention` is that of packed rows, which `batching` checks; `model_config` has no dropout, and
    `skeleton` is the model without weights."""

    hardware: Hardware
    attention: PackedAttention
    model_path: ModelPath
    model_config: Any
    skeleton: Any
    tokenizer: Any
    template: Template
    data: DataSplit
    train: EncodedSet
    test: EncodedSet
    validation: EncodedSet
    basis: Basis | None
    plan: AdapterPlan | None
    layers: tuple[str, ...] = ()
    start_models: StartModels | None = None

    def fingerprint(self, config: TrainConfig) -> dict[str, Any]:
        """The settings and the content hash of every input: runs with equal fingerprints compute the same result."""
        return {
            "settings": {**config.result_settings(), "dtype": self.hardware.dtype_name},
            "model_sha256": self.model_path.content_hash(),
            "tokenizer_sha256": self.model_path.text_hash(),
            "data_sha256": self.data.content_hash(),
            "basis_sha256": self.basis.sha256 if self.basis else None,
            **(method_of(self.plan.mode).inputs(self.plan) if self.plan else {}),
            **({"start_models_sha256": list(self.start_models.hashes.values())} if self.start_models else {}),
        }

    @property
    def start_examples(self) -> Sequence[Example]:
        """The training examples that the start is computed from, for a method with such a start."""
        assert self.plan is not None
        method = method_of(self.plan.mode)
        return self.train.examples[: self.plan.own.get("start_examples") or method.DEFAULT_EXAMPLES]


def prepare(
    config: TrainConfig,
    date_of_earlier_start: str | None = None,
    planned: Hardware | None = None,
    shared: Shared | None = None,
) -> Prepared:
    """Check everything that needs no weights in memory, the cheapest first.

    A resumed run keeps the date that its template wrote into the prompts. For a plan only, `planned` is the hardware, and the model
    needs no weights. In the plan of a grid, `shared` has what its runs have in common; a basis is a stand-in there, since the grid may not have
    extracted it yet, and start models are left out.
    """
    if config.report_to != "none" and importlib.util.find_spec(config.report_to) is None:
        raise CoraError(f"--report-to {config.report_to} needs the package {config.report_to}: pip install {config.report_to}")
    plan, known, method = config.adapter_plan(), shared or Shared(), method_of(config.mode)
    for notice in config.notices():
        note(notice)
    data, model_path = _read(config, known, weights=planned is None)
    check_code(model_path, model_path, config.trust_remote_code)
    _check_processes(config, method)
    basis = None
    if plan is not None and config.basis:
        basis = read_basis(Path(config.basis)) if shared is None else stand_in_basis()
        if shared is None and (planned is None or model_path.has_weights):
            _check_basis(basis, model_path, method, plan)
    hardware = planned or select_hardware(config.device, config.dtype)
    template = _template(config, known, model_path, data, date_of_earlier_start)
    model_config, skeleton, removed = _skeleton(config, known, model_path, planned is not None)
    if config.gradient_checkpointing and not skeleton.supports_gradient_checkpointing:
        raise CoraError(
            f"--gradient-checkpointing does not apply to {config.model}: transformers cannot compute the activations of {type(skeleton).__name__} again; "
            "leave it out, and lower --batch-size, with --gradient-accumulation, to save memory"
        )
    stored = kind_stated(model_path)
    if config.load_in_4bit and stored:
        raise CoraError(
            f"--load-in-4bit does not go with {config.model}, which is stored quantised already ({stored}); leave it out"
        )
    if config.load_in_4bit:
        require_four_bit()
    if planned is not None and stored:
        note(
            f"{config.model} is stored quantised ({stored}), and may take less memory: the plan counts its weights as plain numbers"
        )
    attention = _packed_attention(config, hardware, skeleton)
    layers: list[str] = []
    start_models: StartModels | None = None
    if plan is not None:
        plan, layers, start_models = _fitted(plan, config, model_path, skeleton, shared is None)
    if config.load_in_4bit and hardware.device.type == "cpu":
        check_four_bit(skeleton, model_path.reference, "omit --load-in-4bit, or use a CUDA GPU")
    sets = _encoded(config, known, data, template, skeleton)
    examples = len(sets[0].examples)
    _check_row(config.tokens_per_row, sets[0])
    if config.stop_at is not None and config.stop_at >= (steps := total_steps(config, examples)):
        raise CoraError(f"--stop-at must be below the {steps} steps of the run, not {config.stop_at}")
    if plan is not None:
        plan = _scheduled(plan, layers, config, examples)
    _say_left_out(config, model_path, removed)
    found = (hardware, attention, model_path, model_config, skeleton, template.tokenizer, template, data, *sets, basis, plan)
    return Prepared(*found, tuple(layers), start_models)


def _say_left_out(config: TrainConfig, model: ModelPath, removed: dict[str, float]) -> None:
    """Say what the model's configuration asks of a training and this one does not do; `removed` is its dropout."""
    if removed:
        note(
            f"{config.model} is trained without its own dropout: {', '.join(f'{name} {value:g}' for name, value in removed.items())} set to 0"
        )
    if balances_experts(model.config()):
        note(
            f"{config.model} is trained on the loss of the answers alone, without the balance of its experts that output_router_logits in its "
            "config.json adds"
        )


def _of_data(config: TrainConfig) -> tuple[Any, ...]:
    """The arguments of `load_split`."""
    sizes = (config.test_size, config.split_seed, config.validation_size, config.train_on == "all")
    return config.dataset, *sizes, Choice(config.columns, config.subset, config.split), config.test_dataset


def _read(config: TrainConfig, known: Shared, weights: bool) -> tuple[DataSplit, ModelPath]:
    """The records and the model, with its `weights` or without. Raises `CoraError` for an adapter."""
    read = _of_data(config)
    data = known.once(("records", *read), lambda: load_split(*read))
    if config.limit:
        data = dataclasses.replace(data, train=data.train[: config.limit])
    model = known.once(("model", config.model), lambda: resolve_model(config.model, weights=weights))
    if model.is_adapter:
        raise CoraError(
            f"{config.model} is an adapter; training needs a complete model: write one with `cora merge {config.model}` first"
        )
    return data, model


def _template(config: TrainConfig, known: Shared, model: ModelPath, data: DataSplit, date: str | None) -> Template:
    """The template with the tokenizer; `date` is that of an earlier start. Raises `CoraError` for settings that do not go with it."""
    key = ("tokenizer", config.model, config.trust_remote_code)
    tokenizer = known.once(key, lambda: load_tokenizer(model, config.trust_remote_code))
    name = choose_template(config.template, data.schema, tokenizer)
    template = Template(name, data.schema, tokenizer, config.template_date or date)
    if config.template_date and not template.reads_clock:
        raise CoraError(f"--template-date has no effect: the template {name} of {config.model} writes no date; leave it out")
    if config.train_on == "all" and data.schema != "messages":
        raise CoraError(
            f"--train-on all needs conversations (a column messages), which {config.dataset} does not have; leave it out"
        )
    return template


def _skeleton(config: TrainConfig, known: Shared, model: ModelPath, planned: bool) -> tuple[Any, Any, dict[str, float]]:
    """The model's configuration, the model without weights, and the dropout that was removed from the configuration.

    Raises `CoraError` for a model that is not causal; for a plan, also where its files lack weights, which otherwise loading says.
    """

    def configure() -> tuple[Any, dict[str, float]]:
        configuration = load_configuration(model, config.trust_remote_code)
        return configuration, remove_dropout(configuration)

    def build() -> Any:
        if not planned:
            return build_skeleton(model_config, config.trust_remote_code)
        built = skeleton_as_stored(model, model_config, config.trust_remote_code)
        check_names(model, built)
        return built

    key = (config.model, config.trust_remote_code)
    model_config, removed = known.once(("configuration", *key), configure)
    # Its fused projections are split for the targets.
    targets = config.target_modules if (plan := config.adapter_plan()) is None else plan.target_modules
    skeleton: Any = known.once(("skeleton", *key, targets), build)
    require_causal(skeleton, model.reference)
    return model_config, skeleton, removed


def _encoded(
    config: TrainConfig, known: Shared, data: DataSplit, template: Template, skeleton: Any
) -> tuple[EncodedSet, EncodedSet, EncodedSet]:
    """The tokens of the training, held-out and validation records."""
    length, context = config.max_length, context_length(skeleton.config)
    rows = skeleton.get_input_embeddings().weight.shape[0]
    key = (*_of_data(config), config.model, config.trust_remote_code, config.limit, template.name, template.date, length)
    every = config.train_on == "all"
    train, test, validation = known.once(
        ("tokens", *key),
        lambda: (
            encode_records(data.train, template, length, "training", rows, every, context),
            encode_records(data.test, template, length, "held-out", rows, context=context),
            encode_records(data.validation, template, length, "validation", rows, context=context),
        ),
    )
    if config.eval_limit:
        test = dataclasses.replace(test, examples=test.examples[: config.eval_limit])
    return train, test, validation


def _packed_attention(config: TrainConfig, hardware: Hardware, skeleton: Any) -> PackedAttention:
    """The attention of packed rows. Raises `CoraError` for kernels that this hardware does not have, and for options that do not go with the
    model."""
    if config.attention != "auto" and (why := cannot_pack(skeleton)):
        raise CoraError(f"--attention {config.attention} cannot be used with {config.model}: {why}")
    if config.liger and hardware.device.type != "cuda":
        raise CoraError("--liger needs a CUDA GPU, because its kernels are written in Triton; leave it out on a processor")
    if config.compile:
        layers_to_compile(skeleton)
    # A planned GPU that is not here will have what it needs: every CUDA build of torch brings Triton.
    has = is_installed if torch.cuda.is_available() else lambda package: True
    if config.liger and not has("liger_kernel"):
        raise CoraError(LIGER_MISSING)
    return select_packed_attention(hardware.device.type, hardware.dtype, config.attention, has)


def _check_processes(config: TrainConfig, method: Method) -> None:
    """Raise `CoraError` where the method or `--shard` needs another number of processes."""
    processes = number_of_processes(config)
    if not method.runs_in_several_processes and processes > 1:
        raise CoraError(f"mode {config.mode} changes its number of parameters and runs in one process only, not in {processes}")
    if config.shard != "none" and processes == 1:
        raise CoraError(
            f"--shard {config.shard} divides the model among processes, and there is only one; "
            f"{'plan for several with --processes N' if config.dry_run else 'start several with `torchrun --nproc-per-node N -m cora_cli train …`'}"
            ", or leave it out"
        )


def _check_basis(basis: Basis, model: ModelPath, method: Method, plan: AdapterPlan) -> None:
    """Raise `CoraError` for a basis that does not fit the weights of the model."""
    source = open_source(model)
    targets = source.targets(plan.target_modules)
    basis.check_model(
        source.architecture,
        {name: source.shapes[name] for name in targets},
        plan.rank if plan.basis_side == "input" else method.b_width(plan),
        plan.basis_side,
        method.width_flag,
    )
    basis.check_base(source)


def _fitted(
    plan: AdapterPlan, config: TrainConfig, model: ModelPath, skeleton: Any, with_start_models: bool
) -> tuple[AdapterPlan, list[str], StartModels | None]:
    """The plan for a model, the layers to adapt, and the models to start from. Raises `CoraError` where they do not fit each other."""
    method = method_of(plan.mode)
    if config.load_in_4bit and (fused := next(iter(wanted_views(skeleton, plan.target_modules)), None)):
        called = fused.rpartition(".")[2]
        raise CoraError(
            f"--load-in-4bit holds {called} of {config.model} in 4 bits, whose rows q_proj, k_proj and v_proj cannot be taken apart; adapt all of "
            f"them with --target-modules {called}, or leave out --load-in-4bit"
        )
    if config.load_in_4bit and (kind := str(plan.own.get("peft", {}).get("peft_type")).upper()) in _NO_FOUR_BIT:
        raise CoraError(f"--load-in-4bit does not go with {kind} of --peft-config, which needs the weights themselves")
    plan = method.for_model(plan, model.attention_heads())
    method.configuration(plan)
    layers = _checked_targets(skeleton, method, plan)
    if not config.start_models or not with_start_models:
        return plan, layers, None
    models = StartModels(config.start_models, model, layers, method.adapters_only)
    return dataclasses.replace(plan, own={**plan.own, "start_models": models.hashes}), layers, models


def _scheduled(plan: AdapterPlan, layers: list[str], config: TrainConfig, examples: int) -> AdapterPlan:
    """The plan for a number of training examples. Raises `CoraError` where the method cannot run for so many steps."""
    method, steps = method_of(plan.mode), total_steps(config, examples)
    method.check_run(plan, layers, steps)
    return method.for_run(plan, config.peak_rate, warmup_steps(config.warmup_ratio, steps))


def _check_row(tokens: int | None, train: EncodedSet) -> None:
    """Raise `CoraError` where an example alone is longer than the row that the user allows."""
    longest = max((len(example.input_ids) for example in train.examples), default=0)
    if tokens is not None and longest > tokens:
        raise CoraError(
            f"--tokens-per-row must be at least {longest}, the tokens of the longest training example, not {tokens}; a smaller --max-length "
            "shortens it"
        )


def _checked_targets(skeleton: Any, method: Method, plan: AdapterPlan) -> list[str]:
    """The layers to adapt, by name. Raises `CoraError` for one that the method cannot adapt."""
    split_projections(skeleton, plan.target_modules)
    if split := split_parts(skeleton):
        say(
            f"q_proj, k_proj and v_proj are rows of {next(iter(split)).rpartition('.')[2]} in this model, which is split into them"
        )
    linears = target_linears(skeleton, plan.target_modules)
    method.check_layers(plan, linears)
    every = [name for name, module in skeleton.named_modules() if linear_weight(module) is not None]
    if without := layers_without(list(linears), every):
        note(
            f"{len(without)} layers have none of the target modules {', '.join(plan.target_modules)} and are not adapted, such as {without[0]}"
        )
    return list(linears)


def layers_without(adapted: Sequence[str], every: Sequence[str]) -> list[str]:
    """The numbered layers of a stack, such as `model.layers.3`, that hold linear layers of which none is adapted while others of the stack are.

    `every` names all linear layers of the model. Models that mix kinds of attention have such layers.
    """

    def layer(name: str) -> tuple[str, int] | None:
        found = re.match(r"(.*?)\.(\d+)\.", name)
        return (found[1], int(found[2])) if found else None

    with_adapter = {found for name in adapted if (found := layer(name))}
    stacks = {stack for stack, _ in with_adapter}
    lacking = {found for name in every if (found := layer(name)) and found[0] in stacks} - with_adapter
    return [f"{stack}.{number}" for stack, number in sorted(lacking)]
