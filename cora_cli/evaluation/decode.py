"""Greedy decoding of many prompts at once by a model's plain forward pass: rows that end leave, waiting prompts enter.

What several prompts begin with is computed once for all of them. It serves models whose every layer is ordinary attention; for
the others `unsupported` says why, and `generate` asks transformers instead. It reads and writes no files.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

WAVE = 4
"""Prompts per wave, in units of the batch size: see `PooledDecoder`."""
GROWTH = 64
"""Positions by which the cache grows."""
PREFILL_TOKENS = 1024
"""Most tokens, padding included, of one prefill: more only leave the processor's caches, and need memory."""
PASS_COST = 32
"""What one more forward pass costs beside its own tokens, in tokens: a shared beginning must save more than that."""
MOST_BRANCHINGS = 16
"""How deep in the tree of prompts a shared beginning is looked for."""
LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})
"""Rotary embeddings that change with the longest row of a batch, so that the batch would change the answer."""

Tokens = Sequence[int]


def unsupported(model: Any, longest: int) -> str | None:
    """Why the pool cannot serve `model` on sequences of up to `longest` tokens; None where it can."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = inner.config.get_text_config(decoder=True)
    if config.is_encoder_decoder or not inner._supports_attention_backend or config._attn_implementation != "sdpa":
        return "its attention takes no mask from outside"
    missing = {"position_ids", "past_key_values"} - set(inspect.signature(inner.forward).parameters)
    if missing:
        return f"it takes no {min(missing)}"
    for layer in DynamicCache(config=config).layers:
        within = type(layer) is DynamicSlidingWindowLayer and layer.sliding_window >= longest
        if not (type(layer) is DynamicLayer or within):
            return f"it has a layer of another kind than full attention ({type(layer).__name__})"
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {str(parameters.get("rope_type")) for parameters in (rope, *rope.values()) if isinstance(parameters, dict)}
    if changing := kinds & LENGTH_DEPENDENT_ROPE:
        return f"its {min(changing)} rotary embedding depends on the longest row"
    return None


def shared_prefixes(prompts: Sequence[Tokens]) -> list[int]:
    """How many first tokens of each prompt are best computed once for all prompts that begin with them; 0: none.

    A group of n prompts that shares d tokens saves (n − 1)·d tokens for one more forward pass. Of all groups that a prefix tree
    of the prompts allows, those are taken that save most in total. A prompt's last token is never shared: it is decoded.
    """
    lengths = [0] * len(prompts)
    shareable = [(list(prompt[:-1]), index) for index, prompt in enumerate(prompts)]
    # Sorted, the prompts below any node of the tree lie side by side.
    _split([(index, tokens) for tokens, index in sorted(shareable)], lengths)
    return lengths


def _split(members: list[tuple[int, Tokens]], lengths: list[int], branchings: int = 0) -> int:
    """Fill `lengths` for one node of the prefix tree and everything below; returns the tokens saved."""
    if len(members) < 2:
        return 0
    first, last = members[0][1], members[-1][1]
    depth = next((place for place, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    together = (len(members) - 1) * depth - PASS_COST
    apart = 0
    if depth < len(last) and branchings < MOST_BRANCHINGS:
        children = groupby(members, lambda member: tuple(member[1][depth : depth + 1]))
        apart = sum([_split(list(child), lengths, branchings + 1) for _, child in children])
    if together < max(apart, 1):
        return apart
    for index, _ in members:
        lengths[index] = depth
    return together


class PoolCache(Cache):
    """Keys and values of a pool of rows, (rows, key_value_heads, capacity, head_dim) per layer, written in place.

    The next forward pass takes the rows `first` to `first + len(positions)` and writes its tokens at `positions`
    (rows, tokens). Memory: 2 · layers · rows · key_value_heads · head_dim numbers for each position of the longest row, rounded
    up to `GROWTH` positions.
    """

    def __init__(self, layers: int, rows: int) -> None:
        self._own = [PoolLayer(self) for _ in range(layers)]
        super().__init__(layers=list(self._own))
        self.rows = rows
        self.first = 0
        self.positions = torch.empty(0, 0, dtype=torch.long)
        self.length = 0

    def place(self, first: int, positions: torch.Tensor, length: int) -> None:
        """Say where the next forward pass writes: at `positions` (rows, tokens), all below `length`, from row `first` on."""
        self.first, self.positions, self.length = first, positions, length
        self.indices = torch.arange(first, first + len(positions), device=positions.device)[:, None]

    def move(self, sources: list[int], targets: list[int], length: int) -> None:
        """Copy the first `length` positions of rows `sources` over those of rows `targets`."""
        for layer in self._own:
            for tensor in (layer.keys, layer.values):
                tensor[targets, :, :length] = tensor[sources, :, :length]

    def read(self, row: int, length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Copies of keys and values of the first `length` positions of a row, (key_value_heads, length, head_dim) per layer."""
        return [(layer.keys[row, :, :length].clone(), layer.values[row, :, :length].clone()) for layer in self._own]

    def write(self, first: int, end: int, states: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Begin the rows `first` to `end` with what `read` of this pool returned: room for it is there."""
        for layer, (keys, values) in zip(self._own, states, strict=True):
            layer.keys[first:end, :, : keys.shape[-2]] = keys
            layer.values[first:end, :, : keys.shape[-2]] = values


class PoolLayer(CacheLayerMixin):
    """One layer of a `PoolCache`."""

    keys: Any
    values: Any

    def __init__(self, pool: PoolCache) -> None:
        super().__init__()
        self.pool = pool

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take head counts, dtype and device from the first states."""
        self.keys = key_states.new_zeros(self.pool.rows, key_states.shape[1], 0, key_states.shape[3])
        self.values = value_states.new_zeros(self.pool.rows, value_states.shape[1], 0, value_states.shape[3])
        self.is_initialized = True

    def grow(self, length: int) -> None:
        """Make room for `length` positions. New ones are zero: a masked NaN would still reach the sum."""
        more = length - self.keys.shape[2]
        if more > 0:
            padding = (0, 0, 0, -(-more // GROWTH) * GROWTH)
            self.keys, self.values = (torch.nn.functional.pad(tensor, padding) for tensor in (self.keys, self.values))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store (rows, key_value_heads, tokens, head_dim); returns views of all that the rows may look at."""
        pool = self.pool
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.grow(pool.length)
        self.keys[pool.indices, :, pool.positions] = key_states.transpose(1, 2)
        self.values[pool.indices, :, pool.positions] = value_states.transpose(1, 2)
        rows = slice(pool.first, pool.first + len(pool.positions))
        return self.keys[rows, :, : pool.length], self.values[rows, :, : pool.length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys."""
        return self.pool.length, 0

    def get_seq_length(self) -> int:
        """Positions before the tokens of this pass, in the longest row."""
        return self.pool.length - self.pool.positions.shape[1]

    def get_max_length(self) -> int:
        """No limit."""
        return -1


@dataclasses.dataclass
class Row:
    """One prompt that is being answered: which of its wave it is, its tokens so far, and how many of them were given."""

    index: int
    tokens: list[int]
    prompt_length: int


class PooledDecoder:
    """Answers waves of prompts with a pool of `batch_size` rows.

    In a wave a row that ended makes place for the next prompt, so that what is computed together, and with it the last bits of
    every number, depends on the prompts of that wave and on nothing else. A wave that was interrupted is answered again as
    a whole. State: one `PoolCache` and the keys and values of every shared beginning.
    """

    name = "pool"

    def __init__(
        self, model: Any, prompts: Sequence[Tokens], ends: Iterable[int], batch_size: int, max_new_tokens: int
    ) -> None:
        self._model, self._ends = model, frozenset(ends)
        # Below the head: logits of a prompt's inner tokens are of no use, and the head is a third of a small model's work.
        self._decoder = (model.get_base_model() if hasattr(model, "get_base_model") else model).get_decoder()
        self._rows, self._max_new_tokens = batch_size, max_new_tokens
        self.wave = WAVE * batch_size
        config = model.config.get_text_config(decoder=True)
        self._pool = PoolCache(len(DynamicCache(config=config).layers), min(batch_size, len(prompts)))
        self._prefix_of = {
            tuple(prompt): tuple(prompt[:length]) for prompt, length in zip(prompts, shared_prefixes(prompts), strict=True)
        }
        self._states: dict[tuple[int, ...], list[tuple[torch.Tensor, torch.Tensor]]] = {}

    @torch.inference_mode()
    def answer(self, wave: Sequence[Tokens], finished: Callable[[], None]) -> list[list[int]]:
        """The new tokens of every prompt of `wave`, each list with its end token if it came; `finished` is called for each."""
        answers: list[list[int]] = [[] for _ in wave]
        waiting = list(range(len(wave)))
        active: list[Row] = []
        for prefix in dict.fromkeys(self._prefix_of[tuple(prompt)] for prompt in wave):
            self._compute_prefix(prefix)
        while waiting or active:
            free = self._pool.rows - len(active)
            if waiting and (not active or free >= min(len(waiting), max(1, self._rows // 8))):
                entering, waiting = waiting[:free], waiting[free:]
                active += self._admit(len(active), [Row(index, list(wave[index]), len(wave[index])) for index in entering])
            for row, token in zip(active, self._next_tokens(active), strict=True):
                row.tokens.append(token)
            ended = [number for number, row in enumerate(active) if self._has_ended(row)]
            for number in ended:
                answers[active[number].index] = active[number].tokens[active[number].prompt_length :]
                finished()
            active = self._close_ranks(active, ended)
        return answers

    def _has_ended(self, row: Row) -> bool:
        return row.tokens[-1] in self._ends or len(row.tokens) - row.prompt_length == self._max_new_tokens

    def _next_tokens(self, active: list[Row]) -> list[int]:
        """Feed the last token of every row, and choose the next one."""
        starts = [len(row.tokens) - 1 for row in active]
        output = self._forward(self._model, 0, [row.tokens[-1:] for row in active], starts, max(starts) + 1)
        chosen: list[int] = output.logits[:, -1].float().argmax(dim=-1).tolist()
        return chosen

    def _compute_prefix(self, prefix: tuple[int, ...]) -> None:
        """Always alone and in row 0 of an empty pool, so that it is the same in whichever wave it is met first."""
        if prefix and prefix not in self._states:
            self._forward(self._decoder, 0, [prefix], [0], len(prefix))
            self._states[prefix] = self._pool.read(0, len(prefix))

    def _admit(self, first: int, rows: list[Row]) -> list[Row]:
        """Compute all but the last token of new rows, which take the places from `first` on in the order that is returned."""
        prefixes = {row.index: self._prefix_of[tuple(row.tokens)] for row in rows}
        rows.sort(key=lambda row: (len(prefixes[row.index]), prefixes[row.index], -row.prompt_length, row.index))
        place = first
        for prefix, members in groupby(rows, lambda row: prefixes[row.index]):
            end = place + len(list(members))
            if prefix:
                self._pool.write(place, end, self._states[prefix])
            place = end
        longest = max(row.prompt_length for row in rows)
        rests = [row.tokens[len(prefixes[row.index]) : -1] for row in rows]
        step = max(1, PREFILL_TOKENS // max(1, *map(len, rests)))
        for start in range(0, len(rows), step):
            starts = [len(prefixes[row.index]) for row in rows[start : start + step]]
            if any(rests[start : start + step]):
                self._forward(self._decoder, first + start, rests[start : start + step], starts, longest)
        return rows

    def _forward(self, part: Any, first: int, tokens: Sequence[Tokens], starts: list[int], length: int) -> Any:
        """Run the rows from `first` on through `part` of the model, each with its `tokens` from its position in `starts` on.

        Rows are padded on the right: what padding writes lies beyond the row's end, is seen by no query of the row, and is
        overwritten as the row gets there. No position reaches `length`.
        """
        device = self._model.device
        width = max(map(len, tokens))
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in tokens], device=device)
        positions = torch.tensor(starts, device=device)[:, None] + torch.arange(width, device=device)
        positions = positions.clamp(max=length - 1)
        length = min(length, max(starts) + width)
        self._pool.place(first, positions, length)
        alike = positions[:1] if len(set(starts)) == 1 else positions
        mask = torch.arange(length, device=device) <= alike[:, None, :, None]
        return part(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=self._pool, use_cache=True)

    def _close_ranks(self, active: list[Row], ended: list[int]) -> list[Row]:
        """Move the last rows of the pool to the places of those that ended."""
        if not ended:
            return active
        left = len(active) - len(ended)
        targets = [number for number in ended if number < left]
        sources = [number for number in range(left, len(active)) if number not in set(ended)]
        if targets:
            self._pool.move(sources, targets, max(len(active[number].tokens) for number in sources))
        for source, target in zip(sources, targets, strict=True):
            active[target] = active[source]
        return active[:left]
