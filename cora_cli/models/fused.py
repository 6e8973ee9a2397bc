"""The query, key and value of a fused projection as three linear layers, named as in the families that keep them apart.

GPT-2's `c_attn`, for example, computes all three with one weight. `split_projections` puts layers with the rows of `q_proj`, `k_proj` and
`v_proj` in its place, `join_projections` restores it, and `fused_views` names the same rows for those who read them from files.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from cora_cli.errors import CoraError
from cora_cli.models.checkpoint import PLAIN_TYPES
from cora_cli.models.skeleton import other_modalities

VIEWS = ("q_proj", "k_proj", "v_proj")
_FUSED_NAMES = ("c_attn", "query_key_value", "qkv", "qkv_proj", "w_pack", "wqkv", "in_proj_qkv", "in_proj_qkvz", "qkv_linear")
"""What fused projections are called, in lower case."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """The order of the outputs of a fused projection: `groups` blocks, each with `sizes` outputs of the parts in `order`."""

    groups: int
    sizes: tuple[int, int, int]
    order: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj")

    @property
    def outputs(self) -> int:
        """The outputs of the fused projection."""
        return self.groups * sum(self.sizes)

    def outputs_of(self, part: str) -> int:
        """The outputs of one part."""
        return self.groups * self.sizes[self.order.index(part)]

    def take(self, fused: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parts (…, outputs of a part) of a tensor (…, outputs)."""
        blocks = fused.unflatten(-1, (self.groups, -1)).split(self.sizes, dim=-1)
        return {part: block.flatten(-2) for part, block in zip(self.order, blocks, strict=True)}

    def put(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The inverse of `take`."""
        blocks = [parts[part].unflatten(-1, (self.groups, -1)) for part in self.order]
        return torch.cat(blocks, dim=-1).flatten(-2)

    def rows(self, weight: torch.Tensor, part: str) -> torch.Tensor:
        """The rows of one part, (outputs of the part, in), of a fused weight (outputs, in)."""
        return self.take(weight.T)[part].T.contiguous()

    def place(self, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        """B (outputs, k) and A (k, in), whose product holds that of each part's own B and A in the rows of the part.

        `factors` has B and A of at least one part, k is the sum of their ranks, and the rows of other parts are zeros.
        """
        known = {part: factors[part] for part in self.order if part in factors}
        below = torch.cat([a for _, a in known.values()])
        start = 0
        blocks = {part: below.new_zeros(len(below), self.outputs_of(part)) for part in self.order}
        for part, (b, a) in known.items():
            blocks[part][start : start + len(a)] = b.T
            start += len(a)
        return self.put(blocks).T.contiguous(), below


@dataclasses.dataclass(frozen=True)
class View:
    """`part` of the fused projection `fused`, a module's name."""

    fused: str
    part: str
    layout: Layout


def _stacked(config: Any) -> Layout:
    """All queries, then all keys, then all values."""
    return Layout(1, (config.hidden_size,) * 3)


def _by_head(config: Any) -> Layout:
    """The query, key and value of the first head, then those of the second."""
    return Layout(config.num_attention_heads, (config.hidden_size // config.num_attention_heads,) * 3)


def _grouped(heads: int, shared: int, size: int) -> Layout:
    """Stacked, with fewer heads of keys and values; `size` is that of a head."""
    return Layout(1, (heads * size, shared * size, shared * size))


def _phi3(config: Any) -> Layout:
    heads = config.num_attention_heads
    return _grouped(heads, config.num_key_value_heads, getattr(config, "head_dim", None) or config.hidden_size // heads)


def _dbrx(config: Any) -> Layout:
    return _grouped(config.n_heads, config.attn_config.kv_n_heads, config.d_model // config.n_heads)


def _falcon(config: Any) -> Layout:
    heads = config.num_attention_heads
    size = config.hidden_size // heads
    if config.new_decoder_architecture:
        # The queries that share a key and a value stand before them.
        return Layout(config.num_kv_heads, (heads // config.num_kv_heads * size, size, size))
    return _grouped(heads, 1, size) if config.multi_query else _by_head(config)


def _bigcode(config: Any) -> Layout:
    heads = config.num_attention_heads
    return _grouped(heads, 1, config.hidden_size // heads) if config.multi_query else _by_head(config)


def _codegen(config: Any) -> Layout:
    """Four blocks, one for each core of the accelerator that it was trained on, with the values before the keys."""
    return Layout(4, (config.hidden_size // 4,) * 3, ("q_proj", "v_proj", "k_proj"))


_FAMILIES: dict[str, tuple[str, Callable[[Any], Layout]]] = {
    "bloom": ("query_key_value", _by_head),
    "codegen": ("qkv_proj", _codegen),
    "dbrx": ("Wqkv", _dbrx),
    "falcon": ("query_key_value", _falcon),
    "gpt2": ("c_attn", _stacked),
    "gpt_bigcode": ("c_attn", _bigcode),
    "gpt_neox": ("query_key_value", _by_head),
    "gpt_neox_japanese": ("query_key_value", _by_head),
    "mpt": ("Wqkv", _stacked),
    "openai-gpt": ("c_attn", _stacked),
    "persimmon": ("query_key_value", _by_head),
    "phi3": ("qkv_proj", _phi3),
    "phi4_multimodal": ("qkv_proj", _phi3),
}
"""The fused projection of each family and its layout, as transformers' own code takes it apart, by `model_type`."""


class SplitProjection(torch.nn.Module):
    """A fused projection as three layers with its rows, whose outputs it arranges in the order of the fused one."""

    def __init__(self, fused: Any, layout: Layout) -> None:
        """Take over the weight and bias of `fused`, an `nn.Linear` or GPT-2's Conv1D."""
        super().__init__()
        self.layout, self.kind = layout, type(fused)
        kind = torch.nn.Linear if self.kind is Conv1D else self.kind
        weights = layout.take(fused.weight.detach() if self.kind is Conv1D else fused.weight.detach().T)
        biases = layout.take(fused.bias.detach()) if fused.bias is not None else {}
        for part, weight in weights.items():
            with torch.device("meta"):
                layer = kind(weight.shape[0], weight.shape[1], bias=bool(biases))
            layer.weight = _parameter(weight.T, fused.weight)
            if biases:
                layer.bias = _parameter(biases[part], fused.bias)
            self.add_module(part, layer)
        self.train(fused.training)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """The outputs (…, outputs) of the fused projection for `states` (…, in)."""
        return self.layout.put({part: getattr(self, part)(states) for part in self.layout.order})

    def joined(self) -> Any:
        """The fused projection with the rows of the three layers."""
        layers = {part: getattr(self, part) for part in self.layout.order}
        first = layers["q_proj"]
        weight = self.layout.put({part: layer.weight.detach().T for part, layer in layers.items()})  # (in, outputs)
        inside, outside = weight.shape
        with torch.device("meta"):
            fused: Any = Conv1D(outside, inside) if self.kind is Conv1D else self.kind(inside, outside, first.bias is not None)
        fused.weight = _parameter(weight if self.kind is Conv1D else weight.T, first.weight)
        if first.bias is not None:
            fused.bias = _parameter(self.layout.put({part: layer.bias.detach() for part, layer in layers.items()}), first.bias)
        return fused.train(self.training)


def _parameter(value: torch.Tensor, like: torch.Tensor) -> torch.nn.Parameter:
    """A copy, since a slice would keep all of the fused weight in memory."""
    return torch.nn.Parameter(value.clone(memory_format=torch.contiguous_format), requires_grad=like.requires_grad)


def fused_views(model: Any) -> dict[str, View]:
    """What q_proj, k_proj and v_proj are in a model of transformers that has them fused, by full name; empty for other models.

    Other code than transformers' own may arrange the rows of the same family in another way, so its models have none.
    """
    return {f"{name}.{part}": View(name, part, layout) for name, layout in _fused(model) for part in VIEWS}


def _fused(model: Any) -> Iterator[tuple[str, Layout]]:
    config = model.config.get_text_config(decoder=True)
    if config.model_type not in _FAMILIES or not type(model).__module__.startswith("transformers."):
        return
    called, layout_of = _FAMILIES[config.model_type]
    layout, others = layout_of(config), other_modalities(model)
    for name, module in model.named_modules():
        if name.rpartition(".")[2] != called or name in others or not isinstance(module, torch.nn.Linear | Conv1D):
            continue
        # Attention to an encoder's states has a projection of that name for keys and values alone.
        if (module.nf if isinstance(module, Conv1D) else module.out_features) == layout.outputs:
            yield name, layout


def wanted_views(model: Any, target_modules: Sequence[str]) -> dict[str, Layout]:
    """The fused projections of which `target_modules` name a view, such as `q_proj`, with their layouts."""
    views = fused_views(model).items()
    return {
        view.fused: view.layout
        for name, view in views
        if any(name == target or name.endswith(f".{target}") for target in target_modules)
    }


def split_projections(model: Any, target_modules: Sequence[str]) -> None:
    """Replace in `model` each fused projection of which `target_modules` name a view by its `SplitProjection`.

    Raises `CoraError` for one that `target_modules` also name as a whole, and for one whose weight is not held as plain numbers.
    """
    for name, layout in wanted_views(model, target_modules).items():
        if complete := [target for target in target_modules if name == target or name.endswith(f".{target}")]:
            raise CoraError(
                f"target modules name {complete[0]!r} and also q_proj, k_proj or v_proj, which are rows of its one weight in this model; name "
                "either the complete projection or the three"
            )
        fused = model.get_submodule(name)
        if (kind := str(fused.weight.dtype).removeprefix("torch.")) not in PLAIN_TYPES:
            raise CoraError(
                f"q_proj, k_proj and v_proj are rows of {name} in this model, which is held as {kind}, so they cannot be adapted apart; name "
                f"{name.rpartition('.')[2]} in --target-modules, or load the model in bf16, fp16 or fp32"
            )
        model.set_submodule(name, SplitProjection(fused, layout))


def split_parts(model: torch.nn.Module) -> dict[str, SplitProjection]:
    """The fused projections that are split, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SplitProjection)}


def join_projections(model: torch.nn.Module) -> None:
    """Undo `split_projections`; the layers may have other weights by now, but no adapters."""
    for name, module in split_parts(model).items():
        model.set_submodule(name, module.joined())


def unknown_fused(model: torch.nn.Module) -> str | None:
    """The first linear layer that by its name is a fused projection of unknown layout; None where there is none."""
    found = (
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and name.rpartition(".")[2].lower() in _FUSED_NAMES
    )
    return next(found, None)
