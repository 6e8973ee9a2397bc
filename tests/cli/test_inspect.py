"""`cora inspect` from its command line, on five tiny fine-tunes whose common subspace is planted, or not there."""

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from cora_cli import writing
from cora_cli.adapters.facts import AdapterFacts
from cora_cli.adapters.install import install_adapter
from cora_cli.adapters.storage import save_adapter
from cora_cli.basis.artifact import read_basis
from cora_cli.basis.choices import BasisChoices
from cora_cli.cli import app
from cora_cli.extraction.extract import extract_basis
from cora_cli.inspection.measure import CEILING, MEAN, PAPER, POOLED, START, UNSCALED_MEAN, UNSCALED_POOLED
from cora_cli.methods.parts.starts import start_a
from cora_cli.methods.registry import Mode
from cora_cli.models.references import resolve_model
from tests.evaluation.helpers import unsealed
from tests.methods.helpers import plan_of
from tests.reporting.helpers import Made, write_run
from tests.weights.helpers import make_adapter, make_llama

FORMATS = {"inspect.txt", "inspect.md", "inspect.json", "inspect.html"}


def cora_inspect(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["inspect", *map(str, arguments), "--device=cpu"])


def fine_tunes(root: Path, shared: bool) -> list[Path]:
    """A base and five models, whose changes lie in two directions of each matrix: in common, or each model's own."""
    model = make_llama(kv_heads=2)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    paths = [root / "base", *(root / f"model-{n}" for n in range(5))]
    model.save_pretrained(paths[0])
    for n, path in enumerate(paths[1:]):
        generator = np.random.default_rng(n)
        for place, (name, tensor) in enumerate(model.state_dict().items()):
            if tensor.dim() == 2:
                frames = np.random.default_rng(place) if shared else generator
                left = np.linalg.qr(frames.standard_normal((len(tensor), 2)))[0]
                change = left @ generator.standard_normal((2, tensor.shape[1])) * 0.05
                tensor.copy_(start[name] + torch.from_numpy(change))
        model.save_pretrained(path)
    return paths


