"""What is wrong with the settings of `cora train` by their values alone: out of range, or against one another."""

import re

from cora_cli.errors import UsageError
from cora_cli.methods.method import A, Method
from cora_cli.methods.plan import AdapterPlan
from cora_cli.methods.registry import METHODS, OPTIONAL_SETTINGS, OWN_SETTINGS, taken_settings
from cora_cli.settings import ATTENTIONS, check_date, range_problems
from cora_cli.training.proposal import AUTO
from cora_cli.training.settings import SharedSettings

_KERNELS = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?(:[\w.-]+)?")
_COUNTS = (
    "max_steps",
    "batch_size",
    "tokens_per_row",
    "gradient_accumulation",
    "validation_size",
    "limit",
    "eval_steps",
    "eval_limit",
    "save_steps",
    "keep_checkpoints",
    "stop_at",
    "processes",
    "probe_examples",
)
_OF_METHODS = frozenset(own.name for own in OWN_SETTINGS)


def contradictions(config: SharedSettings) -> list[str]:
    """A sentence on every problem of the settings that can be seen without a file or a model, except those of `check_plan`."""
    problems = range_problems(config)
    if problem := check_date(config.template_date):
        problems.append(problem)
    problems += _small_problems(config)
    if config.stop_at is not None and config.validation_size is None:
        problems.append("--stop-at needs --validation-size: the validation loss is its result")
    if config.stop_at is not None and not config.validation_loss:
        problems.append("--stop-at has the validation loss as its result; leave out --no-validation-loss")
    if config.columns:
        from cora_cli.data.formats.columns import chosen_shape

        chosen_shape(config.columns)
    if config.rate_from is not None and not config.dry_run:
        problems.append("--rate-from has no effect without --dry-run; leave it out")
    if config.processes is not None and not config.dry_run:
        problems.append("--processes is for --dry-run; `torchrun --nproc-per-node N -m cora_cli train …` trains in N processes")
    problems += _probe_problems(config)
    method = METHODS[config.mode]
    problems += _auto_problems(config, method)
    allowed = taken_settings(method)
    if not method.is_adapter:
        inapplicable = ["basis", "b_init", "compact", "start", "start_models", *sorted(OPTIONAL_SETTINGS)]
        reason = f"applies to adapters, not to mode {config.mode}"
    else:
        inapplicable, reason = sorted(OPTIONAL_SETTINGS - allowed), f"does not apply to mode {config.mode}"
    problems += [f"--{name.replace('_', '-')} {reason}" for name in inapplicable if _asked_for(config, name)]
    problems += _hardware_problems(config, method)
    if method.is_adapter:
        problems += _start_problems(config, method)
    problems += method.problems(vars(config))
    return problems


def _small_problems(config: SharedSettings) -> list[str]:
    """Sentences on numbers that are too small, and on the name of an attention."""
    checks = {
        "learning_rate": (config.learning_rate == AUTO or config.learning_rate > 0, "positive"),
        "epochs": (config.epochs > 0, "positive"),
        "warmup_ratio": (0 <= config.warmup_ratio < 1, "at least 0 and below 1"),
        "weight_decay": (config.weight_decay >= 0, "at least 0"),
        "max_grad_norm": (config.max_grad_norm >= 0, "at least 0"),
        "max_length": (config.max_length >= 2, "at least 2"),
        "attention": (
            config.attention in ATTENTIONS or bool(_KERNELS.fullmatch(config.attention)),
            f"{', '.join(ATTENTIONS)}, or a repository such as kernels-community/flash-attn2",
        ),
    }
    checks |= {name: (value is None or value >= 1, "at least 1") for name in _COUNTS for value in [getattr(config, name)]}
    return [
        f"--{name.replace('_', '-')} must be {need}, not {getattr(config, name)}"
        for name, (ok, need) in checks.items()
        if not ok
    ]


def _probe_problems(config: SharedSettings) -> list[str]:
    """Sentences on `--probe` and `--probe-examples`."""
    if config.probe is None:
        unused = config.probe_examples is not None
        return ["--probe-examples has no effect without --probe FILE; leave it out"] if unused else []
    refused = {
        "--dry-run, which needs no weights": config.dry_run,
        "--dtype bf16: differences of its gradients have too few digits": config.dtype == "bf16",
        "--load-in-4bit, which keeps no weights to take a gradient of": config.load_in_4bit,
        "--shard": config.shard != "none",
    }
    return [f"--probe does not go with {what}; leave out one of them" for what, given in refused.items() if given]


