"""Processor time of near-empty steps, as forks of one process and as processes of their own, and of plans of more and more rows.

Every step is `cora train` of one optimizer step with a tiny model of random weights, on a file of records, as the steps of a grid are. A side's time for one step is that of four steps
less that of one, so that the start of the server does not count.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROWS = (100, 1_000, 10_000)


def tiny_model(directory: Path) -> Path:
    """A two-layer Llama with the embedded model's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from cora_cli.models.references import EMBEDDED_MODEL, resolve_model
    from cora_cli.models.tokenizer import load_tokenizer

    torch.manual_seed(0)
    tokenizer = load_tokenizer(resolve_model(EMBEDDED_MODEL))
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer))).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def records_file(path: Path) -> Path:
    """Records of the built-in set, written once, as a grid does."""
    from cora_cli.data.split import load_split
    from cora_cli.writing import write_jsonl

    write_jsonl(path, load_split("builtin:code", None, 0).train[:40])
    return path


def seconds_of_children() -> float:
    """Processor seconds of all processes that were started here and have ended, with theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def steps(model: Path, place: Path, forks: bool, count: int) -> float:
    """Processor seconds of `count` steps, with everything that they need to start."""
    from cora_cli.experiments.launch import LocalLauncher

    before = seconds_of_children()
    launcher = LocalLauncher(1, "cpu")
    launcher._forks = forks
    settings = ["--mode", "lora", "--rank", "4", "--max-steps", "1", "--batch-size", "2", "--test-size", "4", "--limit", "8"]
    for number in range(count):
        argv = [
            "train",
            "--model",
            str(model),
            "--dataset",
            str(place / "records.jsonl"),
            "--output-dir",
            str(place / f"{forks}-{count}-{number}"),
        ]
        job = launcher.submit("train", [*argv, *settings, "--device", "cpu"], place / "log")
        while (code := job.ended()) is None:
            time.sleep(0.05)
        if code:
            sys.exit((place / "log").read_text())
    del job, launcher  # ends the server, whose time then counts
    return seconds_of_children() - before


def plan(model: Path, place: Path, rows: int) -> float:
    """Processor seconds of `cora ablate --dry-run` with this many rows."""
    import yaml

    grid = place / f"{rows}.yaml"
    blocks = [{"mode": ["lora", "full"], "learning_rate": [1e-4, 2e-4, 3e-4, 4e-4, 5e-4], "seed": list(range(rows // 10))}]
    grid.write_text(yaml.safe_dump({"model": str(model), "datasets": {"code": "builtin:code"}, "grid": blocks}))
    command = [
        sys.executable,
        "-P",
        "-m",
        "cora_cli",
        "ablate",
        str(grid),
        "--dry-run",
        "--device",
        "cpu",
        "-o",
        str(place / "out"),
    ]
    before = seconds_of_children()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return seconds_of_children() - before


def main() -> None:
    """Measure and print both tables."""
    from cora_cli.render.markdown_table import markdown_table

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS, help="numbers of rows to plan, multiples of ten")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model = tiny_model(place / "model")
        records_file(place / "records.jsonl")
        rows = []
        for forks, name in ((True, "fork of one process"), (False, "process of its own")):
            one, four = (steps(model, place, forks, count) for count in (1, 4))
            rows.append([name, f"{one:.1f}", f"{(four - one) / 3:.2f}"])
        print(markdown_table(["near-empty step", "the first, s", "each further one, s"], rows), end="\n\n")
        print(
            markdown_table(["rows planned", "processor s"], [[f"{n:,}", f"{plan(model, place, n):.1f}"] for n in options.rows])
        )


if __name__ == "__main__":
    main()
