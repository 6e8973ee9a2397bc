"""BERTScore F1 (Zhang et al. 2020): greedy matching of contextual embeddings, no idf, no rescaling, mean over examples.

Texts are encoded by `bert-score`; the traps that it has under transformers 5 are closed here. Values of two encoders, or of two
layers of one, are different metrics: the signature leads with them.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bert_score.utils import get_bert_embedding, get_model, model2layers
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoModel, AutoTokenizer, GPT2Tokenizer, RobertaTokenizer
from transformers.utils import logging as transformers_logging

from cora_cli import embedded, rundir
from cora_cli.errors import CoraError, reason
from cora_cli.evaluation.metrics.base import Floats, Metric, check_texts, format_signature, package_version
from cora_cli.models import ModelPath, resolve_model

EMBEDDED_ENCODER = "builtin:all-MiniLM-L6-v2"
EMBEDDED_LAYER = 6
PAPER_ENCODER, PAPER_LAYER = "roberta-large", 17
_UNKNOWN_LENGTH = 512
_TOKENIZER_FILES = re.compile(r"tokenizer.*\.json|special_tokens_map\.json|vocab\..*|merges\.txt|.*\.model")


@dataclass(frozen=True)
class Encoder:
    """A model cut after `layer`, in float32, and its tokenizer, which truncates to `max_tokens`."""

    model: Any
    tokenizer: Any
    max_tokens: int
    prefix_space: bool


class BertScore(Metric):
    """Mean BERTScore F1, about 0–1.

    `model` is a hub id or a directory, by default the embedded MiniLM-L6; `layer` is by default the one that `bert-score` found best
    for a model of that name. Nothing is loaded before the first use.
    """

    name = "bertscore_f1"

    def __init__(self, model: str | None = None, layer: int | None = None, device: str = "cpu", batch_size: int = 32) -> None:
        self._model, self._layer = model, layer
        self._device, self._batch_size = device, batch_size

    @cached_property
    def _source(self) -> tuple[ModelPath, int]:
        if self._model is None or self._model == EMBEDDED_ENCODER:
            return ModelPath(EMBEDDED_ENCODER, embedded.encoder_directory(), None), self._layer or EMBEDDED_LAYER
        return resolve_model(self._model), self._layer or recommended_layer(self._model)

    @cached_property
    def _encoder(self) -> Encoder:
        with _quiet_transformers():
            return load_encoder(*self._source, self._device)

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> Floats:
        """F1 of each example: (n, 1). A text without a token scores 0 and stays in the mean; long texts are truncated.

        Raises `CoraError` as `check_texts` does, and where the encoder cannot be had.
        """
        check_texts(predictions, references)
        scores = np.zeros((len(predictions), 1))
        full = [i for i, pair in enumerate(zip(predictions, references, strict=True)) if all(text.strip() for text in pair)]
        # Neighbours in length share a batch, in an order that no hash seed moves.
        full.sort(key=lambda i: (len(predictions[i]) + len(references[i]), i), reverse=True)
        for start in range(0, len(full), self._batch_size):
            batch = full[start : start + self._batch_size]
            embedded_texts = [self._embed([texts[i] for i in batch]) for texts in (predictions, references)]
            scores[batch, 0] = greedy_f1(*embedded_texts).cpu().numpy()
        return scores

    def _embed(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        encoder = self._encoder
        weights: defaultdict[int, float] = defaultdict(lambda: 1.0)
        weights[encoder.tokenizer.sep_token_id] = weights[encoder.tokenizer.cls_token_id] = 0.0
        return get_bert_embedding(texts, encoder.model, encoder.tokenizer, weights, device=self._device)

    def signature(self) -> str:
        """Encoder, layer and content first, then tokens, weighting and versions. Loads the encoder."""
        source, layer = self._source
        encoder = self._encoder
        paper = _model_name(source.reference) == PAPER_ENCODER and layer == PAPER_LAYER
        return format_signature(
            self.name,
            encoder=source.reference if source.revision is None else f"{source.reference.partition('@')[0]}@{source.revision}",
            layer=layer,
            scale=f"{PAPER_ENCODER}-L{PAPER_LAYER}" if paper else f"NOT-{PAPER_ENCODER}-L{PAPER_LAYER}",
            weights=f"sha256-{source.content_hash()[:16]}",
            tokenizer=f"sha256-{_tokenizer_hash(source.path)[:16]}",
            max_tokens=encoder.max_tokens,
            prefix_space="yes" if encoder.prefix_space else "no",
            idf="no",
            rescale="no",
            dtype="fp32",
            aggregate="mean",
            empty=0,
            bert_score=package_version("bert-score"),
            transformers=package_version("transformers"),
            torch=package_version("torch"),
        )


def greedy_f1(
    hypothesis: tuple[torch.Tensor, torch.Tensor, torch.Tensor], reference: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """F1 of greedy matching (BERTScore, section 3): (batch,).

    Each side: embeddings (batch, tokens, dim), mask (batch, tokens), weight of each token (batch, tokens). `bert-score` gives padding a
    similarity of 0, which beats every negative one, so its values depend on the batch; here padding is never matched.
    """
    (hyp, hyp_mask, hyp_weight), (ref, ref_mask, ref_weight) = hypothesis, reference
    similarity = normalize(hyp, dim=-1) @ normalize(ref, dim=-1).transpose(1, 2)
    similarity = similarity.masked_fill(ref_mask[:, None, :] == 0, -2.0).masked_fill(hyp_mask[:, :, None] == 0, -2.0)
    precision = (similarity.amax(dim=2) * hyp_weight.to(similarity)).sum(dim=1) / hyp_weight.to(similarity).sum(dim=1)
    recall = (similarity.amax(dim=1) * ref_weight.to(similarity)).sum(dim=1) / ref_weight.to(similarity).sum(dim=1)
    # A text of nothing but control characters has no token and a weight of 0.
    return (2 * precision * recall / (precision + recall)).nan_to_num(0.0, 0.0, 0.0)


def recommended_layer(reference: str) -> int:
    """The layer that `bert-score` found to agree best with people, by the model's name.

    Raises `CoraError` where it has none for that name.
    """
    hub_id, name = reference.partition("@")[0], _model_name(reference)
    layer = model2layers.get(hub_id, model2layers.get(name))
    if layer is None:
        raise CoraError(
            f"bert-score names no layer for encoder {reference!r}; give the layer yourself, or use {PAPER_ENCODER} "
            f"(layer {PAPER_LAYER}) or the embedded default"
        )
    return layer


def load_encoder(source: ModelPath, layer: int, device: str) -> Encoder:
    """Load an encoder, cut it after `layer` transformer layers, and bound its tokenizer.

    Raises `CoraError` where it cannot be loaded, lacks weights, or has fewer layers.
    """
    try:
        config = AutoConfig.from_pretrained(source.path)
        model, report = AutoModel.from_pretrained(source.path, dtype=torch.float32, weights_only=True, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(source.path)
        # bert-score wants a space before the first word, but tokenizers have ignored that argument of `encode` since transformers 5.
        prefix_space = isinstance(tokenizer, GPT2Tokenizer | RobertaTokenizer)
        if prefix_space:
            tokenizer = AutoTokenizer.from_pretrained(source.path, add_prefix_space=True)
    except Exception as error:  # transformers and safetensors raise unrelated types for damaged files
        raise CoraError(f"encoder {source.reference} cannot be loaded: {reason(error)}") from error
    # The pooler sits behind the last layer and is not used; many checkpoints have none.
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise CoraError(
            f"encoder {source.reference} lacks {len(missing)} weights that its config.json promises, such as {missing[0]}"
        )
    layers = getattr(config, "num_hidden_layers", layer)
    if not 1 <= layer <= layers:
        raise CoraError(f"encoder {source.reference} has {layers} layers, so layer {layer} cannot be taken")
    stack = getattr(getattr(model, "encoder", None), "layer", None)
    if stack is None:
        # Not called for the others: it takes every path that contains "t5" for a T5 model.
        model = get_model(str(source.path), layer).float()
    else:
        del stack[layer:]
    tokenizer.model_max_length = max_tokens = longest_input(model, config, tokenizer)
    return Encoder(model.eval().to(device), tokenizer, max_tokens, prefix_space)


def longest_input(model: Any, config: Any, tokenizer: Any) -> int:
    """How many tokens, special ones included, the encoder has positions for; the tokenizer's own limit where that is lower."""
    positions = getattr(config, "max_position_embeddings", None) or _UNKNOWN_LENGTH
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    if padding is not None:  # RoBERTa counts positions from the one after the padding's
        positions -= padding + 1
    return int(min(positions, tokenizer.model_max_length))


def _model_name(reference: str) -> str:
    return reference.partition("@")[0].rstrip("/").rpartition("/")[2]


def _tokenizer_hash(directory: Path) -> str:
    return rundir.sha256_files(file for file in directory.iterdir() if _TOKENIZER_FILES.fullmatch(file.name))


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No bar and no table of unused weights: dropping the head of an encoder is what is meant to happen."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
