"""Embeddings of many texts from one encoder, in batches of similar length, on all CPU cores in parallel.

`bert-score` does the forward pass; texts must already be tokenized.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from bert_score.utils import bert_encode, padding

# On a CPU the activations of a batch should fit the cache; on a GPU a batch should be large compared with launch overhead.
BATCH_TOKENS_CPU, BATCH_TOKENS_GPU = 512, 16384
# Batches per thread computed ahead of the reader: more need memory, fewer make threads wait.
_AHEAD = 2


def embeddings(model: Any, token_ids: Sequence[list[int]], pad_token_id: int, device: str) -> Iterator[torch.Tensor]:
    """Yield the last hidden states (tokens, dim) of each text, in the given order. Texts should be sorted by length.

    On a CPU, each torch thread processes its own batches, because one thread is nearly as fast on one batch as all threads
    together. An error in a thread is raised here. After an error, or when the iterator is closed, the remaining batches are
    cancelled.
    """
    on_cpu = torch.device(device).type == "cpu"
    batches = token_batches(token_ids, BATCH_TOKENS_CPU if on_cpu else BATCH_TOKENS_GPU)
    threads = torch.get_num_threads() if on_cpu else 1
    if threads == 1 or len(batches) < 2 * threads:
        for batch in batches:
            yield from _encode(model, batch, pad_token_id, device)
        return
    # The initializer affects only the threads of this pool.
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
    """Split into batches of at most `limit` tokens, padding included; a longer text is a batch on its own."""
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
