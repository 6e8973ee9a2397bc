"""Extraction speed and memory compared with the full SVD that people use today, with 1, 3 and 5 models, in turn on one machine.

The peer works like `mergekit-extract-lora`: it loads each matrix from every model, averages them and calls
`torch.linalg.svd(full_matrices=False)`. The models are synthetic checkpoints of hidden size 4096 in bf16 shards. The benchmark does not
measure how good a basis is.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import Agreement, Stage, peak_bytes, run

HIDDEN, LAYERS, RANK = 4096, 4, 48
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
MATRICES = LAYERS * len(PROJECTIONS)
COUNTS = (1, 3, 5)
OURS = ("ours_1", "ours_3", "ours")
# Singular values fall as k^-1/2 over this many directions, above a noise floor.
SPECTRUM, NOISE, DELTA_RANK, DELTA = 256, 0.02, 16, 0.1
# All twelve matrices have the same size. The peer takes many seconds for each, so it decomposes only this one.
PEER_MATRIX = "model.layers.0.self_attn.q_proj"
_LAST_FILE = f"{max(COUNTS) - 1}/model.safetensors.index.json"
LLAMA_13B = {"matrices": 120, "hidden": 5120, "models": 5}

STAGE = Stage(
    name="extraction",
    script=__file__,
    sides={
        "ours": "cora extract-basis, 5 models",
        "ours_3": "cora extract-basis, 3 models",
        "ours_1": "cora extract-basis, 1 model",
        "peer": "full SVD, 5 models",
        "peer_3": "full SVD, 3 models",
        "peer_1": "full SVD, 1 model",
    },
    unit="merged matrices/s",
    targets={"peer": 4.0, "peer_3": 4.0, "peer_1": 4.0},
    against={"peer_3": "ours_3", "peer_1": "ours_1"},
)


def make_checkpoints(scratch: Path) -> None:
    """Write the synthetic models, `scratch`/0 to 4: one shard per layer, with further tensors that extraction should not read."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=HIDDEN, num_hidden_layers=LAYERS, intermediate_size=512, vocab_size=2048)
    directories = [scratch / str(model) for model in range(max(COUNTS))]
    for directory in directories:
        config.save_pretrained(directory)
    random = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    for layer in range(LAYERS):
        shard, prefix = f"model-{layer + 1:05}-of-{LAYERS:05}.safetensors", f"model.layers.{layer}."
        others = {f"{prefix}self_attn.o_proj.weight": (HIDDEN, HIDDEN), f"{prefix}input_layernorm.weight": (HIDDEN,)}
        others |= {f"{prefix}mlp.{name}_proj.weight": (512, HIDDEN) for name in ("gate", "up")}
        others |= {f"{prefix}mlp.down_proj.weight": (HIDDEN, 512)}
        if layer == 0:
            others |= {"model.embed_tokens.weight": (2048, HIDDEN), "lm_head.weight": (2048, HIDDEN)}
            others |= {"model.norm.weight": (HIDDEN,)}
        shared = {name: (0.02 * torch.randn(shape, generator=random)).bfloat16() for name, shape in others.items()}
        bases = {f"{prefix}self_attn.{name}.weight": _decaying(random) for name in PROJECTIONS}
        for directory in directories:
            targets = {name: (base + _low_rank(DELTA_RANK, random) * DELTA).bfloat16() for name, base in bases.items()}
            save_file({**shared, **targets}, directory / shard)
        weight_map |= dict.fromkeys([*shared, *bases], shard)
    for directory in directories:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _decaying(random: Any) -> Any:
    """A weight (HIDDEN, HIDDEN) whose singular values fall as a power over `SPECTRUM` directions above noise."""
    import torch

    return _low_rank(SPECTRUM, random) + NOISE * torch.randn(HIDDEN, HIDDEN, generator=random) / HIDDEN**0.5


def _low_rank(rank: int, random: Any) -> Any:
    """A product (HIDDEN, HIDDEN) whose singular values fall about as k^-1/2 from 1."""
    import torch

    left = torch.randn(HIDDEN, rank, generator=random) * torch.arange(1, rank + 1) ** -0.5
    return left @ torch.randn(rank, HIDDEN, generator=random) / HIDDEN


def measure(side: str, options: argparse.Namespace) -> dict[str, Any]:
    """Merged matrices per second and peak memory of one side; for ours also where the time went."""
    count = int(side.partition("_")[2] or max(COUNTS))
    directories = [Path(options.scratch) / str(model) for model in range(count)]
    _into_page_cache(directories)
    return _measure_ours(directories) if side.startswith("ours") else _measure_peer(directories)


def _into_page_cache(directories: Sequence[Path]) -> None:
    """Read all files once, so that no side waits longer for the disk than another."""
    for directory in directories:
        for path in directory.glob("*.safetensors"):
            with path.open("rb") as file:
                while file.read(2**20):
                    pass


def _measure_ours(directories: Sequence[Path]) -> dict[str, Any]:
    import torch

    from cora_cli.basis.choices import BasisChoices
    from cora_cli.extraction.extract import extract_basis
    from cora_cli.models.references import resolve_model

    models = [resolve_model(str(directory)) for directory in directories]
    choices = BasisChoices(rank=RANK, target_modules=PROJECTIONS)
    output = _basis_path(directories[0].parent, len(models))
    summary = extract_basis(models, output, choices, None, torch.device("cpu"), overwrite=True)
    return {
        "rate": MATRICES / summary.seconds,
        "peak_bytes": peak_bytes(),
        "bytes_read": summary.bytes_read,
        "seconds": summary.seconds,
        "seconds_reading": summary.seconds_reading,
        "seconds_decomposing": summary.seconds_decomposing,
    }


