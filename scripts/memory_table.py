"""Prints the memory table of docs/hardware.md: the peak of one training step for models of common sizes, from `cora train --dry-run`'s measurement.

Layers are alike, so models are measured with 4 and with 6 layers, and the peak is continued in a straight line; --complete measures all
layers. Takes a few minutes on an idle machine, needs no weights, and keeps finished measurements in --results.
"""

import argparse
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from cora_cli import embedded
from cora_cli.planning.page import CARDS, fits
from cora_cli.render.markdown_table import markdown_table
from cora_cli.training.config import TrainConfig
from cora_cli.training.preflight import Measured, preflight

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
"""With several cards, --shard fsdp divides the model among them."""
FEWER_LAYERS = (4, 6)


def main() -> None:
    """Measure what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("memory.json"), help="measurements that are already made")
    parser.add_argument("--complete", action="store_true", help="measure all layers")
    parser.add_argument("sizes", nargs="*", metavar="SIZE", help=f"measure only these of {', '.join(SHAPES)}")
    arguments = parser.parse_args()
    if unknown := sorted({*arguments.sizes} - {*SHAPES}):
        parser.error(f"there is no size {unknown[0]}; choose from {', '.join(SHAPES)}")
    found = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    for size, mode, cards in itertools.product(arguments.sizes or SHAPES, MODES, CARD_COUNTS):
        for layers in _measured_layers(size, arguments.complete):
            if (key := _key(size, mode, cards, layers)) not in found:
                found[key] = _measure(size, mode, cards, layers)
                arguments.results.write_text(json.dumps(found, indent=1))
    print(_table(found, arguments.complete))


def _measured_layers(size: str, complete: bool) -> tuple[int, ...]:
    return (SHAPES[size][1]["num_hidden_layers"],) if complete else FEWER_LAYERS


def _key(size: str, mode: str, cards: int, layers: int) -> str:
    return f"{size} {mode}, {cards} cards, {layers} layers"


def _measure(size: str, mode: str, cards: int, layers: int) -> dict[str, Any]:
    """The parts of the peak on each card, and the trained parameters."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        data = place / "data.jsonl"
        records = SETTINGS["batch_size"] * cards + 1
        data.write_text("".join(json.dumps(_record(number)) + "\n" for number in range(records)))
        model = _configure(place / size, {**SHAPES[size][1], "num_hidden_layers": layers})
        several: dict[str, Any] = {"processes": cards, "shard": "fsdp"} if cards > 1 else {}
        places: dict[str, Any] = {"model": str(model), "dataset": str(data), "output_dir": str(place / "run")}
        plan = preflight(TrainConfig(**places, mode=mode, dry_run=True, **several, **SETTINGS, **MODES[mode]))
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


def _record(number: int) -> dict[str, str]:
    """Some 512 tokens, of which 128 carry loss, with a beginning of their own."""
    return {"instruction": f"{number:03}" + " the" * 340, "input": "", "output": " of" * 127}


def _configure(place: Path, shape: dict[str, Any]) -> Path:
    place.mkdir(exist_ok=True)
    common = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 8192}
    (place / "config.json").write_text(json.dumps({**common, "bos_token_id": 1, "eos_token_id": 2, **shape}))
    AutoTokenizer.from_pretrained(embedded.model_directory()).save_pretrained(place)
    return place


def _peak(found: dict[str, Any], size: str, mode: str, cards: int, complete: bool) -> tuple[float, float] | None:
    """Bytes on each card and trained parameters; None where they are not measured."""
    measured = _measured_layers(size, complete)
    rows = [found.get(_key(size, mode, cards, layers)) for layers in measured]
    values = [(sum(row["parts"].values()), row["trained"]) for row in rows if row is not None]
    if len(values) < len(measured):
        return None
    if len(measured) == 1:
        return values[0]
    (few, more), layers = measured, SHAPES[size][1]["num_hidden_layers"]
    total, trained = (high + (high - low) * (layers - more) / (more - few) for low, high in zip(*values, strict=True))
    return total, trained


def _table(found: dict[str, Any], complete: bool) -> str:
    several = CARD_COUNTS[1:]
    headers = ["model", "mode", "1 card", "several, each complete", *(f"{cards} cards, divided" for cards in several)]
    headers += ["smallest card: alone", *(f"of {cards}" for cards in several)]
    rows = []
    for size, mode in itertools.product(SHAPES, MODES):
        peaks = [_peak(found, size, mode, cards, complete) for cards in CARD_COUNTS]
        if any(peak is None for peak in peaks):
            continue
        (alone, trained), *divided = [peak for peak in peaks if peak is not None]
        # DistributedDataParallel keeps a second copy of the gradients on every card.
        totals = [alone, alone + 4 * trained, *(total for total, _ in divided)]
        smallest = [
            next((f"{card} GB" for card in CARDS if fits(total, card * 2**30)), "none")
            for total in (alone, *(total for total, _ in divided))
        ]
        rows.append([SHAPES[size][0], mode, *(f"{total / 2**30:.1f}" for total in totals), *smallest])
    return markdown_table(headers, rows)


if __name__ == "__main__":
    main()
