"""Write a model with random weights, for benchmarks of sizes that no machine without a hub has. Speed and memory do not depend on the weights.

python benchmarks/random_model.py llama-2-7b DIRECTORY: a bf16 model in DIRECTORY with the tokenizer of the embedded model, or of the directory
`--tokenizer`, whose vocabulary it has. It is made on the GPU where there is one; 7 billion parameters take about a minute and 14 GB of disk.
"""

import argparse
from typing import Any

SHAPES = {
    "llama-2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama-2-13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}


def main() -> None:
    """Write the model."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from cora_cli.models.references import EMBEDDED_MODEL, resolve_model

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=tuple(SHAPES))
    parser.add_argument("directory")
    parser.add_argument("--tokenizer", help="a directory with a tokenizer, instead of that of the embedded model")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer or resolve_model(EMBEDDED_MODEL).path)
    shape: dict[str, Any] = SHAPES[options.shape]
    config = LlamaConfig(
        **shape,
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="bfloat16",
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    model.save_pretrained(options.directory)
    tokenizer.save_pretrained(options.directory)


if __name__ == "__main__":
    main()
