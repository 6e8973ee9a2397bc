"""Prints the memory table of docs/hardware.md: the peak of one training step for models of common sizes, from `cora train --dry-run`'s measurement.

Takes a minute or two per model on an idle machine and needs no weights. Finished rows are kept in --results and not measured again.
"""

import argparse
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from cora_cli import embedded
from cora_cli.render.markdown_table import markdown_table
from cora_cli.training.config import TrainConfig
from cora_cli.training.fitting import fits
from cora_cli.training.preflight import Measured, preflight
from cora_cli.training.preflight_text import CARDS

VOCABULARY = 49152
"""That of the embedded tokenizer, in the place of the 32,000 of Llama 2."""
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "1B": ("Llama-3.2-1B", {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True}),
    "7B": ("Llama-2-7B", {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": VOCABULARY}),
    "13B": ("Llama-2-13B", {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
        "num_key_value_heads": 40, "vocab_size": VOCABULARY}),
    "34B": ("CodeLlama-34B", {"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 48, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": VOCABULARY}),
    "70B": ("Llama-3.1-70B", {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 128256}),
}  # fmt: skip
MODES: dict[str, dict[str, Any]] = {"lora": {}, "fb": {"b_init": "random"}, "full": {}}
SETTINGS: dict[str, Any] = {
    "template": "alpaca",
    "rank": 48,
    "batch_size": 16,
    "max_steps": 1,
    "test_size": 1.0,
    "gradient_checkpointing": True,
}
CARD_COUNTS = (1, 2, 8)


def main() -> None:
    """Measure what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("memory.json"), help="rows that are already measured")
    parser.add_argument("sizes", nargs="*", metavar="SIZE", help=f"measure only these of {', '.join(SHAPES)}")
    arguments = parser.parse_args()
    if unknown := sorted({*arguments.sizes} - {*SHAPES}):
        parser.error(f"there is no size {unknown[0]}; choose from {', '.join(SHAPES)}")
    found = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        data = place / "data.jsonl"
        data.write_text("".join(json.dumps(_record(number)) + "\n" for number in range(17)))
        for size in arguments.sizes or SHAPES:
            _, shape = SHAPES[size]
            for mode, own in MODES.items():
                if f"{size} {mode}" not in found:
                    model = _configure(place / size, shape)
                    config = TrainConfig(
                        model=str(model), dataset=str(data), output_dir=str(place / "run"), mode=mode, **SETTINGS, **own
                    )
                    found[f"{size} {mode}"] = _row(config)
                    arguments.results.write_text(json.dumps(found, indent=1))
    print(_table(found))


def _record(number: int) -> dict[str, str]:
    """Some 512 tokens, of which 128 carry loss, with a beginning of their own."""
    return {"instruction": f"{number}" + " the" * 340, "input": "", "output": " of" * 127}


def _configure(place: Path, shape: dict[str, Any]) -> Path:
    place.mkdir(exist_ok=True)
    common = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 8192}
    (place / "config.json").write_text(json.dumps({**common, "bos_token_id": 1, "eos_token_id": 2, **shape}))
    AutoTokenizer.from_pretrained(embedded.model_directory()).save_pretrained(place)
    return place


def _row(config: TrainConfig) -> dict[str, Any]:
    plan = preflight(config)
    if not isinstance(plan.measured, Measured):
        raise SystemExit(plan.measured)
    memory = plan.measured.memory
    return {
        "parts": memory.parts,
        "stage": memory.stage,
        "trained": plan.measured.parameters["trained"],
        "row": plan.largest,
        "labels": plan.largest_labels,
    }


def _table(found: dict[str, Any]) -> str:
    headers = ["model", "mode", "trained", *(f"{part} GiB" for part in next(iter(found.values()))["parts"])]
    headers += [f"{count} card{'s' if count > 1 else ''}: GiB on each" for count in CARD_COUNTS] + ["smallest card"]
    rows = []
    for size, mode in itertools.product(SHAPES, MODES):
        if (row := found.get(f"{size} {mode}")) is None:
            continue
        total = sum(row["parts"].values())
        # DistributedDataParallel keeps a second copy of the gradients on every card.
        totals = [total + (4 * row["trained"] if count > 1 else 0) for count in CARD_COUNTS]
        card = next((f"{card} GB" for card in CARDS if fits(max(totals), card * 2**30)), "none")
        parts = [f"{part / 2**30:.2f}" for part in row["parts"].values()]
        rows.append(
            [SHAPES[size][0], mode, f"{row['trained'] / 1e6:,.1f} M", *parts, *(f"{t / 2**30:.1f}" for t in totals), card]
        )
    return markdown_table(headers, rows)


if __name__ == "__main__":
    main()