@pytest.fixture(scope="module")
def related(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return fine_tunes(tmp_path_factory.mktemp("related"), shared=True)


@pytest.fixture(scope="module")
def unrelated(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return fine_tunes(tmp_path_factory.mktemp("unrelated"), shared=False)


def test_a_planted_subspace_is_found_and_every_format_is_written(related: list[Path], tmp_path: Path) -> None:
    base, *models = related
    result = cora_inspect(*models, "--base", base, "--rank=2", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    before, _, verdict = result.stdout.partition("\nVerdict\n-------\n")
    for table in (
        "Size of the change",
        "Overlap of the subspaces of the weights W",
        "Principal angles",
        "Leave-one-out capture",
    ):
        assert table in before
    assert verdict.lstrip().startswith("Shared: the other models recover ")
    assert "Rule: every ΔW is first divided by its Frobenius norm" in verdict
    assert {path.name for path in (tmp_path / "out").iterdir()} == FORMATS | {"plots"}
    assert {path.stem for path in (tmp_path / "out" / "plots").iterdir()} == {
        "overlap",
        "capture",
        "groups",
        "weights-variance",
    }
    found = json.loads((tmp_path / "out" / "inspect.json").read_text())
    assert list(found["models"]) == [f"model-{n}" for n in range(5)]
    assert len(found["findings"]) == 6
    for finding in found["findings"]:
        assert [capture["left_out"] for capture in finding["captures"]] == list(found["models"])
        for capture in finding["captures"]:
            assert capture["shares"][POOLED] == pytest.approx(capture["shares"][CEILING], abs=1e-5)
    page = (tmp_path / "out" / "inspect.html").read_text()
    assert page.count("<svg") == 4
    assert 0 < page.index("Shared: the other models recover ") < page.index("Size of the change")


def test_a_basis_of_another_architecture_is_refused_though_the_shapes_are_equal(related: list[Path], tmp_path: Path) -> None:
    basis = tmp_path / "basis.safetensors"
    extract_basis([resolve_model(str(path)) for path in related[1:3]], basis, BasisChoices(rank=2), None, torch.device("cpu"))
    others = [Path(shutil.copytree(path, tmp_path / path.name)) for path in related[:2]]
    for config in (path / "config.json" for path in others):
        changed = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
        config.write_text(json.dumps({**json.loads(config.read_text()), **changed}))
    for arguments in ((basis, others[1]), (basis, others[1], "--base", others[0])):
        result = cora_inspect(*arguments, "-o", tmp_path / "out")
        assert result.exit_code == 1, result.stderr
        last = result.stderr.splitlines()[-1]
        assert re.search("model_type is mistral in .*, but llama in basis.safetensors; only models of one architecture", last)
    assert not (tmp_path / "out").exists()


def test_a_basis_of_differences_from_another_base_is_said(related: list[Path], tmp_path: Path) -> None:
    base, *models = related
    basis = tmp_path / "basis.safetensors"
    choices = BasisChoices(rank=2, source="delta")
    sources = [resolve_model(str(path)) for path in models[:2]]
    extract_basis(sources, basis, choices, resolve_model(str(base)), torch.device("cpu"))
    for named, said in ((base, False), (models[4], True)):
        result = cora_inspect(basis, *models[:2], "--base", named)
        assert result.exit_code == 0, result.stderr
        assert (f"holds differences from base {base}" in result.stderr) is said


def test_files_of_others_are_not_replaced_by_an_inspection(related: list[Path], tmp_path: Path) -> None:
    (tmp_path / "inspect.json").write_text("[]")
    refused = CliRunner().invoke(app, ["inspect", *map(str, related), "-o", str(tmp_path)])
    assert refused.exit_code == 1
    assert f"{tmp_path} holds inspect.json, which is not of an earlier report" in refused.stderr
    assert (tmp_path / "inspect.json").read_text() == "[]"


def test_a_dry_run_prints_the_plan_and_writes_nothing(related: list[Path], tmp_path: Path) -> None:
    base, *others = related
    result = cora_inspect(*others, "--base", base, "--rank", 4, "-o", tmp_path / "out", "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert f"weight matrices of {len(others)} models, 4 directions of the output side\n" in result.stdout
    assert "  changes " in result.stdout
    assert not (tmp_path / "out").exists()


def test_changes_of_low_rank_and_the_base_are_each_read_against_their_own_chance(related: list[Path], tmp_path: Path) -> None:
    adapters = [make_adapter(related[0], tmp_path / f"a{n}", seed=n, r=2) for n in range(2)]
    result = cora_inspect(*adapters, "--rank=4", "--target-modules=q_proj")
    assert result.exit_code == 0, result.stderr
    table = result.stdout.partition("Overlap of the subspaces of the changes")[2].partition("Principal angles")[0]
    chances = {line.split("|")[1].strip(): float(line.split("|")[2]) for line in table.splitlines() if "chance, " in line}
    rows = json.loads((related[0] / "config.json").read_text())["hidden_size"]
    assert chances == {"chance, pairs": round(2 / rows, 3), "chance, with the base model": round(4 / rows, 3)}


def test_changes_without_a_common_subspace_are_reported_as_such(unrelated: list[Path]) -> None:
    base, *models = unrelated
    result = cora_inspect(*models, "--base", base, "--rank=2")
    assert result.exit_code == 0, result.stderr
    assert "\nNo shared subspace found: " in result.stdout


def test_one_unrelated_model_is_outside_of_the_group_in_every_format(
    related: list[Path], unrelated: list[Path], tmp_path: Path
) -> None:
    base, *models = related
    odd = Path(shutil.copytree(unrelated[1], tmp_path / "odd"))
    result = cora_inspect(odd, *models[:3], "--base", base, "--rank=2", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    said = "Common to three of four models (model-0, model-1 and model-2): the others of them recover "
    for name in FORMATS - {"inspect.txt"}:
        assert said in (tmp_path / "out" / name).read_text().replace("\\", ""), name
    verdict = json.loads((tmp_path / "out" / "inspect.json").read_text())["verdict"]
    assert [group["models"] for group in verdict["groups"]] == [["model-0", "model-1", "model-2"]]
    assert verdict["outside"] == ["odd"]
    assert verdict["order"] == ["model-0", "model-1", "model-2", "odd"]
    assert verdict["ways"].keys() == verdict["intervals"].keys() == set(verdict["order"])
    for name, interval in verdict["intervals"].items():  # none where all matrices agree
        assert interval is None or interval[0] <= verdict["ways"][name] <= interval[1]
    assert {(pair["model"], pair["by"]) for pair in verdict["pairs"]} == set(itertools.permutations(verdict["order"], 2))
    for table in ("Groups", "What the models of a pair recover of each other"):
        assert f"### {table}\n" in (tmp_path / "out" / "inspect.md").read_text()


def test_a_basis_file_is_described_alone_and_compared_with_models(related: list[Path], tmp_path: Path) -> None:
    base, *models = related
    path = tmp_path / "basis.safetensors"
    extract_basis([resolve_model(str(model)) for model in models[:3]], path, BasisChoices(rank=3), None, torch.device("cpu"))
    alone = cora_inspect(path)
    assert alone.exit_code == 0, alone.stderr
    assert "module, mean, weights, output, svd, top" in alone.stdout
    assert "No conclusion about a shared subspace: no models were given" in alone.stdout
    result = cora_inspect(path, models[4], "--base", base, "--format=json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["rank"] == 3
    assert all(0 < c["shares"]["basis.safetensors"] <= c["shares"][CEILING] for f in found["findings"] for c in f["captures"])
    assert "basis.safetensors spans the base model's own subspace" in " ".join(found["verdict"]["sentences"])
    rows = {f["module"]: f["shape"][0] for f in found["findings"]}
    chances = [(f["module"], c["shares"]["chance, basis.safetensors"]) for f in found["findings"] for c in f["captures"]]
    assert all(chance == pytest.approx(3 / rows[module]) for module, chance in chances)


def test_a_basis_of_the_input_side_is_compared_with_inputs(related: list[Path], tmp_path: Path) -> None:
    base, *models = related
    path = tmp_path / "inputs.safetensors"
    extract_basis([resolve_model(str(base))], path, BasisChoices(rank=3, side="input"), None, torch.device("cpu"))
    result = cora_inspect(path, *models, "--base", base, "--format=json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["side"], found["rank"]) == ("input", 3)
    overlaps = [
        o["value"] for f in found["findings"] for o in f["overlaps"] if (o["kind"], o["other"]) == ("basis", "base model")
    ]
    assert overlaps == pytest.approx([1] * 6), "it is the base's own, of the same side"
    columns = {f["module"]: f["shape"][1] for f in found["findings"]}
    chances = [(f["module"], c["shares"]["chance, inputs.safetensors"]) for f in found["findings"] for c in f["captures"]]
    assert all(chance == pytest.approx(3 / columns[module]) for module, chance in chances)
    assert not found["verdict"]["headline"].startswith("Shared"), "the planted one is of the outputs"


def test_sides_are_not_mixed(related: list[Path], tmp_path: Path) -> None:
    base, model = related[:2]
    for side, other in (("input", "output"), ("output", "input")):
        path = tmp_path / f"of-{side}.safetensors"
        extract_basis([resolve_model(str(base))], path, BasisChoices(rank=3, side=side), None, torch.device("cpu"))
        result = cora_inspect(path, model, "--base", base, "--side", other)
        assert result.exit_code == 1
        assert (
            f"is a basis of the {side} side, but this inspection compares the {other} side; inspect it separately with --side {side}"
            in result.stderr
        )
    result = cora_inspect(model, "--base", base, "--side=input", "--runs", tmp_path)
    assert result.exit_code == 2
    assert "--runs cannot be used with --side input" in result.stderr


def test_copies_of_one_model_are_refused_by_name(related: list[Path], tmp_path: Path) -> None:
    base, *models = related
    shutil.copytree(models[0], tmp_path / "copy")
    result = cora_inspect(*models, tmp_path / "copy", "--base", base, "--rank=2")
    assert result.exit_code == 1
    assert "model-0 and copy hold the same weights" in result.stderr


def test_names_are_drawn_whatever_the_encoding_of_the_locale(related: list[Path], tmp_path: Path) -> None:
    base, *models = related
    shutil.copytree(models[0], tmp_path / "café")
    # Where the locale is not UTF-8, the bytes of a character come as surrogates.
    named = str(tmp_path / "caf\udcc3\udca9")
    result = cora_inspect(named, *models[1:], "--base", base, "--rank=2", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "café" in (tmp_path / "out" / "inspect.md").read_text()


def test_adapters_of_one_base_need_no_base_flag(related: list[Path], tmp_path: Path) -> None:
    adapters = [make_adapter(related[0], tmp_path / f"a{n}", seed=n) for n in range(3)]
    result = cora_inspect(*adapters, "--rank=3", "--target-modules=q_proj", "--format=json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["base"] == str(related[0])
    assert set(found["verdict"]["ways"]) == {"a0", "a1", "a2"}


@pytest.mark.parametrize("recorded", [True, False])
def test_a_start_that_adapters_share_is_no_common_subspace_where_they_record_it(
    related: list[Path], tmp_path: Path, recorded: bool
) -> None:
    """Five adapters whose A is still the one that seed 0 drew: on the input side they share all, and have learnt none of it."""
    plan = plan_of("lora", rank=4, alpha=6.0, rslora=False, dropout=0.0, seed=0, target_modules=("q_proj", "v_proj"))
    base_hash = resolve_model(str(related[0])).content_hash()
    for n in range(5):
        adapter = make_adapter(related[0], tmp_path / f"a{n}", seed=n)
        weights = load_file(adapter / "adapter_model.safetensors")
        for key, tensor in weights.items():
            if "lora_A" in key:
                module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                weights[key] = start_a(plan, module, tensor.shape[1])
        save_file(weights, adapter / "adapter_model.safetensors")
        if recorded:
            facts = AdapterFacts(plan, str(related[0]), None, base_hash, None, None, compact=False)
            writing.write_json(adapter / "cora.json", facts.as_dict())
    flags = ("--rank=4", "--target-modules=q_proj,v_proj", "--format=json")
    adapters = [tmp_path / f"a{n}" for n in range(5)]
    found = {side: json.loads(cora_inspect(*adapters, *flags, "--side", side).stdout) for side in ("input", "output")}
    captures = {side: [c["shares"] for f in of["findings"] for c in f["captures"]] for side, of in found.items()}
    assert all(shares[POOLED] == pytest.approx(1) for shares in captures["input"])
    assert all((START in shares) == recorded for shares in captures["input"])
    assert not any(START in shares for shares in captures["output"]), "B began at zero"
    expected = "No conclusion about a shared subspace: " if recorded else "Shared: "
    assert found["input"]["verdict"]["headline"].startswith(expected)
    assert ("Nothing records where the A of a0, a1, a2, a3, a4 started" in str(found["input"]["verdict"])) != recorded
    assert "Nothing records" not in str(found["output"]["verdict"])


def trained_adapters(
    base: Path, root: Path, mode: Mode, seeds: list[int], basis: Path | None = None, **changes: Any
) -> list[Path]:
    """Adapters of a mode as a run leaves them, whose trained tensors took one random step each."""
    paths = []
    for number, seed in enumerate(seeds):
        settings = {"rank": 3, "alpha": 6.0, "rslora": False, "dropout": 0.0, "target_modules": ("q_proj",), **changes}
        plan = plan_of(mode, seed=seed, has_basis=basis is not None, **settings)
        made = read_basis(basis) if basis else None
        wrapped = install_adapter(LlamaForCausalLM.from_pretrained(base, dtype=torch.float32), plan, made)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.03)
        base_hash = resolve_model(str(base)).content_hash()
        of_basis = (str(basis), made.sha256) if made else (None, None)
        paths.append(root / f"{mode}-{number}")
        save_adapter(wrapped, paths[-1], AdapterFacts(plan, str(base), None, base_hash, *of_basis, compact=False))
    return paths


@pytest.mark.parametrize(
    ("mode", "side", "changes"),
    [
        ("mica", "output", {}),
        ("pissa", "output", {}),
        ("pissa", "input", {}),
        ("milora", "output", {}),
        ("olora", "input", {}),
        ("lora-xs", "output", {}),
        ("lora-xs", "input", {}),
        ("fb", "output", {"b_init": "ones"}),
    ],
)
def test_a_start_that_the_mode_itself_gives_to_all_is_no_common_subspace(
    related: list[Path], tmp_path: Path, mode: Mode, side: str, changes: dict[str, Any]
) -> None:
    adapters = trained_adapters(related[0], tmp_path, mode, [0, 1, 2], **changes)
    flags = ("--rank=3", "--target-modules=q_proj", "--format=json", "--side", side)
    verdict = json.loads(cora_inspect(*adapters, *flags).stdout)["verdict"]
    assert verdict["headline"].startswith("No conclusion about a shared subspace: ")
    assert all(
        "started from the same directions" in why or "the gap is too small" in why for why in verdict["unjudged"].values()
    )
    assert len(verdict["unjudged"]) == 3


def test_random_starts_are_common_to_one_seed_alone(related: list[Path], tmp_path: Path) -> None:
    for mode, side in (("fb", "output"), ("lora-mini", "output"), ("lora-fa", "input"), ("lora-mini", "input")):
        changes = {"b_init": "orthonormal"} if mode == "fb" else {"outer_rank": 3} if mode == "lora-mini" else {}
        flags = ("--rank=2", "--target-modules=q_proj", "--format=json", "--side", side)
        for seeds, unjudged in (([5, 5, 5], 3), ([5, 6, 7], 0)):
            adapters = trained_adapters(related[0], tmp_path / f"{mode}-{side}-{seeds}", mode, seeds, rank=2, **changes)
            verdict = json.loads(cora_inspect(*adapters, *flags).stdout)["verdict"]
            assert len(verdict["unjudged"]) == unjudged, (mode, side, seeds, verdict)


def test_a_frozen_basis_is_known_where_its_file_is_gone_and_a_trained_one_is_missed(
    related: list[Path], tmp_path: Path
) -> None:
    base, *models = related
    basis = basis_of(models[:3], tmp_path / "basis.safetensors", source="delta", base=base)
    modes: tuple[Mode, ...] = ("fb", "tb")
    adapters = {mode: trained_adapters(base, tmp_path, mode, [0, 1, 2], basis, rank=2) for mode in modes}
    basis.rename(tmp_path / "moved.safetensors")
    flags = ("--rank=2", "--target-modules=q_proj", "--format=json")
    said = {mode: json.loads(cora_inspect(*paths, *flags).stdout)["verdict"] for mode, paths in adapters.items()}
    assert all("started from the same directions as another" in why for why in said["fb"]["unjudged"].values())
    assert set(said["tb"]["unjudged"].values()) == {
        "it started from a basis file that is neither at its recorded path nor named here"
    }
    assert said["fb"]["ways"] == said["tb"]["ways"] == {}
    found = json.loads(cora_inspect(*adapters["tb"], tmp_path / "moved.safetensors", *flags).stdout)["verdict"]
    assert all("started from the same directions as another" in why for why in found["unjudged"].values())


def finished_run(path: Path, loss: float, basis: Path | None, seed: int = 0, outer_rank: int | None = None) -> list[str]:
    """A run that started from `basis`, or from a random orthonormal B, as the flags that name it; of lora-mini with an outer rank."""
    mode: Mode = "lora-mini" if outer_rank else "fb"
    write_run(
        path, Made(mode, mode, seed, loss=loss, rank=2, b_init="basis" if basis else "orthonormal"), np.random.default_rng(0)
    )
    record = unsealed(path / "run.json")
    settings = {"rank": 2, "alpha": 2.0, "rslora": False, "dropout": 0.0, "seed": seed}
    settings |= {"outer_rank": outer_rank, "has_basis": True} if outer_rank else {}
    b_init = None if basis else "orthonormal"
    plan = plan_of(mode, b_init=b_init, target_modules=("q_proj", "k_proj", "v_proj"), **settings)
    record["plan"] = plan.as_dict()
    if basis:
        made = read_basis(basis)
        sources = [{"reference": s.reference, "revision": s.revision, "hash": s.hash} for s in made.sources]
        record["basis"] = {"path": str(basis), "sha256": made.sha256, "choices": made.choices.to_json(), "sources": sources}
    writing.write_json(path / "run.json", record)
    return ["--runs", str(path)]


def basis_of(models: list[Path], path: Path, **choices: Any) -> Path:
    base = choices.pop("base", None)
    paths = [resolve_model(str(model)) for model in models]
    extract_basis(paths, path, BasisChoices(rank=2, **choices), base and resolve_model(str(base)), torch.device("cpu"))
    return path


@pytest.mark.parametrize("bases", [3, 5])
def test_runs_show_whether_capture_predicts_their_loss(related: list[Path], tmp_path: Path, bases: int) -> None:
    base, *models = related
    flags = []
    for n in range(bases):
        path = basis_of([models[n]], tmp_path / f"b{n}.safetensors")
        flags += finished_run(tmp_path / f"run{n}", 1 + 0.1 * n, path)
    result = cora_inspect(*models, "--base", base, "--rank=2", *flags, "--format=json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    [foresight] = found["foresight"]
    assert [point["basis"].split()[0] for point in foresight["points"]] == [f"b{n}" for n in range(bases)]
    for n, point in enumerate(foresight["points"]):
        unseen = [
            capture["shares"][point["basis"]]
            for finding in found["findings"]
            for capture in finding["captures"]
            if capture["left_out"] != f"model-{n}"
        ]
        assert point["capture"] == pytest.approx(np.mean(unseen)), "the model that a basis was created from does not count"
    assert (foresight["rho"] is None) == (bases < 4)
    assert ("No conclusion" in found["verdict"]["sentences"][-1]) == (bases < 4)


@pytest.mark.parametrize(
    ("choices", "same_kind"),
    [
        ({}, PAPER),
        ({"source": "delta"}, UNSCALED_MEAN),
        ({"source": "delta", "merge": "gram"}, UNSCALED_POOLED),
        ({"source": "delta", "normalize": True}, MEAN),
        ({"source": "delta", "merge": "gram", "normalize": True}, POOLED),
        ({"method": "pca"}, None),
    ],
)
def test_a_basis_of_all_models_gets_the_capture_of_the_leave_one_out_bases_of_its_kind(
    related: list[Path], tmp_path: Path, choices: dict[str, Any], same_kind: str | None
) -> None:
    base, *models = related
    path = basis_of(models, tmp_path / "all.safetensors", base=base if "source" in choices else None, **choices)
    flags = finished_run(tmp_path / "run", 1.0, path)
    result = cora_inspect(*models, "--base", base, "--rank=2", *flags, "--format=json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    points = found["foresight"][0]["points"]
    if same_kind is None:
        assert points == []
        sentence = found["verdict"]["sentences"][-1]
        assert "0 bases, without 1 that was created from all the inspected models" in sentence
    else:
        shares = [capture["shares"][same_kind] for finding in found["findings"] for capture in finding["captures"]]
        assert [point["capture"] for point in points] == [pytest.approx(np.mean(shares))]


def test_the_basis_of_outer_factors_is_compared_and_labelled_with_the_outer_rank(related: list[Path], tmp_path: Path) -> None:
    base, *models = related
    path = tmp_path / "b.safetensors"
    extract_basis([resolve_model(str(base))], path, BasisChoices(rank=5), None, torch.device("cpu"))
    flags = [flag for k in (3, 5) for flag in finished_run(tmp_path / f"run{k}", 1.0, path, outer_rank=k)]
    result = cora_inspect(*models, path, "--base", base, "--rank=5", *flags, "--format=json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert [one["stratum"].partition(", ")[2] for one in found["foresight"]] == [
        f"lora-mini r=2, outer rank {k}" for k in (3, 5)
    ]
    narrow, wide = (one["points"][0] for one in found["foresight"])
    for k, point in ((3, narrow), (5, wide)):
        assert point["basis"].endswith(f"(of {base}), outer rank {k}")
    shares = [capture["shares"] for finding in found["findings"] for capture in finding["captures"]]
    assert [one[wide["basis"]] for one in shares] == [pytest.approx(one["b.safetensors"]) for one in shares]
    assert narrow["capture"] < wide["capture"]


def test_draws_of_a_random_b_are_one_basis_and_losses_are_compared_over_the_seeds_that_all_have(
    related: list[Path], tmp_path: Path
) -> None:
    base, *models = related
    path = basis_of([base], tmp_path / "b.safetensors")
    flags = []
    for seed in (0, 1, 2):
        flags += finished_run(tmp_path / f"random{seed}", 1.0 + seed, None, seed)
        if seed < 2:
            flags += finished_run(tmp_path / f"own{seed}", 1.5 + seed, path, seed)
    result = cora_inspect(*models, "--base", base, "--rank=2", *flags, "--format=json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    points = found["foresight"][0]["points"]
    assert [(point["basis"].split()[0], point["runs"]) for point in points] == [("orthonormal", 2), ("b", 2)]
    assert [point["loss"] for point in points] == [pytest.approx(loss, abs=0.1) for loss in (1.5, 2.0)]
    shares = [capture["shares"] for finding in found["findings"] for capture in finding["captures"]]
    drawn = [one[f"{points[0]['basis']}, seed {seed}"] for one in shares for seed in (0, 1)]
    assert points[0]["capture"] == pytest.approx(np.mean(drawn)), "of the draws whose losses count"


def test_runs_of_another_model_than_the_inspected_ones_are_said_to_be(related: list[Path], tmp_path: Path) -> None:
    base, *models = related
    path = basis_of([models[0]], tmp_path / "b.safetensors")
    flags = finished_run(tmp_path / "run", 1.0, path)
    said = "runs trained tiny-model, which has other weights than"
    assert said in cora_inspect(*models, "--base", base, "--rank=2", *flags).stderr
    (copy := Path(shutil.copytree(base, tmp_path / "base")) / "consolidated.safetensors").write_bytes(b"never read")
    known = resolve_model(str(copy.parent)).content_hashes()
    assert len(known) == 2, "that of earlier versions, which covered such a file, as well"
    for sha256 in known:
        record = json.loads((tmp_path / "run" / "run.json").read_text())
        record["fingerprint"]["model_sha256"] = sha256
        writing.write_json(tmp_path / "run" / "run.json", record)
        assert said not in cora_inspect(*models, "--base", copy.parent, "--rank=2", *flags).stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["MODEL", "--rank=0"], 2, "--rank must be at least 1, not 0"),
        (["MODEL"], 2, "one model alone cannot be compared"),
        (["MODEL", "MODEL"], 2, "is named twice"),
        (["MODEL", "BASE", "--runs=RUN"], 2, "--runs needs models and their --base"),
        (["MODEL", "--base=BASE", "--runs=BASE"], 1, "holds no plan.json, run.json, metrics.json or judge.json"),
        (["MODEL", "--base=BASE", "--rank=9"], 1, "--rank 9 is more than the 8 directions"),
        (["MODEL", "--base=BASE", "-o", "BASE/config.json"], 1, "config.json is a file; choose a new or empty directory"),
        (["MODEL", "BASE/config.json"], 1, "config.json is not a complete safetensors file"),
        (["MODEL", "/missing/model"], 1, "model '/missing/model' is neither a directory on this disk nor a hub id"),
    ],
)
def test_invalid_requests_are_one_line(arguments: list[str], code: int, message: str, related: list[Path]) -> None:
    base, model = map(str, related[:2])
    result = cora_inspect(*(argument.replace("MODEL", model).replace("BASE", base) for argument in arguments))
    assert (result.exit_code, result.stdout) == (code, ""), result.stderr
    assert result.stderr.splitlines()[-1].startswith("cora: error: ")
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_models_of_one_name_are_distinguished_by_their_paths(related: list[Path], tmp_path: Path) -> None:
    one, other = (
        Path(shutil.copytree(model, tmp_path / name / "model")) for model, name in zip(related[1:3], "xy", strict=True)
    )
    result = cora_inspect(one, other, "--rank=2", "--format=json")
    assert result.exit_code == 0, result.stderr
    assert list(json.loads(result.stdout)["models"]) == ["x/model", "y/model"]
