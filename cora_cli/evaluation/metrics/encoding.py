"""Embeddings of many texts by one encoder, in batches of like length, on every processor at once.

It knows no metric and tokenizes nothing; `bert-score` does the forward pass.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from bert_score.utils import bert_encode, padding

# On a CPU the activations of a batch should stay in the cache, on a GPU its launches should not be felt.
BATCH_TOKENS_CPU, BATCH_TOKENS_GPU = 512, 16384
# Batches that are ahead of the reader, for each thread: what an early batch costs in memory, against waiting.
_AHEAD = 2


def embeddings(model: Any, token_ids: Sequence[list[int]], pad_token_id: int, device: str) -> Iterator[torch.Tensor]:
    """Last hidden states (tokens, dim) of each text, in the order given, which should be by length: neighbours share a batch.

    On a CPU each thread that torch may use takes batches of its own: one thread is nearly as fast on a batch as all of them are.
    Errors of a thread are raised here; nothing runs on after that, or once the iterator is closed.
    """
    on_cpu = torch.device(device).type == "cpu"
    batches = token_batches(token_ids, BATCH_TOKENS_CPU if on_cpu else BATCH_TOKENS_GPU)
    threads = torch.get_num_threads() if on_cpu else 1
    if threads == 1 or len(batches) < 2 * threads:
        for batch in batches:
            yield from _encode(model, batch, pad_token_id, device)
        return
    # The initializer concerns the pool's own threads alone.
    pool = ThreadPoolExecutor(threads, "encoder", initializer=torch.set_num_threads, initargs=(1,))
    running: deque[Future[list[torch.Tensor]]] = deque()
    try:
        for batch in batches:
            running.append(pool.submit(_encode, model, batch, pad_token_id, device))
            if len(running) > _AHEAD * threads:
                yield from running.popleft().result()
        while running:
            yield from running.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def token_batches(token_ids: Sequence[list[int]], limit: int) -> list[list[list[int]]]:
    """Cut into runs of at most `limit` tokens, padding included; a text that is longer is a batch alone."""
    batches: list[list[list[int]]] = []
    longest = 0
    for ids in token_ids:
        longest = max(longest, len(ids))
        if not batches or (len(batches[-1]) + 1) * longest > limit:
            batches.append([])
            longest = len(ids)
        batches[-1].append(ids)
    return batches


def _encode(model: Any, batch: list[list[int]], pad_token_id: int, device: str) -> list[torch.Tensor]:
    ids, lengths, mask = padding(batch, pad_token_id)
    with torch.inference_mode():
        states = bert_encode(model, ids.to(device), mask.to(device))
        # Copies, so that one text does not keep its whole batch in memory.
        return [state[:length].clone() for state, length in zip(states, lengths.tolist(), strict=True)]
