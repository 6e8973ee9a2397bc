"""Why Lily is no mode: what PEFT's Lily makes of a record alone, next to others, with padding, and token by token.

    python benchmarks/lily.py

It trains PEFT's Lily on builtin:code and then measures the losses and the greedy answers of held-out records. All losses of a record are
over the same response tokens; for a method that changes W they would be one number. Every setting is the same in all cases but the forward passes.
The base model, and a LoRA of about as many parameters that was trained on the same records in the same order, are the references.
"""

import argparse
import random
from collections.abc import Sequence
from typing import Any

import torch
from peft import LilyConfig, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from cora_cli.data.encode import Example
from cora_cli.render.markdown_table import markdown_table
from cora_cli.training.config import TrainConfig
from cora_cli.training.prepare import prepare
from cora_cli.training.settings import DEFAULT_TARGETS

END = 2
"""SmolLM2's end token, which pads as well."""
PADDING, CHANGED, ANOTHER = 100, 20, 100
"""How many tokens are padded, how many at a record's end are replaced, and by which token."""


def rows_of(sequences: Sequence[Sequence[int]], left: bool = False) -> dict[str, torch.Tensor]:
    """Token ids and their mask, padded to the longest sequence."""
    width = max(map(len, sequences))
    ids, mask = torch.full((len(sequences), width), END), torch.zeros(len(sequences), width, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        place = slice(width - len(sequence), width) if left else slice(0, len(sequence))
        ids[row, place], mask[row, place] = torch.tensor(sequence), 1
    return {"input_ids": ids, "attention_mask": mask}


def response_loss(logits: torch.Tensor, example: Example) -> torch.Tensor:
    """The mean loss of the response's tokens, from the logits (tokens, vocabulary) of the example's row."""
    first, last = example.prompt_length, len(example.input_ids)
    return torch.nn.functional.cross_entropy(logits[first - 1 : last - 1].float(), torch.tensor(example.input_ids[first:]))


LILY: dict[str, Any] = {"r": 32, "stride_A": 5, "num_B": 6}
LORA: dict[str, Any] = {"r": 7, "lora_alpha": 14}
"""They train about as many numbers in SmolLM2-135M."""


def base_model(path: str) -> Any:
    """The base model in float32."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def trained(path: str, config: Any, examples: Sequence[Example], steps: int) -> PeftModel:
    """An adapter on the base model after AdamW steps of four examples at 3e-3, which are the same for every `config`."""
    torch.manual_seed(0)
    chosen = random.Random(0)
    config.target_modules, config.task_type = list(DEFAULT_TARGETS), "CAUSAL_LM"
    model: Any = get_peft_model(base_model(path).train(), config)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0)
    for _ in range(steps):
        batch = chosen.sample([example for example in examples if len(example.input_ids) <= 256], 4)
        logits = model(**rows_of([example.input_ids for example in batch])).logits
        weights = torch.tensor([len(example.input_ids) - example.prompt_length for example in batch])
        losses = torch.stack([response_loss(row, example) for row, example in zip(logits, batch, strict=True)])
        optimizer.zero_grad()
        ((losses * weights).sum() / weights.sum()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return model.eval()


def numbers(model: Any) -> int:
    """How many numbers train."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def losses_of(model: Any, example: Example, neighbours: Sequence[Example]) -> dict[str, float]:
    """The example's loss in each kind of forward pass."""
    ids, first = example.input_ids, example.prompt_length
    alone = model(**rows_of([ids])).logits[0]
    batch = model(**rows_of([ids, *(other.input_ids for other in neighbours)])).logits[0]
    padded = rows_of([ids, [END] * (len(ids) + PADDING)])
    padded = {name: tensor[:1] for name, tensor in padded.items()}
    prefixes = torch.stack([model(**rows_of([ids[:end]])).logits[0, -1] for end in range(first, len(ids))])
    cached: list[torch.Tensor] = []
    state = model(input_ids=torch.tensor([ids[:first]]), use_cache=True)
    for token in ids[first:]:
        cached.append(state.logits[0, -1])
        state = model(input_ids=torch.tensor([[token]]), past_key_values=state.past_key_values, use_cache=True)
    changed = model(**rows_of([ids[:-CHANGED] + [ANOTHER] * CHANGED])).logits[0]
    target = torch.tensor(ids[first:])
    found = {
        "alone, in one pass": response_loss(alone, example),
        f"next to {len(neighbours)} others": response_loss(batch, example),
        f"with {PADDING} tokens of padding": response_loss(model(**padded).logits[0], example),
        "token by token, without a cache": torch.nn.functional.cross_entropy(prefixes, target),
        "token by token, with a cache": torch.nn.functional.cross_entropy(torch.stack(cached), target),
        "logits of the prompt": (changed - alone)[: first - 1].abs().max(),
    }
    return {name: float(value) for name, value in found.items()}


def answer(model: Any, prompts: Sequence[Sequence[int]], tokens: int, use_cache: bool) -> list[int]:
    """The greedy answer to the first prompt, up to its end."""
    rows = rows_of(prompts, left=True)
    made = model.generate(**rows, do_sample=False, max_new_tokens=tokens, use_cache=use_cache, pad_token_id=END)
    found: list[int] = made[0, rows["input_ids"].shape[1] :].tolist()
    return found[: found.index(END)] if END in found else found


def main() -> None:
    """Print a table of losses, and how many answers are equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--records", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48, help="of each answer")
    chosen = parser.parse_args()
    config = TrainConfig(
        model="builtin:smollm2", dataset="builtin:code", output_dir="unused", mode="lora", test_size=64.0, device="cpu"
    )
    prepared = prepare(config)
    path = str(prepared.model_path.path)
    model, lora = (
        trained(path, config, prepared.train.examples, chosen.steps) for config in (LilyConfig(**LILY), LoraConfig(**LORA))
    )
    references = {"the base model": base_model(path), "a LoRA, trained alike": lora}
    held_out = [example for example in prepared.test.examples if len(example.input_ids) <= 300]
    lengths = {id(one): len(one.input_ids) - one.prompt_length for one in held_out}
    examples = [one for one in held_out if 24 <= lengths[id(one)] <= 64 and len(one.input_ids) <= 200][: chosen.records]
    others = [one for one in held_out if one not in examples]
    losses, equal = [], {"with and without a cache": 0, "alone and next to 3 others": 0}
    with torch.no_grad():
        for number, example in enumerate(examples):
            neighbours = others[3 * number : 3 * number + 3]
            losses.append(losses_of(model, example, neighbours))
            prompt, *near = (one.input_ids[: one.prompt_length] for one in (example, *neighbours))
            plain = answer(model, [prompt], chosen.tokens, use_cache=True)
            equal["with and without a cache"] += plain == answer(model, [prompt], chosen.tokens, use_cache=False)
            equal["alone and next to 3 others"] += plain == answer(model, [prompt, *near], chosen.tokens, use_cache=True)
    rows = []
    for name in losses[0]:
        values = [record[name] for record in losses]
        gaps = [record[name] - record["alone, in one pass"] for record in losses]
        if name == "logits of the prompt":
            print(f"The last {CHANGED} tokens of the record changed: the logits of its prompt move by up to {max(values):.3f}.")
            continue
        rows.append([name, f"{sum(values) / len(values):.4f}", f"{min(gaps):+.4f} to {max(gaps):+.4f}"])
    with torch.no_grad():
        for name, reference in references.items():
            found = [float(response_loss(reference(**rows_of([one.input_ids])).logits[0], one)) for one in examples]
            rows.append([name, f"{sum(found) / len(found):.4f}", ""])
    print(markdown_table(["loss of a record", "mean", "minus that alone, in one pass"], rows))
    print(f"Lily trains {numbers(model):,} numbers, the LoRA {numbers(lora):,}.")
    for name, count in equal.items():
        print(f"{count} of {len(examples)} greedy answers are equal {name}.")


if __name__ == "__main__":
    main()
