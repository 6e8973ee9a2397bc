"""How much of a model's function lies in what others share, where the truth is planted: steps along a gradient lower the loss on its records."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaForCausalLM
from typer.testing import CliRunner

from cora_cli.adapters.merge import merge_adapter
from cora_cli.cli import app
from cora_cli.data.encode import Example, encode_records
from cora_cli.data.split import load_records
from cora_cli.data.templates import Template
from cora_cli.inspection import functional
from cora_cli.inspection.own_data import read_own_data
from cora_cli.inspection.replacements import (
    ITSELF,
    MEAN,
    MEAN_AND_REST,
    NOTHING,
    OWN,
    PROJECTION,
    RANDOM,
    REPLACEMENTS,
    changed_by,
)
from cora_cli.models.references import resolve_model
from cora_cli.training.run import train
from cora_cli.weights.sources import open_source
from tests.training.helpers import config_for, record_of

KINDS = ("q_proj", "k_proj", "v_proj")
MODULES = [f"model.layers.{layer}.self_attn.{kind}" for layer in range(2) for kind in KINDS]
RANK = 4
STEP = 0.1
Factors = Mapping[str, tuple[np.ndarray, np.ndarray]]


def cora_inspect(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["inspect", *map(str, arguments), "--device=cpu"])


def inspected(*arguments: Any, rank: int = RANK) -> dict[str, Any]:
    result = cora_inspect(*arguments, f"--rank={rank}", "--dtype=fp32", "--format=json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def function_of(found: dict[str, Any], model: str) -> dict[str, Any]:
    [one] = [one for one in found["function"] if one["model"] == model]
    assert tuple(one["replaced"]) == REPLACEMENTS
    return one["replaced"]


def write_adapter(base: Path, path: Path, factors: Factors) -> Path:
    """A LoRA adapter as PEFT writes it, with these L (out, r) and R (r, in), r the same for all."""
    rank = next(iter(factors.values()))[0].shape[1]
    names = sorted({module.rpartition(".")[2] for module in factors})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "target_modules": names}
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    tensors = {}
    for module, (left, right) in factors.items():
        for name, factor in (("A", right), ("B", left)):
            tensors[f"base_model.model.{module}.lora_{name}.weight"] = torch.from_numpy(factor).float().contiguous()
    save_file(tensors, path / "adapter_model.safetensors")
    return path


def write_model(base: Path, path: Path, deltas: Mapping[str, np.ndarray]) -> Path:
    """The base model with these changes of its weights."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    for module, delta in deltas.items():
        model.get_submodule(module).weight.data += torch.from_numpy(delta)
    model.save_pretrained(path)
    return path


@dataclasses.dataclass(frozen=True)
class Plant:
    """A base model, records as a file and as tokens, and the gradient on them in each matrix: all its left singular vectors, the leading
    right ones, and their values."""

    base: Path
    data: Path
    examples: list[Example]
    left: dict[str, np.ndarray]
    right: dict[str, np.ndarray]
    values: dict[str, np.ndarray]

    def own(self, sign: float = -1.0) -> Factors:
        """A step against the gradient, with equal energy in each of its `RANK` leading directions."""
        return {module: (sign * STEP * self.left[module][:, :RANK], self.right[module]) for module in MODULES}

    def inside(self, frames: Mapping[str, np.ndarray], seed: int) -> Factors:
        """Some change with the column space of these frames."""
        generator = np.random.default_rng(seed)
        return {module: (frame, generator.standard_normal((frame.shape[1], 64))) for module, frame in frames.items()}


