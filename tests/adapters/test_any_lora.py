"""Any LoRA that PEFT trains on any model: loaded, merged, exported and read as PEFT computes it, or refused for a reason that is known here."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from cora_cli.adapters.export import export_adapter
from cora_cli.adapters.loading import load_adapter
from cora_cli.adapters.merge import merge_adapter
from cora_cli.errors import CoraError
from cora_cli.models.references import resolve_model
from cora_cli.scratch import temporary_directory
from cora_cli.weights.sources import open_source
from tests.training.families import build

FAMILIES = ("llama", "gpt2", "phi", "bloom", "gemma2", "qwen3_moe", "roberta", "opt", "stablelm")
REFUSED = {
    "load": (),
    "merge": ("because the base layer has no bias",),
    "export": ("DoRA, which has no equivalent LoRA", "which other layers share, so no LoRA on the base"),
    "read": (
        "trained with use_dora",
        "which changes the base weights",
        "trained with layer_replication",
        "because the base layer has no bias",
    ),
}


def is_known(what: str, error: CoraError) -> bool:
    return any(reason in str(error) for reason in REFUSED[what])


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=torch.arange(3, 12)[None]).logits


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The directory of a model of a family, its embedding and head tied or not, with biases and norms that are not those of the start."""
    root = tmp_path_factory.mktemp("bases")

    def of(family: str, tied: bool) -> Path:
        place = root / f"{family}-{tied}"
        if not place.exists():
            torch.manual_seed(0)
            config = build(family)
            config.tie_word_embeddings = tied
            model = AutoModelForCausalLM.from_config(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim == 1:
                        parameter.add_(0.1 * torch.randn_like(parameter))
            model.save_pretrained(place)
        return place

    return of


@st.composite
def loras(draw: Any, model: Any) -> dict[str, Any]:
    """Settings of a `LoraConfig` for `model`, by the names of its layers."""
    named = dict(model.named_modules())
    ends = {name.rpartition(".")[2]: name for name, module in named.items() if module is model.get_output_embeddings()}
    ends |= {name.rpartition(".")[2]: name for name, module in named.items() if module is model.get_input_embeddings()}
    linears = [
        name for name, module in named.items() if isinstance(module, torch.nn.Linear | Conv1D) and name not in ends.values()
    ]
    leaves = sorted({name.rpartition(".")[2] for name in linears})
    some = st.lists(st.sampled_from(leaves), min_size=1, max_size=3, unique=True)
    targets: Any = draw(
        st.one_of(
            some,
            st.lists(st.sampled_from(linears), min_size=1, max_size=3, unique=True),
            some.map("|".join),
            st.just("all-linear"),
        )
    )
    if isinstance(targets, str) and targets != "all-linear":
        targets = rf".*\.({targets})"
    made: dict[str, Any] = {
        "target_modules": targets,
        "r": draw(st.sampled_from([1, 2, 4])),
        "lora_alpha": draw(st.sampled_from([1, 7])),
    }
    place = st.sampled_from([leaves[0], leaves[-1], linears[-1], r".*\.1\..*"])
    others = {
        "use_rslora": st.just(True),
        "use_dora": st.just(True),
        "bias": st.sampled_from(["all", "lora_only"]),
        "rank_pattern": st.dictionaries(place, st.sampled_from([1, 3]), min_size=1, max_size=2),
        "alpha_pattern": st.dictionaries(place, st.sampled_from([2, 9]), min_size=1, max_size=2),
        "init_lora_weights": st.sampled_from(["gaussian", "pissa", "olora"]),
        "layer_replication": st.just([[0, 2], [1, 2]]),
        "exclude_modules": st.lists(st.sampled_from(leaves), min_size=1, max_size=1),
    }
    if isinstance(targets, list):
        others["layers_to_transform"] = st.sampled_from([[0], [1]])
    for name in draw(st.lists(st.sampled_from(sorted(others)), max_size=2, unique=True)):
        made[name] = draw(others[name])
    of_ends = draw(st.sampled_from(["left", "left", "saved", "tokens", "adapted", "adapted and tokens"]))
    if of_ends == "saved":
        made["modules_to_save"] = draw(st.lists(st.sampled_from(sorted(ends)), min_size=1, unique=True))
    if "tokens" in of_ends:
        made["trainable_token_indices"] = [3, 5]
    if "adapted" in of_ends and isinstance(targets, list):
        made["target_modules"] = [*targets, *draw(st.lists(st.sampled_from(sorted(ends)), min_size=1, unique=True))]
    return made


def trained(base: Path, chosen: dict[str, Any], target: Path) -> torch.Tensor | None:
    """Logits of PEFT's own model with such a LoRA, all of its numbers moved, after it was written to `target`; None where PEFT has no such thing."""
    model = AutoModelForCausalLM.from_pretrained(base)
    try:
        wrapped = get_peft_model(model, LoraConfig(**chosen))
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        expected = logits(wrapped)
        wrapped.save_pretrained(target)
        found = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), target))
    # All of these types are PEFT's own refusals or failures, before any code of the project runs.
    except (ValueError, RuntimeError, LookupError, TypeError, AttributeError, NotImplementedError, AssertionError):
        return None
    return found if torch.allclose(found, expected, atol=1e-3, rtol=1e-3) else None  # where PEFT does not load what it wrote


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data(), tied=st.booleans(), seed=st.integers(0, 99))
@settings(derandomize=True, deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
def test_every_lora_is_what_peft_computes_or_refused(family: str, data: Any, tied: bool, seed: int, stored: Any) -> None:
    base = stored(family, tied)
    chosen = data.draw(loras(AutoModelForCausalLM.from_pretrained(base)))
    torch.manual_seed(seed)
    with temporary_directory("any-lora") as place:
        expected = trained(base, chosen, place / "adapter")
        if expected is None or not expected.isfinite().all():
            return
        adapter = resolve_model(str(place / "adapter"))

        def agrees(what: str, compute: Any) -> None:
            try:
                found = compute()
            except CoraError as error:
                if not is_known(what, error):
                    raise
            else:
                assert (found - expected).abs().max() <= 1e-3 * expected.abs().max(), what

        def merged() -> torch.Tensor:
            merge_adapter(adapter, place / "merged")
            return logits(AutoModelForCausalLM.from_pretrained(place / "merged"))

        def exported() -> torch.Tensor:
            export_adapter(adapter, place / "exported")
            return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), place / "exported"))

        agrees("load", lambda: logits(load_adapter(AutoModelForCausalLM.from_pretrained(base), adapter)))
        agrees("merge", merged)
        agrees("export", exported)
        try:
            source = open_source(adapter)
        except CoraError as error:
            if not is_known("read", error):
                raise
            return
        if (place / "merged").exists():
            weights = dict(AutoModelForCausalLM.from_pretrained(place / "merged").named_modules())
            for name in source.shapes.keys() & weights.keys():
                weight = weights[name].weight.detach().double()
                weight = weight.T if isinstance(weights[name], Conv1D) else weight
                torch.testing.assert_close(source.read(name), weight, atol=1e-4, rtol=1e-3, msg=name)
