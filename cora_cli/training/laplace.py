"""Laplace-LoRA: a Gaussian around the trained weights of a finished run, from the curvature of the loss on its training records.

Nothing is trained. The result is a run directory like the first, whose adapter has a distribution (`adapters.posterior`).
"""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from cora_cli import hashing, writing
from cora_cli.adapters.card import write_card
from cora_cli.adapters.kronecker import Kronecker, best_precision
from cora_cli.adapters.loading import load_adapter
from cora_cli.adapters.posterior import has_posterior, write_kronecker
from cora_cli.data.encode import Example
from cora_cli.errors import CoraError
from cora_cli.methods.parts.layers import ADAPTER, lora_layers, without_cache
from cora_cli.methods.registry import METHODS, method_of
from cora_cli.models.loading import load_model
from cora_cli.models.quantized import PLAIN_COPY, is_held_quantized
from cora_cli.models.references import resolve_model
from cora_cli.models.trained_on import check_code
from cora_cli.progress import progress, say
from cora_cli.records import read_run, template_date, write_run
from cora_cli.rundir import RunDirectory
from cora_cli.training.config import TrainConfig, config_of_run
from cora_cli.training.prepare import prepare
from cora_cli.training.record import FINISHED

Factor = tuple[str, str]
"""A layer's name, and A or B."""


class CurvatureSums:
    """While it is open, the sums of K-FAC over every position of the forward and backward passes of a PEFT model.

    For the A and the B of each layer: Σ x·xᵀ of their inputs and Σ g·gᵀ of the gradients with respect to their outputs, in float32.
    """

    def __init__(self, model: PeftModel) -> None:
        self._model = model
        self.activations: dict[Factor, torch.Tensor] = {}
        self.gradients: dict[Factor, torch.Tensor] = {}
        self.counts: dict[Factor, int] = {}
        """Positions seen: rows of the inputs. A layer that several blocks share sees more than others, one that nothing calls none."""
        for name, layer in lora_layers(model):
            for factor in ("A", "B"):
                weight = getattr(layer, f"lora_{factor}")[ADAPTER].weight
                out, inside = weight.shape
                self.activations[name, factor] = torch.zeros((inside, inside), device=weight.device)
                self.gradients[name, factor] = torch.zeros((out, out), device=weight.device)
                self.counts[name, factor] = 0

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Collect from every pass within."""
        with contextlib.ExitStack() as hooks:
            for name, layer in lora_layers(self._model):
                for factor in ("A", "B"):
                    module = getattr(layer, f"lora_{factor}")[ADAPTER]
                    hooks.callback(module.register_forward_hook(self._hook((name, factor))).remove)
            yield

    def curvatures(self, share: float, most: int) -> dict[Factor, Kronecker]:
        """The curvature of each matrix, with `most` directions on either side; what was seen is this `share` of the data."""
        return {
            key: Kronecker.of_sums(self.gradients[key] / share, activations, max(self.counts[key], 1), most)
            for key, activations in self.activations.items()
        }

    def _hook(self, key: Factor) -> Any:
        def forward(_: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            x = inputs[0].detach().flatten(0, -2).float()
            self.activations[key] += x.T @ x
            self.counts[key] += len(x)

            def backward(gradient: torch.Tensor) -> None:
                g = gradient.flatten(0, -2).float()
                self.gradients[key] += g.T @ g

            output.register_hook(backward)

        return forward


def laplace(
    run: str,
    output: Path,
    *,
    prior_precision: float | None = None,
    directions: int = 64,
    limit: int | None = None,
    seed: int = 0,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write the run with its distribution to `output` and return what `run.json` says of it.

    The curvature is the Fisher information of the tokens that the model itself would answer with, sampled by `seed`, at every response
    token of the training records, or of the first `limit` of them, scaled up. The prior precision maximises the marginal likelihood unless
    it is given. Raises `CoraError` for a run that is not finished, that cannot be read, or whose adapter is not A and B alone.
    """
    source = RunDirectory(Path(run))
    record = _checked_record(source, run)
    # How the run was computed, on whatever hardware, is not how its records are passed through the model here.
    hardware: dict[str, Any] = {"device": device, "attention": "auto", "compile": False, "liger": False, "shard": "none"}
    config = config_of_run(source, trust_remote_code=trust_remote_code, **hardware)
    _require_inputs(source, config)
    adapter = resolve_model(run)
    check_code(adapter, resolve_model(config.model, weights=False), trust_remote_code)
    prepared = prepare(config, template_date(record))
    now, then = prepared.fingerprint(config), record["fingerprint"]
    for key, what in (("model_sha256", "base model"), ("data_sha256", "data set"), ("tokenizer_sha256", "tokenizer")):
        if now[key] != then.get(key, now[key]):  # earlier versions did not record the tokenizer
            raise CoraError(f"the {what} of {run} is not the one that it was trained with; restore it")
    settings, trained_with = now["settings"], then["settings"]
    for name in sorted((settings.keys() & trained_with.keys()) - {"dtype"}):
        if settings[name] != trained_with[name]:
            raise CoraError(
                f"{source.config} has {name} {settings[name]}, but the run was trained with {trained_with[name]}; restore the file"
            )
    examples = prepared.train.examples[:limit]
    say(prepared.hardware.describe())
    base = load_model(prepared.model_path, prepared.hardware.dtype, prepared.hardware.device, None, config.trust_remote_code)
    if is_held_quantized(base):
        raise CoraError(
            f"cora laplace needs a run on plain weights: those of {prepared.model_path.reference} are held quantised; train on {PLAIN_COPY}"
        )
    model = load_adapter(base, adapter, trainable=True)
    sums = _measured(model, examples, seed)
    curvatures = sums.curvatures(len(examples) / len(prepared.train.examples), directions)
    weights = [parameter.detach().double() for parameter in model.parameters() if parameter.requires_grad]
    norm_squared = float(sum(weight.square().sum() for weight in weights))
    precision = prior_precision or best_precision(list(curvatures.values()), norm_squared)
    decided = sum(float((one.eigenvalues / (one.eigenvalues + precision)).sum()) for one in curvatures.values())
    found = {
        "prior_precision": precision,
        "chosen_by": "the user" if prior_precision else "marginal likelihood",
        "records": len(examples),
        "directions": directions,
        "seed": seed,
        "decided_directions": decided,
        "parameters": sum(weight.numel() for weight in weights),
    }
    with writing.atomic_path(output, replace=False) as temporary:
        new = RunDirectory(temporary)
        for kept in ("config", "log", "test_records", "trained_prompts", "heldout"):
            if (path := getattr(source, kept)).exists():
                temporary.mkdir(exist_ok=True)
                shutil.copyfile(path, getattr(new, kept))
        new.adapter.mkdir()
        for name in source.result_files():
            shutil.copyfile(source.result / name, new.adapter / name)
        write_kronecker(new.adapter, curvatures, precision)
        files = new.result_files()
        now = {**record, "result_files": files, "result_sha256": hashing.sha256_json(files), "laplace": found}
        write_card(new.adapter, now)
        write_run(new, now)
    return found