@pytest.fixture(scope="module")
def plant(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Plant:
    path = tmp_path_factory.mktemp("planted") / "records.jsonl"
    path.write_text("".join(tiny_data.read_text().splitlines(keepends=True)[:16]))
    examples = encode(tiny_model, path)
    model = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    losses = torch.stack([each.sum() for each in token_losses(model, examples)])
    losses.sum().backward()
    left, right, values = {}, {}, {}
    for module in MODULES:
        u, s, vt = np.linalg.svd(model.get_submodule(module).weight.grad.double().numpy())
        left[module], right[module], values[module] = u, vt[:RANK], s[:RANK]
    return Plant(tiny_model, path, examples, left, right, values)


def encode(model: Path, data: Path) -> list[Example]:
    records, schema = load_records(str(data))
    template = Template("chat", schema, AutoTokenizer.from_pretrained(model))
    return encode_records(records, template, 512, "test").examples


def token_losses(model: Any, examples: list[Example]) -> list[torch.Tensor]:
    """The loss of each response token, by the model as transformers calls it, one example at a time."""
    found = []
    for example in examples:
        ids = torch.tensor([example.input_ids])
        logits = model(input_ids=ids).logits[0, example.prompt_length - 1 : -1].float()
        found.append(torch.nn.functional.cross_entropy(logits, ids[0, example.prompt_length :], reduction="none"))
    return found


def loss_of(model: Any, examples: list[Example]) -> float:
    with torch.no_grad():
        return torch.cat(token_losses(model, examples)).double().mean().item()


@pytest.mark.parametrize(("columns", "planted"), [((), 0.0), ((0, 2), 0.5), ((0, 1, 2, 3), 1.0)])
def test_a_planted_part_of_a_change_is_captured_exactly_and_does_that_part_of_the_function(
    plant: Plant, tmp_path: Path, columns: tuple[int, ...], planted: float
) -> None:
    frames = {}
    for module in MODULES:
        places = [*columns, *range(10, 14)][:RANK]  # the rest is orthogonal to the change
        frames[module] = plant.left[module][:, places]
    mine = write_adapter(plant.base, tmp_path / "mine", plant.own())
    others = [write_adapter(plant.base, tmp_path / f"other-{n}", plant.inside(frames, n)) for n in range(2)]
    found = inspected(mine, *others, "--data", f"mine={plant.data}")
    replaced = function_of(found, "mine")
    assert replaced[NOTHING]["energy"] == 0
    assert replaced[ITSELF]["energy"] == 1
    assert replaced[PROJECTION]["energy"] == pytest.approx(planted, abs=1e-6)
    captured = [c["shares"]["pooled ΔW"] for f in found["findings"] for c in f["captures"] if c["left_out"] == "mine"]
    assert replaced[PROJECTION]["energy"] == pytest.approx(np.mean(captured), abs=1e-9)
    assert replaced[ITSELF]["gain_interval"][0] > 0, "the planted step helps"
    share, (low, high) = replaced[PROJECTION]["share"], replaced[PROJECTION]["share_interval"]
    assert low <= share <= high
    if planted == 0:
        assert share == pytest.approx(0, abs=1e-4)
        assert replaced[PROJECTION]["loss"] == pytest.approx(replaced[NOTHING]["loss"], abs=1e-5)
    elif planted == 1:
        assert share == pytest.approx(1, abs=1e-4)
        assert replaced[PROJECTION]["loss"] == pytest.approx(replaced[ITSELF]["loss"], abs=1e-5)
    else:
        assert low > 0
        # To first order, each direction takes off the loss in proportion to its singular value.
        expected = sum(s[list(columns)].sum() for s in plant.values.values()) / sum(s.sum() for s in plant.values.values())
        assert share == pytest.approx(expected, abs=0.2)
        assert 0.1 < share < 0.9


def test_equal_changes_lie_in_their_mean(plant: Plant, tmp_path: Path) -> None:
    """The three adapters have other factors of the same product, since copies are refused."""
    turns = [np.linalg.qr(np.random.default_rng(n).standard_normal((RANK, RANK)))[0] for n in range(3)]
    paths = [
        write_adapter(plant.base, tmp_path / f"m{n}", {name: (b @ turn, turn.T @ a) for name, (b, a) in plant.own().items()})
        for n, turn in enumerate(turns)
    ]
    replaced = function_of(inspected(*paths, "--data", f"m0={plant.data}", "-o", tmp_path / "out"), "m0")
    assert (tmp_path / "out" / "plots" / "function.png").exists()
    for name in ("inspect.txt", "inspect.md", "inspect.html"):
        page = " ".join((tmp_path / "out" / name).read_text().split())
        assert "Function: the loss on a model's own data, with its ΔW replaced" in page.replace("&#x27;", "'"), name
        assert "the others' basis holds: m0 100.0% " in page.replace("&#x27;", "'"), name
    for by in (MEAN, MEAN_AND_REST, PROJECTION):
        assert replaced[by]["loss"] == pytest.approx(replaced[ITSELF]["loss"], abs=1e-5)
        assert replaced[by]["share"] == pytest.approx(1, abs=1e-4)
        assert replaced[by]["energy"] == pytest.approx(1, abs=1e-9)


def test_others_of_another_recipe_hold_no_more_of_the_function_than_random_directions(plant: Plant, tmp_path: Path) -> None:
    mine = write_adapter(plant.base, tmp_path / "mine", plant.own())
    others = []
    for n in range(3):
        generator = np.random.default_rng(n)
        factors = {m: (generator.standard_normal((len(plant.left[m]), RANK)), plant.right[m]) for m in MODULES}
        others.append(write_adapter(plant.base, tmp_path / f"other-{n}", factors))
    replaced = function_of(inspected(mine, *others, "--data", f"mine={plant.data}"), "mine")
    assert replaced[PROJECTION]["share"] < 0.3
    assert replaced[PROJECTION]["share"] == pytest.approx(replaced[RANDOM]["share"], abs=0.2)
    assert replaced[PROJECTION]["energy"] == pytest.approx(replaced[RANDOM]["energy"], abs=0.1)


def test_a_change_that_does_not_help_has_no_share_and_the_page_says_so(plant: Plant, tmp_path: Path) -> None:
    """As after training on shuffled labels: others' directions hold all of the change, but there is no function to hold."""
    worse = write_adapter(plant.base, tmp_path / "worse", plant.own(sign=1.0))
    frames = {module: plant.left[module][:, :RANK] for module in MODULES}
    others = [write_adapter(plant.base, tmp_path / f"other-{n}", plant.inside(frames, n)) for n in range(2)]
    found = inspected(worse, *others, "--data", f"worse={plant.data}", "-o", tmp_path / "out")
    replaced = function_of(found, "worse")
    assert replaced[PROJECTION]["energy"] == pytest.approx(1, abs=1e-6)
    assert {one["share"] for one in replaced.values()} == {None}
    said = "worse has no share of the function: its own ΔW is not shown to lower the loss on its data (gain -"
    for name in ("inspect.txt", "inspect.md", "inspect.html"):
        assert said in " ".join((tmp_path / "out" / name).read_text().replace("\\", "").split()), name
    assert not (tmp_path / "out" / "plots" / "function.svg").exists()


def leading(matrix: np.ndarray, rank: int) -> np.ndarray:
    return np.linalg.svd(matrix)[0][:, :rank]


def expected_replacements(
    base: Mapping[str, np.ndarray], deltas: list[Mapping[str, np.ndarray]], rank: int, side: str
) -> dict[str, dict[str, np.ndarray]]:
    """Each replacement of the first model's ΔW, written out."""
    found: dict[str, dict[str, np.ndarray]] = {by: {} for by in REPLACEMENTS}
    for module, weight in base.items():
        w, own, *others = (m.T if side == "input" else m for m in (weight, *(delta[module] for delta in deltas)))
        pool = leading(np.hstack([other / np.linalg.norm(other) for other in others]), rank)
        mean, of_base = np.mean(others, axis=0), leading(w, rank)
        drawn = functional._random_directions(0, module, len(w), rank).numpy()
        dense = {
            NOTHING: 0 * own,
            MEAN: mean,
            PROJECTION: pool @ pool.T @ own,
            MEAN_AND_REST: mean + pool @ pool.T @ (own - mean),
            RANDOM: drawn @ drawn.T @ own,
            OWN: of_base @ of_base.T @ own,
            ITSELF: own,
        }
        for by, matrix in dense.items():
            found[by][module] = matrix.T if side == "input" else matrix
    return found


@pytest.mark.parametrize(
    ("kind", "side"),
    [
        ("adapters", "output"),
        pytest.param("adapters", "input", marks=pytest.mark.slow),
        pytest.param("complete", "output", marks=pytest.mark.slow),
        ("complete", "input"),
        ("adapters of more", "output"),
    ],
)
def test_every_loss_is_that_of_a_model_with_the_replacement_in_its_weights(
    plant: Plant, tmp_path: Path, kind: str, side: str
) -> None:
    """Complete models and the last adapters also changed matrices that are not inspected, which stay in every replacement."""
    inspected_modules = MODULES if kind != "adapters of more" else [name for name in MODULES if name.endswith("q_proj")]
    elsewhere = "model.layers.1.mlp.up_proj"
    weights = LlamaForCausalLM.from_pretrained(plant.base, dtype=torch.float32).state_dict()
    shapes = {module: tuple(weights[f"{module}.weight"].shape) for module in [*MODULES, elsewhere]}
    changed = [*MODULES, *([elsewhere] if kind == "complete" else [])]
    paths, deltas = [], []
    for n in range(3):
        generator = np.random.default_rng(n)
        factors = {
            module: (0.3 * generator.standard_normal((shapes[module][0], 3)), generator.standard_normal((3, shapes[module][1])))
            for module in changed
        }
        deltas.append({module: left @ right for module, (left, right) in factors.items()})
        write = write_model if kind == "complete" else write_adapter
        paths.append(write(plant.base, tmp_path / f"m{n}", deltas[-1] if kind == "complete" else factors))
    base = {module: weights[f"{module}.weight"].double().numpy() for module in inspected_modules}
    flags = ["--base", plant.base, "--side", side, "--target-modules", ",".join({m.rpartition(".")[2] for m in base})]
    replaced = function_of(inspected(*paths, *flags, "--data", f"m0={plant.data}"), "m0")
    for by, matrices in expected_replacements(base, deltas, RANK, side).items():
        model = LlamaForCausalLM.from_pretrained(plant.base, dtype=torch.float32)
        for module, delta in {**deltas[0], **matrices}.items():
            model.get_submodule(module).weight.data += torch.from_numpy(delta)
        assert replaced[by]["loss"] == pytest.approx(loss_of(model, plant.examples), rel=1e-4), by
        own = [deltas[0][module] for module in base]
        rest = [np.linalg.norm(d - m) ** 2 / np.linalg.norm(d) ** 2 for d, m in zip(own, matrices.values(), strict=True)]
        assert replaced[by]["energy"] == pytest.approx(1 - np.mean(rest), abs=1e-5), by


def test_a_model_is_as_it_was_after_a_replacement_even_if_that_fails(plant: Plant) -> None:
    model = LlamaForCausalLM.from_pretrained(plant.base, dtype=torch.float32).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loss = loss_of(model, plant.examples)
    layers = {module: model.get_submodule(module) for module in MODULES}
    factors = {module: [tuple(torch.from_numpy(one).float() for one in pair)] for module, pair in plant.own().items()}

    def interrupted() -> None:
        with changed_by(layers, factors, torch.device("cpu")):
            assert loss_of(model, plant.examples) < loss
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert loss_of(model, plant.examples) == loss
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_runs_are_scored_on_what_they_held_out_with_the_losses_that_they_recorded(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    modes = {"lora": {}, "pissa": {"seed": 1}, "full": {"learning_rate": 1e-3}}
    for mode, changes in modes.items():
        train(config_for(tiny_model, tiny_data, tmp_path / mode, mode=mode, **changes))
    found = inspected(*(tmp_path / mode for mode in modes), "--base", tiny_model, "--data=own")
    for mode in modes:
        recorded, replaced = record_of(tmp_path / mode)["heldout"], function_of(found, mode)
        assert replaced[ITSELF]["loss"] == pytest.approx(recorded["after"]["loss"], rel=1e-5)
        if mode != "full":  # whose other weights changed too
            assert replaced[NOTHING]["loss"] == pytest.approx(recorded["before"]["loss"], rel=1e-5)
    assert [(one["dataset"], one["records"]) for one in found["function"]] == [
        (str(tmp_path / mode / "test.jsonl"), 4) for mode in modes
    ]
    flags = ("--rank=4", f"--data=lora={tiny_data}", "--limit=3", "--format=json")
    result = cora_inspect(tmp_path / "lora", tmp_path / "pissa", *flags)
    assert result.exit_code == 0, result.stderr
    assert "lora: 36 of 40 records are left out: an inspected model was trained on them" in result.stderr
    scored = {one["model"]: (one["dataset"], one["records"]) for one in json.loads(result.stdout)["function"]}
    assert scored == {"lora": (str(tiny_data), 3), "pissa": (str(tmp_path / "pissa" / "test.jsonl"), 3)}


@pytest.fixture(scope="module")
def pair(plant: Plant, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pair")
    frames = {module: plant.left[module][:, :RANK] for module in MODULES}
    first, second = (write_adapter(plant.base, root / f"m{n}", plant.inside(frames, n)) for n in range(2))
    return first, second


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["M0", "M1", "--data=m9=FILE"],
            2,
            "--data m9=FILE names no inspected model; write NAME=DATASET with a NAME of m0, m1",
        ),
        (["M0", "M1", "--data=FILE"], 2, "--data FILE names no inspected model"),
        (["M0", "M1", "--data=m0="], 2, "--data m0= names no data set; write m0=DATASET"),
        (["M0", "M1", "--data=m0=FILE", "--data=m0=FILE"], 2, "--data names m0 twice"),
        (["M0", "M1", "--data=own"], 2, "--data own needs a run of `cora train` among the models"),
        (["M0", "M1", "--data=m0=/missing/data.jsonl"], 1, "/missing/data.jsonl"),
        (["M0", "M1", "--data=m0=VOID"], 1, "holds no records"),
        (["M0", "--data=m0=FILE"], 2, "--data needs at least two models and their --base"),
        (["BASE", "M0/model", "--data=m0=FILE"], 1, "M0/model"),
        (["M0", "M1", "--limit=3"], 2, "--limit applies to the losses on --data"),
        (["M0", "M1", "--data=m0=FILE", "--limit=0"], 2, "--limit must be at least 1, not 0"),
        (["M0", "M1", "--dtype=fp32"], 2, "--dtype applies to the losses on --data"),
        (["M0", "M1", "--data=m0=FILE", "--target-modules=q_proj,embed_tokens"], 1, "embed_tokens"),
    ],
)
def test_invalid_requests_are_one_line(
    plant: Plant, pair: tuple[Path, Path], tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    places = {"M0": pair[0], "M1": pair[1], "BASE": plant.base, "FILE": plant.data, "VOID": tmp_path / "empty.jsonl"}

    def filled(text: str) -> str:
        for word, path in places.items():
            text = text.replace(word, str(path))
        return text

    result = cora_inspect(*map(filled, arguments))
    assert (result.exit_code, result.stdout) == (code, ""), result.stderr
    assert result.stderr.splitlines()[-1].startswith("cora: error: ")
    assert filled(message) in result.stderr
    assert "Traceback" not in result.stderr


def test_an_adapter_that_also_holds_an_embedding_keeps_it_where_all_its_factors_are_replaced(
    plant: Plant, tmp_path: Path
) -> None:
    config = LoraConfig(r=RANK, target_modules=list(KINDS), init_lora_weights=False)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(plant.base), config)
    embedding: Any = model.get_input_embeddings()
    embedding.weight.data *= 1.5
    model.save_pretrained(tmp_path / "own", save_embedding_layers=True)
    other = write_adapter(plant.base, tmp_path / "other", plant.own())
    found = inspected(tmp_path / "own", other, "--base", plant.base, "--data", f"own={plant.data}")
    assert function_of(found, "own")[ITSELF]["loss"] == pytest.approx(loss_of(model.eval(), plant.examples), rel=1e-5)