def _auto_problems(config: SharedSettings, method: Method) -> list[str]:
    """Sentences on `--learning-rate auto`."""
    if config.learning_rate != AUTO:
        return []
    refused = {
        f"mode {config.mode}: it was measured on adapters; give a number": not method.is_adapter,
        "--load-in-4bit, with which curvature has not been measured; give a number": config.load_in_4bit,
        "--shard: the curvature is measured in one process; give a number": config.shard != "none",
        "--probe-examples: it has examples of its own; leave that out": config.probe is not None
        and config.probe_examples is not None,
    }
    return [f"--learning-rate auto does not go with {what}" for what, given in refused.items() if given]


def _hardware_problems(config: SharedSettings, method: Method) -> list[str]:
    """Sentences on `--load-in-4bit` and `--shard`."""
    found, observed = [], method.observes(config.b_init)
    mode = f"mode {config.mode} with --b-init {config.b_init}" if method.b_init_is_free and observed else f"mode {config.mode}"
    if config.load_in_4bit and (not method.trains_on_four_bit or observed == "gradient"):
        found.append(f"--load-in-4bit does not apply to {mode}, which needs the weights themselves")
    if config.shard != "none" and config.load_in_4bit:
        found.append("--shard divides weights that are stored as numbers, not those of --load-in-4bit; leave out one of them")
    if config.shard != "none" and method.needs_complete_base:
        found.append(f"--shard does not apply to mode {config.mode}, which changes the weights of the base model in each step")
    if config.compile and config.liger:
        found.append("--compile does not go with --liger, whose kernels torch.compile cannot trace; leave out one of them")
    if config.shard != "none" and (config.compile or config.liger):
        found.append(
            f"--{'compile' if config.compile else 'liger'} does not go with --shard, which gathers the layers' weights itself; leave out one of them"
        )
    if config.shard != "none" and observed:
        found.append(f"--shard does not apply to {mode}, whose start needs passes through the complete model")
    return found


def _start_problems(config: SharedSettings, method: Method) -> list[str]:
    """Sentences on `--start`, `--start-models` and `--start-examples`."""
    found, models = [], config.start_models or ()
    if config.start is not None and not method.takes_mean_start:
        if config.mode == config.start:
            found.append(f"mode {config.mode} is that start already; leave out --start {config.start}")
        else:
            found.append(
                f"--start {config.start} is stored as a part of a LoRA, and mode {config.mode} is stored as {method.stored_as}; train on W + mean "
                "instead: `cora train --mode mean-delta …`, then `cora merge` of that run, whose output is the --model"
            )
    if config.start is not None and config.compact:
        found.append(f"--compact stores only A, which would lose the models of --start {config.start}; leave out --compact")
    needed = config.start is not None or method.start_from in ("models", "adapters")
    if needed and not models:
        what = f"--start {config.start}" if config.start is not None else f"mode {config.mode}"
        found.append(f"{what} needs --start-models A,B,…: models that were fine-tuned from the base model")
    if models and not needed:
        found.append(f"--start-models has no effect in mode {config.mode} without --start mean-delta; leave it out")
    if twice := next((one for one in models if models.count(one) > 1), None):
        found.append(f"--start-models names {twice} twice")
    examples = getattr(config, "start_examples", None)
    if examples is not None and examples < 1:
        found.append(f"--start-examples must be at least 1, not {examples}")
    return found


def check_plan(config: SharedSettings, plan: AdapterPlan) -> None:
    """Raise `UsageError` where `--compact`, `--basis` or `--learning-rate auto` contradicts the adapter that the settings ask for."""
    method = METHODS[config.mode]
    if config.compact and plan.trains_b:
        also = "also trains B" if A in method.trained else "trains B"
        raise UsageError(f"--compact stores only A, but mode {config.mode} {also}; leave out --compact")
    if config.compact and plan.b_init == "gradient":
        raise UsageError(
            "--compact stores only A, and a B from the gradient cannot be rebuilt from a file or a seed; leave out --compact"
        )
    if config.compact and not method.has_compact_form:
        raise UsageError(f"--compact needs a B that is frozen from a basis or a seed, which mode {config.mode} does not have")
    if plan.needs_basis and not config.basis:
        maker = "`cora extract-basis --side input`" if plan.basis_side == "input" else "`cora extract-basis`"
        otherwise = ", or another start by --b-init" if method.b_init_is_free else ""
        raise UsageError(f"mode {config.mode} needs --basis FILE, written by {maker}{otherwise}")
    if config.basis and not plan.needs_basis:
        raise UsageError(f"--basis has no effect where B starts as {plan.b_init}; leave it out")
    if config.learning_rate == AUTO and not method.can_train(plan):
        raise UsageError(f"--learning-rate auto does not go with mode {config.mode}, which trains nothing here; give a number")


def _asked_for(config: SharedSettings, name: str) -> bool:
    """Whether an optional setting was given, even as 0; a method's own may also be given as false."""
    return getattr(config, name) is not None and (name in _OF_METHODS or getattr(config, name) is not False)
