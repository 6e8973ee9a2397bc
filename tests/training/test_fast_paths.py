"""`--compile` and `--liger` change no loss, and say what they need."""

import re

import pytest
import torch

from cora_cli.errors import CoraError, UsageError
from cora_cli.reading import read_jsonl
from cora_cli.records import LogLine
from cora_cli.rundir import RunDirectory
from cora_cli.training import fast_paths
from cora_cli.training.attention import register_packed_attention
from cora_cli.training.config import TrainConfig
from cora_cli.training.preflight import preflight
from cora_cli.training.run import train


def settings(tiny_model, folder, **own):
    return TrainConfig(
        model=str(tiny_model),
        dataset="builtin:code",
        output_dir=str(folder),
        device="cpu",
        dtype="fp32",
        limit=12,
        max_steps=2,
        batch_size=4,
        eval_limit=2,
        rank=4,
        **{"mode": "lora", **own},
    )


def losses(folder):
    return [line["loss"] for line in read_jsonl(RunDirectory(folder).log, LogLine) if "loss" in line]


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    register_packed_attention()


@pytest.mark.slow
@pytest.mark.parametrize("own", [{"mode": "lora"}, {"mode": "fb", "b_init": "orthonormal", "gradient_checkpointing": True}])
def test_compiled_layers_train_as_the_others_do(tiny_model, tmp_path, monkeypatch, own):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(fast_paths, "BACKEND", count)
    train(settings(tiny_model, tmp_path / "plain", **own))
    train(settings(tiny_model, tmp_path / "compiled", compile=True, **own))
    assert graphs
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-6)


def wrong_forward(graph, inputs):
    def run(*arguments):
        found = graph.forward(*arguments)
        return tuple(2 * each if torch.is_tensor(each) and each.is_floating_point() else each for each in found)

    return run


class _Tripled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, each):
        return each.clone()

    @staticmethod
    def backward(ctx, upstream):
        return 3 * upstream


def wrong_backward(graph, inputs):
    def run(*arguments):
        found = graph.forward(*arguments)
        return tuple(_Tripled.apply(each) if torch.is_tensor(each) and each.is_floating_point() else each for each in found)

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "what"), [(wrong_forward, "losses"), (wrong_backward, "gradients")])
def test_a_compiler_that_computes_something_else_is_refused(tiny_model, tmp_path, monkeypatch, backend, what):
    monkeypatch.setattr(fast_paths, "BACKEND", backend)
    with pytest.raises(CoraError, match=rf"--compile changes the {what} of this model by \S+ of their size; leave it out"):
        train(settings(tiny_model, tmp_path / "run", compile=True))
    assert not (tmp_path / "run").exists()


def test_a_machine_that_cannot_compile_says_so(tiny_model, tmp_path, monkeypatch):
    def missing(graph, inputs):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(fast_paths, "BACKEND", missing)
    with pytest.raises(CoraError, match=r"--compile does not work on this machine: .*no C\+\+ compiler.*; leave it out"):
        train(settings(tiny_model, tmp_path / "run", compile=True))


@pytest.mark.parametrize("start", [train, preflight])
def test_liger_needs_a_gpu(tiny_model, tmp_path, start):
    with pytest.raises(CoraError, match="--liger needs a CUDA GPU"):
        start(settings(tiny_model, tmp_path / "run", liger=True))


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"compile": True, "liger": True}, "--compile does not go with --liger, whose kernels torch.compile cannot trace"),
        ({"compile": True, "shard": "fsdp"}, "--compile does not go with --shard"),
        ({"liger": True, "shard": "fsdp"}, "--liger does not go with --shard"),
        (
            {"attention": "fast"},
            "--attention must be auto, varlen, flex, flash-attn, sdpa, or a repository such as kernels-community",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(tiny_model, tmp_path, own, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        settings(tiny_model, tmp_path, **own)


def test_a_processor_has_one_attention(tiny_model, tmp_path):
    with pytest.raises(CoraError, match="--attention flex needs a CUDA GPU"):
        train(settings(tiny_model, tmp_path / "run", attention="flex"))
    assert not (tmp_path / "run").exists()
