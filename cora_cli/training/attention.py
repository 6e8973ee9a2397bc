"""Attention over a packed row: each token attends to its own segment up to itself and to the shared prefixes that the segment continues.

There is one implementation for CPUs and two for GPUs, all registered with transformers and with the same mask.
`device.select_packed_attention` chooses between them; `data.pack` lays out the row.
"""

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface
from transformers.integrations.flex_attention import flex_attention_forward

from cora_cli.data.pack import Layout
from cora_cli.errors import CoraError

LONGEST_PIECE = 128
"""Queries per piece: short enough to skip most later keys, long enough for efficient matrix products."""

KERNEL_TYPES = (torch.bfloat16, torch.float16)
"""The precisions of torch's FlashAttention."""
COMPILATIONS = 64
"""Compiled forms of one function per process."""
BLOCK = 128
"""Queries and keys per block of a block mask, which is FlexAttention's default."""
BLOCKS_AT_ONCE = 4
"""Blocks of queries whose mask exists at one time while a block mask is made: memory grows with the row's length, not with its square."""


def register_packed_attention(apart: bool = False) -> None:
    """Register the implementations with transformers under the names that `device.select_packed_attention` returns.

    `apart` keeps them out of the graphs in which torch.compile calls them: a layout would be compiled into them.
    """
    forms: dict[str, Callable[..., Any]] = {
        "cora_segments": segment_attention,
        "cora_varlen": varlen_attention,
        "cora_flex": block_mask_attention,
    }
    for name, form in forms.items():
        AttentionInterface.register(name, torch.compiler.disable(form) if apart else form)


def segment_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    layout: Layout,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cut: "Callable[[Layout, int | None], tuple[Piece, ...]] | None" = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention segment by segment, for CPUs, where a mask over the complete row would waste most of the work.

    query: (1, heads, tokens, head_dim); key, value: (1, key_value_heads, tokens, head_dim), where values may have a
    head_dim of their own. `cut` replaces `pieces`. Returns (1, tokens, heads, head_dim of the values). Raises `CoraError` for a model whose attention has dropout, sinks or a position bias.
    """
    _refuse_dropout(kwargs)
    if any(kwargs.get(name) is not None for name in ("s_aux", "position_bias")):
        raise CoraError("this model's attention has sinks or a position bias, which packed rows do not support on a CPU")
    query, key = _in_dtype_of(value, query, key)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.autocast(query.device.type, enabled=False):
        output: torch.Tensor = _PiecewiseAttention.apply(
            query, key, value, (cut or pieces)(layout, sliding_window), scale, softcap
        )
    return output, None


@dataclasses.dataclass(frozen=True)
class Piece:
    """Queries `start` to `end` of a row and the spans of keys, oldest first, that the last of them sees.

    `bias` (queries, last keys) is -inf where a query does not see a key, else 0; every query sees all the keys before these.
    """

    start: int
    end: int
    spans: tuple[tuple[int, int], ...]
    bias: torch.Tensor


def cut_pieces(layout: Layout, window: int | None) -> tuple[Piece, ...]:
    """Cut the queries of every segment into pieces of at most `LONGEST_PIECE`.

    A piece needs no keys behind its own last query, so a long segment costs about half of its square.
    """
    found = []
    for segment in layout.segments:
        before = tuple((layout.segments[index].start, layout.segments[index].end) for index in segment.ancestors)
        for start in range(segment.start, segment.end, LONGEST_PIECE):
            end = min(start + LONGEST_PIECE, segment.end)
            spans = (*before, (segment.start, end))
            keys = sum(last - first for first, last in spans)
            columns = end - start if window is None else keys
            hidden = torch.ones(end - start, columns, dtype=torch.bool).triu(columns - (end - start) + 1)
            if window is not None:
                hidden |= torch.ones_like(hidden).tril(keys - (end - start) - window)
            found.append(Piece(start, end, spans, torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)))
    return tuple(found)


pieces = lru_cache(maxsize=2)(cut_pieces)
"""As `cut_pieces`, created once for all layers of a pass."""


class _PiecewiseAttention(torch.autograd.Function):
    """Softmax attention of each piece over its own keys, scores and weights in float32, other products in the dtype of the inputs.

    Only the inputs are kept for the backward pass; the weights are recomputed. Query heads that share a key head form one
    matrix, so keys are not repeated. The bfloat16 backward of torch's own CPU kernel takes twice the time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        parts: tuple[Piece, ...],
        scale: float,
        softcap: float | None,
    ) -> torch.Tensor:
        """Shapes as in `segment_attention`."""
        ctx.save_for_backward(query, key, value)
        ctx.parts, ctx.scale, ctx.softcap = parts, scale, softcap
        wide = torch.promote_types(query.dtype, torch.float32)
        groups, keys, values = (query[0].to(wide) * scale).unflatten(0, (key.shape[1], -1)), key[0].to(wide), value[0]
        output = query.new_empty(query.shape[2], *groups.shape[:2], value.shape[3])
        for part in parts:
            queries = groups[:, :, part.start : part.end].flatten(1, 2)
            weights, _ = _weights(queries, _take(keys, part), part, softcap)
            mixed = weights.to(value.dtype) @ _take(values, part)
            output[part.start : part.end] = mixed.unflatten(1, (groups.shape[1], -1)).permute(2, 0, 1, 3)
        return output.flatten(1, 2)[None]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """upstream: (1, tokens, heads, head_dim)."""
        query, key, value = ctx.saved_tensors
        groups, keys, values = query[0].unflatten(0, (key.shape[1], -1)), key[0], value[0]
        arriving = upstream[0][0].unflatten(1, groups.shape[:2]).permute(1, 2, 0, 3)
        wide = torch.promote_types(query.dtype, torch.float32)
        wide_groups, wide_keys = groups.to(wide) * ctx.scale, keys.to(wide)
        to_queries = torch.empty_like(groups)
        to_keys, to_values = (torch.zeros(tensor.shape, dtype=wide) for tensor in (keys, values))
        for part in ctx.parts:
            taken = slice(part.start, part.end)
            queries, wide_queries, outputs = (tensor[:, :, taken].flatten(1, 2) for tensor in (groups, wide_groups, arriving))
            weights, slope = _weights(wide_queries, _take(wide_keys, part), part, ctx.softcap)
            to_weights = (outputs @ _take(values, part).transpose(1, 2)).to(wide)
            _add(to_values, part, weights.to(value.dtype).transpose(1, 2) @ outputs)
            to_scores = weights * (to_weights - (weights * to_weights).sum(-1, keepdim=True))
            to_scores = ((to_scores if slope is None else to_scores * slope) * ctx.scale).to(query.dtype)
            to_queries[:, :, taken] = (to_scores @ _take(keys, part)).unflatten(1, (groups.shape[1], -1))
            _add(to_keys, part, to_scores.transpose(1, 2) @ queries)
        found = to_queries.flatten(0, 1)[None], to_keys[None].to(key.dtype), to_values[None].to(value.dtype)
        return *found, None, None, None