def _require_inputs(source: RunDirectory, config: TrainConfig) -> None:
    """Raise `CoraError` where something that the run was trained with is no longer at its place, as after a move; no flag names another place."""
    for name in ("model", "dataset", "test_dataset", "basis", "peft_config"):
        place = getattr(config, name)
        if place is not None and Path(place).is_absolute() and not Path(place).exists():
            raise CoraError(
                f"the {name} of {source.root} is no longer at {place}; put it back, or write where it is now into {source.config}"
            )


def _checked_record(source: RunDirectory, run: str) -> dict[str, Any]:
    if not source.exists():
        raise CoraError(
            f"{run} is not a cora run (no {source.record.name} of cora); `cora laplace` needs a finished run of `cora train`"
        )
    record = read_run(source)
    if record["status"] != FINISHED:
        raise CoraError(f"{run} is not finished (status {record['status']}); complete it with --resume")
    source.check_result()
    method = method_of(record["mode"], source.record)
    if not method.takes_laplace or record["fingerprint"]["settings"].get("load_in_4bit"):
        fitting = ", ".join(one.name for one in METHODS.values() if one.takes_laplace)
        raise CoraError(
            f"cora laplace needs a run that trained A and B of each layer as they are on a base that is not in 4 bits (mode {fitting}), not {run} of mode "
            f"{method.name}"
        )
    if start := record["plan"].get("start"):
        raise CoraError(
            f"cora laplace needs a run whose adapter is the A and B that it trained, not {run} with --start {start}, whose mean is stored among them"
        )
    if has_posterior(resolve_model(run)):
        raise CoraError(f"{run} has a distribution of weights already; name the run that it was made of")
    if record["is_base_model"]:
        raise CoraError(f"{run} equals its base model, since nothing in it could train")
    return record


def _measured(model: PeftModel, examples: Sequence[Example], seed: int) -> CurvatureSums:
    """The sums over the examples, one at a time, with answers sampled from the model."""
    sums = CurvatureSums(model)
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    with sums.watching(), progress("curvature", len(examples), "records") as shown:
        for example in examples:
            ids = torch.tensor([example.input_ids], device=device)
            logits = model(input_ids=ids, **without_cache(model)).logits[0, example.prompt_length - 1 : -1].float()
            answers = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            loss = torch.nn.functional.cross_entropy(logits, answers, reduction="sum")
            # For its hooks alone; no gradient is kept.
            torch.autograd.grad(loss, trained, allow_unused=True)
            shown.advance()
    return sums
