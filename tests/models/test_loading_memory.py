"""How much memory of the host loading a model takes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

MEASURE = """
import sys, threading, time, torch
import transformers.models.llama.modeling_llama
from cora_cli.models.loading import load_model
from cora_cli.models.references import resolve_model

def own():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024

def load(path):
    return load_model(resolve_model(path), getattr(torch, sys.argv[3]), torch.device("cpu"), None)

load(sys.argv[1])
before, peak, done = own(), 0, threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, own())
        time.sleep(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
model = load(sys.argv[2])
done.set()
watcher.join()
sizes = [parameter.nbytes for parameter in model.parameters()]
print(peak - before, sum(sizes), max(sizes))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("stored", "loaded"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32")])
def test_loading_takes_one_copy_of_the_weights(stored: str, loaded: str, tmp_path: Path) -> None:
    """Pages of the files do not count: the system takes them back when it needs them."""
    if not Path("/proc/self/status").exists():
        pytest.skip("Linux tells how much memory of a process is its own")
    for name, width, shard in (("small", 32, "5GB"), ("large", 768, "60MB")):
        config = LlamaConfig(
            vocab_size=8000, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=8, num_attention_heads=2
        )
        LlamaForCausalLM(config).to(getattr(torch, stored)).save_pretrained(tmp_path / name, max_shard_size=shard)
    arguments = [sys.executable, "-P", "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "large"), loaded]
    printed = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=600).stdout
    peak, copy, largest = map(int, printed.split())
    assert peak <= 1.1 * copy + largest