def _weights(
    queries: torch.Tensor, keys: torch.Tensor, part: Piece, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention weights (key_value_heads, groups × queries, keys) of scaled queries, and the slope of the soft cap at each score."""
    scores = queries @ keys.transpose(1, 2)
    slope = None
    if softcap is not None:
        bounded = torch.tanh(scores / softcap)
        scores, slope = bounded * softcap, 1 - bounded**2
    rows, columns = part.bias.shape
    scores.unflatten(1, (-1, rows))[..., -columns:].add_(part.bias.to(scores.device))
    return scores.softmax(-1), slope


def _take(rows: torch.Tensor, part: Piece) -> torch.Tensor:
    """The rows (heads, tokens, head_dim) of the piece's keys: (heads, keys, head_dim)."""
    spans = [rows[:, first:last] for first, last in part.spans]
    return spans[0] if len(spans) == 1 else torch.cat(spans, dim=1)


def _add(rows: torch.Tensor, part: Piece, update: torch.Tensor) -> None:
    """Add to the rows of the piece's keys."""
    lengths = [last - first for first, last in part.spans]
    for (first, last), own in zip(part.spans, update.split(lengths, dim=1), strict=True):
        rows[:, first:last] += own


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    layout: Layout,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Torch's FlashAttention, a sequence for each segment, for GPUs. Shapes as in `segment_attention`.

    What its kernel does not compute, such as soft caps, sinks, float32 and some widths of the heads, FlexAttention does. Raises
    `CoraError` for a model whose attention has dropout.
    """
    _refuse_dropout(kwargs)
    query, key = _in_dtype_of(value, query, key)
    width = query.shape[-1]
    of_kernel = value.dtype in KERNEL_TYPES and width == value.shape[-1] and width % 8 == 0 and width <= 256
    if not of_kernel or any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        return block_mask_attention(module, query, key, value, None, layout, sliding_window, scaling=scaling, **kwargs)
    runs = layout_sequences(layout, query.device)
    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if runs.keys is not None:
        keys, values = (Gathered.apply(tensor, runs.keys) for tensor in (keys, values))
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    output = _varlen_kernel()(
        queries, keys, values, runs.query_ends, runs.key_ends, *runs.longest, scale=scaling, window_size=window
    )
    return output[None], None


class Gathered(torch.autograd.Function):
    """Rows by index, whose gradients are added in float32: keys of a shared prefix serve all its continuations."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """rows: (tokens, heads, head_dim); places: (keys,) int64. Returns (keys, heads, head_dim)."""
        ctx.save_for_backward(places)
        ctx.tokens = len(rows)
        return rows.index_select(0, places)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """upstream: as the output."""
        (arriving,), (places,) = upstream, ctx.saved_tensors
        wide = torch.promote_types(arriving.dtype, torch.float32)
        total = torch.zeros(ctx.tokens, *arriving.shape[1:], dtype=wide, device=arriving.device)
        return total.index_add_(0, places, arriving.to(wide)).to(arriving.dtype), None


@cache
def _varlen_kernel() -> Callable[..., Any]:
    from torch.nn.attention.varlen import varlen_attn

    # Versions without the argument take fewer heads of keys than of queries without being told.
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    return functools.partial(varlen_attn, **grouped)


@dataclasses.dataclass(frozen=True)
class Sequences:
    """A row as one sequence of queries and one of keys for each segment; the last query of a sequence sees its last key.

    `query_ends`, `key_ends` (segments + 1,) int32: where the sequences end, after a 0. `keys`: the places in the row of all keys, one
    sequence after the other, or None where these are the places of the queries. `longest`: the most queries and keys of a sequence.
    """

    query_ends: torch.Tensor
    key_ends: torch.Tensor
    keys: torch.Tensor | None
    longest: tuple[int, int]


@lru_cache(maxsize=2)
def layout_sequences(layout: Layout, device: torch.device) -> Sequences:
    """The row's sequences: the keys of a segment are those of the prefixes that it continues, and its own. Created once for all layers."""
    queries, keys = [segment.length for segment in layout.segments], [len(each) for each in layout.keys]
    query_ends, key_ends = (
        torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device) for lengths in (queries, keys)
    )
    taken = None if keys == queries else torch.tensor(list(itertools.chain.from_iterable(layout.keys)), device=device)
    return Sequences(query_ends, key_ends, taken, (max(queries), max(keys)))