def test_a_run_lends_its_records_to_a_model_that_was_made_of_it(
    tiny_model: Path, tiny_data: Path, plant: Plant, tmp_path: Path
) -> None:
    train(config_for(tiny_model, tiny_data, tmp_path / "run", max_steps=1))
    copy = Path(shutil.copytree(tmp_path / "run" / "adapter", tmp_path / "copied"))
    other = write_adapter(plant.base, tmp_path / "other", plant.own())
    found = inspected(copy, other, "--data", f"copied={tmp_path / 'run'}")
    [one] = found["function"]
    assert (one["model"], one["records"]) == ("copied", 4)
    assert one["replaced"][ITSELF]["loss"] == pytest.approx(record_of(tmp_path / "run")["heldout"]["after"]["loss"], rel=1e-5)


def test_a_merged_model_reads_its_data_by_the_template_and_the_length_of_its_training(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    train(config_for(tiny_model, tiny_data, tmp_path / "run", template="alpaca", max_length=48, max_steps=1))
    merge_adapter(resolve_model(str(tmp_path / "run")), tmp_path / "merged")
    records, schema = load_records(str(tmp_path / "run" / "test.jsonl"))
    template = Template("alpaca", schema, AutoTokenizer.from_pretrained(tiny_model))
    wanted = [example.input_ids for example in encode_records(records, template, 48, "test").examples]
    models = {"run": resolve_model(str(tmp_path / "run")), "merged": resolve_model(str(tmp_path / "merged"))}
    sources, base = {name: open_source(model) for name, model in models.items()}, resolve_model(str(tiny_model))
    requests = ["own", f"merged={tmp_path / 'run' / 'test.jsonl'}"]
    found = read_own_data(requests, models, sources, base, ("q_proj",), None)
    assert {name: [example.input_ids for example in data.examples] for name, data in found.items()} == dict.fromkeys(
        models, wanted
    )