def _measure_peer(directories: Sequence[Path]) -> dict[str, Any]:
    import torch

    began = time.perf_counter()
    vectors, _, _ = torch.linalg.svd(_mean(directories, PEER_MATRIX, torch.float32), full_matrices=False)
    vectors[:, :RANK].clone()
    return {"rate": 1 / (time.perf_counter() - began), "peak_bytes": peak_bytes()}


def _mean(directories: Sequence[Path], module: str, dtype: Any) -> Any:
    """The average of one weight over the models, (HIDDEN, HIDDEN), loaded one after the other."""
    from safetensors import safe_open

    name = f"{module}.weight"
    total: Any = None
    for directory in directories:
        shard = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"][name]
        with safe_open(directory / shard, framework="pt") as file:
            weight = file.get_tensor(name).to(dtype)
        total = weight if total is None else total.add_(weight)
    return total.div_(len(directories))


def _basis_path(scratch: Path, models: int) -> Path:
    return scratch / f"basis-{models}.safetensors"


def agreement(options: argparse.Namespace) -> list[Agreement]:
    """Our basis of 5 models against the leading left singular vectors of the float64 average, from a full SVD in float64."""
    import torch

    from cora_cli.basis.artifact import read_basis

    scratch = Path(options.scratch)
    directories = [scratch / str(model) for model in range(max(COUNTS))]
    vectors, values, _ = torch.linalg.svd(_mean(directories, PEER_MATRIX, torch.float64), full_matrices=False)
    leading = vectors[:, :RANK]
    found = read_basis(_basis_path(scratch, len(directories))).directions[PEER_MATRIX].double()
    error = torch.linalg.matrix_norm(found - leading @ (leading.T @ found), 2).item()
    gap = 1 - (values[RANK] / values[RANK - 1]).item()
    what = f"||(I - UU^T)B||_2 of {PEER_MATRIX}, U from a full SVD in float64; σ_{RANK + 1} is {gap:.2%} below σ_{RANK}"
    return [Agreement(what, error, 1e-6)]


def notes(rounds: Mapping[str, list[dict[str, Any]]], options: argparse.Namespace) -> list[str]:
    """Memory, where the time goes, and what Llama-2-13B would cost."""
    del options
    lines = [
        f"Ours decomposes all {MATRICES} matrices of {HIDDEN} x {HIDDEN} and writes the file; the peer decomposes one of them in float32. Singular values "
        f"fall as k^-1/2 over {SPECTRUM} directions above noise. All files are in the page cache for both sides."
    ]
    for count, ours in zip(COUNTS, OURS, strict=True):
        middle = {key: statistics.median(result[key] for result in rounds[ours]) for key in rounds[ours][0]}
        lines.append(
            f"{count} model{'s' if count > 1 else ''}: peak {middle['peak_bytes'] / 2**20:.0f} MiB; of {middle['seconds']:.1f} s, "
            f"{middle['seconds_reading']:.2f} s ({middle['seconds_reading'] / middle['seconds']:.0%}) went into reading "
            f"{middle['bytes_read'] / 1e9:.2f} GB, {middle['seconds_decomposing']:.1f} s into decomposing, the rest into checking, hashing and merging."
        )
    points = [(run["bytes_read"], run["seconds"] - run["seconds_decomposing"]) for side in OURS for run in rounds[side]]
    slope, fixed = statistics.linear_regression([x for x, _ in points], [y for _, y in points])
    distance = max(abs(fixed + slope * x - y) / y for x, y in points)
    lines.append(
        f"Time without the decomposition, which does not depend on the number of models: {fixed:.1f} s + {slope * 1e9:.2f} s per GB; no run is "
        f"more than {distance:.0%} away from that line."
    )
    return [*lines, _projection(rounds, slope)]


def _projection(rounds: Mapping[str, list[dict[str, Any]]], slope: float) -> str:
    """The time for Llama-2-13B, extrapolated from these figures: decomposing grows with hidden³, the rest with the bytes."""
    matrices, hidden, models = (LLAMA_13B[key] for key in ("matrices", "hidden", "models"))
    growth = matrices * (hidden / HIDDEN) ** 3
    decomposing = statistics.median(result["seconds_decomposing"] for result in rounds["ours"]) / MATRICES
    peer = statistics.median(1 / result["rate"] for result in rounds["peer"])
    read = models * matrices * hidden**2 * 2
    return (
        f"Llama-2-13B, extrapolated from these figures: {matrices} matrices of {hidden} x {hidden} from {models} models, {read / 1e9:.0f} GB: "
        f"{growth * decomposing / 60:.1f} min to decompose, {read * slope / 60:.1f} min to read and merge from the page cache (a disk "
        f"of 1 GB/s takes {read / 1e9 / 60:.1f} min); the peer {growth * peer / 60:.0f} min."
    )


def main() -> None:
    """Create the checkpoints once and run the sides on them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", help="directory for 3 GB of synthetic models (default: a temporary one)")
    options, _ = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as directory:
        if options.scratch is None:
            sys.argv += ["--scratch", directory]  # the processes of the sides inherit it
        scratch = Path(options.scratch or directory)
        if not (scratch / _LAST_FILE).exists():
            make_checkpoints(scratch)
        run(STAGE, measure, agreement, parser, notes)


if __name__ == "__main__":
    main()