def block_mask_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    layout: Layout,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """FlexAttention over the complete row with a block mask, for GPUs. Shapes as in `segment_attention`.

    Raises `CoraError` for a model whose attention has dropout.
    """
    _refuse_dropout(kwargs)
    allow_compilations()
    query, key = _in_dtype_of(value, query, key)
    mask = layout_block_mask(layout, sliding_window, query.device)
    return flex_attention_forward(module, query, key, value, mask, **kwargs)


@cache
def allow_compilations() -> None:
    """Let torch compile a function for every precision, gradient mode, window and kind of length that a run needs.

    Beyond torch's limit of 8 it would fall back, with a warning only, to code that is not compiled; that of FlexAttention holds the scores
    of all pairs of tokens.
    """
    torch._dynamo.config.recompile_limit = max(COMPILATIONS, torch._dynamo.config.recompile_limit)


def _in_dtype_of(value: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys in the dtype of the values.

    The projections give all three the same dtype, but with float32 weights the rotary embedding returns float32, even under autocast.
    """
    return query.to(value.dtype), key.to(value.dtype)


def _refuse_dropout(arguments: dict[str, Any]) -> None:
    if arguments.get("dropout"):
        raise CoraError(
            "this model's attention has dropout, which packed rows do not support; set attention_dropout to 0 in its config.json"
        )


def layout_mask(layout: Layout, window: int | None, device: torch.device) -> Callable[..., torch.Tensor]:
    """The mask of a packed row as FlexAttention expects it: whether token `query` of the row attends to token `key`.

    The function works elementwise on index tensors (batch, head, query, key) and ignores the first two.
    """
    descent, segment_of, positions = (table.to(device) for table in (layout.descent, layout.segment_of, layout.positions))

    def sees(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        seen = descent[segment_of[query], segment_of[key]] & (key <= query)
        return seen if window is None else seen & (positions[query] - positions[key] < window)

    return sees


@lru_cache(maxsize=2)
def layout_block_mask(layout: Layout, window: int | None, device: torch.device) -> BlockMask:
    """The row's `layout_mask` as a block mask, created once for all layers."""
    sees = layout_mask(layout, window, device)
    blocks = -(-layout.tokens // BLOCK)
    # Behind the row nothing is seen. The index of its last token stands in, so that every index is valid.
    places = torch.arange(blocks * BLOCK, device=device)
    inside, places = places < layout.tokens, places.clamp(max=layout.tokens - 1)
    counts = []
    for start in range(0, blocks, BLOCKS_AT_ONCE):
        rows = slice(start * BLOCK, (start + BLOCKS_AT_ONCE) * BLOCK)
        none = places[:1]  # the batch and the head, which the mask ignores
        seen = sees(none, none, places[rows, None], places) & inside[rows, None] & inside
        counts.append(seen.unflatten(0, (-1, BLOCK)).unflatten(2, (blocks, BLOCK)).sum((1, 3)))
    count = torch.cat(counts)[None, None]
    whole = count == BLOCK * BLOCK
    some = (count > 0) & ~whole
    return BlockMask.from_kv_blocks(
        *_listed(some), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(layout.tokens, layout.tokens)
    )


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many blocks of keys each block of queries uses, and their indices, those first: (1, 1, blocks) and (1, 1, blocks, blocks) int32."""
    order = blocks.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.to(torch.int32)
