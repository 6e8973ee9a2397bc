"""Decoding of many prompts, greedy or sampled, with continuous batching: when a row ends, a waiting prompt takes its place.

Prefixes that several prompts share are computed once. Every layer must be full attention; for other models `unsupported` gives
the reason, and `generate` falls back to transformers.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from cora_cli.evaluation.sampling import Sampling, best_tokens
from cora_cli.models.configuration import depends_on_batch, rope_switch

WAVE = 4
"""Prompts per wave, as a multiple of the batch size: see `PooledDecoder`."""
GROWTH = 64
"""Number of positions by which the cache grows."""
PREFILL_TOKENS = 1024
"""Maximum tokens of one prefill, padding included: more tokens need more memory and no longer fit the processor's caches."""
PASS_COST = 32
"""Overhead of one more forward pass, in tokens: a shared prefix must save more than this."""
MOST_BRANCHINGS = 16
"""Maximum depth in the prefix tree, in branchings, at which shared prefixes are searched."""
Tokens = Sequence[int]


def unsupported(model: Any, longest: int) -> str | None:
    """Why the pool does not support `model` with sequences of up to `longest` tokens; None if it does."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = inner.config.get_text_config(decoder=True)
    if config.is_encoder_decoder or not inner._supports_attention_backend or config._attn_implementation != "sdpa":
        return "its attention accepts no custom mask"
    if depends_on_batch(config):
        return "its attention depends on the length of the batch"
    missing = {"position_ids", "past_key_values"} - set(inspect.signature(inner.forward).parameters)
    if missing:
        return f"its forward pass has no argument {min(missing)}"
    for layer in DynamicCache(config=config).layers:
        within = type(layer) is DynamicSlidingWindowLayer and layer.sliding_window >= longest
        if not (type(layer) is DynamicLayer or within):
            return f"it has a layer other than full attention ({type(layer).__name__})"
    switch = rope_switch(config)
    if switch is not None and longest > switch:
        return f"its rotary embedding depends on the longest sequence of the batch above {switch} tokens"
    return None


def shared_prefixes(prompts: Sequence[Tokens]) -> list[int]:
    """Length in tokens of the prefix of each prompt to compute once and share; 0 where sharing saves nothing.

    A group of n prompts that shares d tokens saves (n − 1)·d tokens for one more forward pass. Among the groups in a prefix
    tree of the prompts, the choice with the largest total saving is returned. The last token of a prompt is never shared,
    because decoding starts from it.
    """
    lengths = [0] * len(prompts)
    shareable = [(list(prompt[:-1]), index) for index, prompt in enumerate(prompts)]
    # After sorting, the prompts below each node of the tree are adjacent.
    _split([(index, tokens) for tokens, index in sorted(shareable)], lengths)
    return lengths


def _split(members: list[tuple[int, Tokens]], lengths: list[int], branchings: int = 0) -> int:
    """Fill `lengths` for one node of the prefix tree and all nodes below it; returns the number of tokens saved."""
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

    The next forward pass uses the rows `first` to `first + len(positions)` and writes its tokens at `positions`
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
        """Set where the next forward pass writes: at `positions` (rows, tokens), all below `length`, from row `first` on."""
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
        """Copy `states`, as returned by `read`, to the first positions of rows `first` to `end`.

        The pool must already be long enough.
        """
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
        """Allocate empty tensors with the head counts, dtype and device of the first states."""
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
        """Store keys and values (rows, key_value_heads, tokens, head_dim); returns views of all positions of these rows."""
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
        """Number of positions before the tokens of this pass, in the longest row."""
        return self.pool.length - self.pool.positions.shape[1]

    def get_max_length(self) -> int:
        """No limit."""
        return -1


@dataclasses.dataclass
class Row:
    """One prompt that is being decoded: its index in the wave, its tokens so far, its prompt length in tokens, and its stream of draws."""

    index: int
    tokens: list[int]
    prompt_length: int
    stream: str = ""


class PooledDecoder:
    """Decodes waves of prompts with a pool of `batch_size` rows.

    Within a wave, the next prompt replaces a row that ended. Which rows are computed together, and so the last bits of every
    number, depends only on the prompts of the wave. An interrupted wave is therefore repeated completely. State: one
    `PoolCache`, and the keys and values of every shared prefix.
    """

    name = "pool"

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Tokens],
        ends: Iterable[int],
        batch_size: int,
        max_new_tokens: int,
        sampling: Sampling | None = None,
    ) -> None:
        self._model, self._ends, self._sampling = model, frozenset(ends), sampling
        # Without the head: prefill needs no logits, and the head is a third of a small model's computation.
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
    def answer(self, wave: Sequence[Tokens], finished: Callable[[], None], streams: Sequence[str] = ()) -> list[list[int]]:
        """The new tokens of every prompt of `wave`, with the end token if there is one; calls `finished` once per prompt.

        With `sampling`, `streams` names the draws of each prompt (`Sampling.choose`).
        """
        streams = streams or [""] * len(wave)
        answers: list[list[int]] = [[] for _ in wave]
        waiting = list(range(len(wave)))
        active: list[Row] = []
        for prefix in dict.fromkeys(self._prefix_of[tuple(prompt)] for prompt in wave):
            self._compute_prefix(prefix)
        while waiting or active:
            free = self._pool.rows - len(active)
            if waiting and (not active or free >= min(len(waiting), max(1, self._rows // 8))):
                entering, waiting = waiting[:free], waiting[free:]
                active += self._admit(
                    len(active), [Row(index, list(wave[index]), len(wave[index]), streams[index]) for index in entering]
                )
            for row, token in zip(active, self._next_tokens(active), strict=True):
                row.tokens.append(token)
            ended = [number for number, row in enumerate(active) if self._has_ended(row)]
            for number in ended:
                answers[active[number].index] = active[number].tokens[active[number].prompt_length :]
                finished()
            active = self._compact_rows(active, ended)
        return answers

    @torch.inference_mode()
    def logits(self, prompts: Sequence[Tokens], following: Sequence[Tokens]) -> list[torch.Tensor]:
        """What `answer` chooses from in its first steps, where the tokens `following` are chosen: (steps, vocabulary) each.

        The pool must have a row for every prompt.
        """
        rows = [Row(index, list(prompt), len(prompt)) for index, prompt in enumerate(prompts)]
        for prefix in dict.fromkeys(self._prefix_of[tuple(prompt)] for prompt in prompts):
            self._compute_prefix(prefix)
        active = self._admit(0, list(rows))
        steps = []
        for step in zip(*following, strict=True):
            by_place = self._last_logits(active)
            steps.append({row.index: logits for row, logits in zip(active, by_place, strict=True)})
            for row, token in zip(rows, step, strict=True):
                row.tokens.append(token)
        return [torch.stack([step[index] for step in steps]) for index in range(len(rows))]

    def _has_ended(self, row: Row) -> bool:
        return row.tokens[-1] in self._ends or len(row.tokens) - row.prompt_length == self._max_new_tokens

    def _next_tokens(self, active: list[Row]) -> list[int]:
        """Run the last token of every row, and choose the most likely next token, or draw one."""
        logits = self._last_logits(active)
        if self._sampling is not None:
            places = [len(row.tokens) - row.prompt_length for row in active]
            return self._sampling.choose(logits, [row.stream for row in active], places)
        return best_tokens(logits)

    def _last_logits(self, active: list[Row]) -> torch.Tensor:
        """Run the last token of every row: (rows, vocabulary)."""
        starts = [len(row.tokens) - 1 for row in active]
        output = self._forward(self._model, 0, [row.tokens[-1:] for row in active], starts, max(starts) + 1)
        last: torch.Tensor = output.logits[:, -1]
        return last

    def _compute_prefix(self, prefix: tuple[int, ...]) -> None:
        """Compute a shared prefix alone in an empty pool, so that it does not depend on the wave that needs it first."""
        if prefix and prefix not in self._states:
            self._forward(self._decoder, 0, [prefix], [0], len(prefix))
            self._states[prefix] = self._pool.read(0, len(prefix))

    def _admit(self, first: int, rows: list[Row]) -> list[Row]:
        """Prefill all but the last token of new rows. They occupy the pool from row `first` on, in the returned order."""
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
        """Run `part` of the model on the rows from `first` on; each row's `tokens` begin at its position in `starts`.

        Rows are padded on the right. Padding writes only beyond the end of its row, where no query of the row attends, and the
        row's later tokens overwrite it. All positions are below `length`.
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

    def _compact_rows(self, active: list[Row], ended: list[int]) -> list[Row]:
        """Move the last rows of the pool into the places of rows that ended."""
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
