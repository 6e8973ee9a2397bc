"""BERTScore F1 (Zhang et al. 2020): greedy matching of contextual embeddings, no idf, no rescaling, mean over examples.

Texts are encoded by `bert-score`, with workarounds for its problems under transformers 5. Values from different encoders or
layers are not comparable, so the signature starts with both.
"""

import platform
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bert_score.utils import get_model, model2layers, sent_encode
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModel, AutoTokenizer, GPT2Tokenizer, RobertaTokenizer
from transformers.utils import logging as transformers_logging

from cora_cli import embedded, hashing
from cora_cli.data.encode import check_rows
from cora_cli.errors import CoraError, is_out_of_memory, reason
from cora_cli.evaluation.metrics import reference_cache
from cora_cli.evaluation.metrics.base import Floats, StreamingMetric, check_texts, format_signature, package_version
from cora_cli.evaluation.metrics.encoding import embeddings
from cora_cli.models.checkpoint import finite
from cora_cli.models.model_path import ModelPath
from cora_cli.models.references import resolve_model
from cora_cli.progress import note

EMBEDDED_ENCODER = "builtin:all-MiniLM-L6-v2"
EMBEDDED_LAYER = 6
PAPER_ENCODER, PAPER_LAYER = "roberta-large", 17
_UNKNOWN_LENGTH = 512
# Tokens on one side of a batch of pairs: enough to keep a GPU busy, about 25 MB at 768 dimensions.
_MATCHED_TOKENS = 8192
_EVALUATE_BATCH = 64
_TOKENIZER_FILES = re.compile(r"tokenizer.*\.json|special_tokens_map\.json|vocab\..*|merges\.txt|.*\.model")


@dataclass(frozen=True)
class Encoder:
    """A float32 model without the layers after `layer`, and its tokenizer, which truncates to `max_tokens`; `pad` has a row in its embedding."""

    model: Any
    tokenizer: Any
    pad: int
    max_tokens: int
    prefix_space: bool


class BertScore(StreamingMetric):
    """Mean BERTScore F1, about 0–1.

    `model` is a hub id or a directory, by default the embedded MiniLM-L6. `layer` is by default the one that `bert-score`
    recommends for a model of that name. The model is loaded on first use.
    """

    name = "bertscore_f1"
    blind_spot = "consist wholly or mostly of tokens that the BERTScore encoder does not know, so that it takes all such texts for much the same"

    def __init__(
        self, model: str | None = None, layer: int | None = None, device: str = "cpu", as_evaluate: bool = False
    ) -> None:
        self._model, self._layer, self._device, self._as_evaluate = model, layer, device, as_evaluate

    def fetch(self) -> None:
        """See `Metric.fetch`: the encoder's files."""
        _ = self._source

    @cached_property
    def _source(self) -> tuple[ModelPath, int]:
        if self._model is None or self._model == EMBEDDED_ENCODER:
            return ModelPath(EMBEDDED_ENCODER, embedded.encoder_directory(), None), self._layer or EMBEDDED_LAYER
        return resolve_model(self._model), self._layer or recommended_layer(self._model)

    @cached_property
    def _encoder(self) -> Encoder:
        with _quiet_transformers():
            return load_encoder(*self._source, self._device)

    def stream(self, predictions: Sequence[str], references: Sequence[str]) -> Iterator[tuple[list[int], Floats]]:
        """Yield indices of examples and their F1 (m, 1). An empty text scores 0; long texts are truncated.

        Each distinct text is encoded once, in order of length, and an example is scored when the longer of its two texts is
        encoded. This keeps padding small, and only the shorter embeddings are kept in memory. References share no batch with
        predictions, whose length would move their last digits, so that their embeddings can be kept in `reference_cache`. Raises
        `CoraError` as `check_texts` does, and if the encoder cannot be loaded.
        """
        check_texts(predictions, references)
        pairs = list(zip(predictions, references, strict=True))
        empty = {i for i, pair in enumerate(pairs) if not all(text.strip() for text in pair)}
        if empty:
            yield sorted(empty), np.zeros((len(empty), 1))
        uses = Counter(text for i, pair in enumerate(pairs) if i not in empty for text in pair)
        if not uses:
            return
        encoder = self._encoder
        expected = {text for text in references if text.strip()}
        tokens = {text: sent_encode(encoder.tokenizer, text) for text in uses.keys() | expected}
        for ids in tokens.values():
            check_rows(ids, _rows(encoder.model), f"encoder {self._source[0].reference}", encoder.tokenizer)
        cut = {
            text
            for text, ids in tokens.items()
            if len(ids) >= encoder.max_tokens and _is_cut(text, len(ids), encoder.tokenizer)
        }
        if count := sum(not cut.isdisjoint(pair) for pair in pairs):
            note(
                f"BERTScore: {count} of {len(pairs)} examples have a text of more than the {encoder.max_tokens} tokens that the encoder takes; what comes "
                "after them is not compared"
            )
        control = encoder.tokenizer.all_special_tokens
        spelled = {text: token for text in tokens if (token := next((one for one in control if one in text), None))}
        if found := [token for pair in pairs if (token := spelled.get(pair[0], spelled.get(pair[1])))]:
            note(
                f"BERTScore: {len(found)} of {len(pairs)} examples have a text that spells a control token of the encoder, such as {found[0]}, which it "
                "takes for the token itself, as bert-score does"
            )
        padded = self._padded_by_evaluate(pairs, tokens) if self._as_evaluate else None
        # Texts of equal length are sorted by content, so that the order does not depend on the hash seed.
        texts = sorted(tokens, key=lambda text: (len(tokens[text]), text))
        place = {text: position for position, text in enumerate(texts)}
        due: defaultdict[str, list[int]] = defaultdict(list)
        for i, pair in enumerate(pairs):
            if i not in empty:
                due[max(pair, key=place.__getitem__)].append(i)
        known: dict[str, torch.Tensor] = {}
        group: list[int] = []
        of_references = self._of_references([text for text in texts if text in expected], tokens)
        of_predictions = self._encode([tokens[text] for text in texts if text not in expected])
        for text in texts:
            embedding = next(of_references if text in expected else of_predictions)
            if text in uses:  # the only predictions for other references are empty
                known[text] = embedding
            group += due[text]
            while group and (text == texts[-1] or len(group) * len(tokens[text]) >= _MATCHED_TOKENS):
                size = max(1, _MATCHED_TOKENS // len(tokens[text]))
                matched, group = group[:size], group[size:]
                sides = [self._padded([pairs[i][side] for i in matched], known, tokens) for side in (0, 1)]
                f1 = greedy_f1(sides[0], sides[1], padded[matched].to(self._device) if padded is not None else None)
                yield matched, f1.cpu().numpy().astype(np.float64)[:, None]
                for done in (text for i in matched for text in pairs[i]):
                    uses[done] -= 1
                    if not uses[done]:
                        del known[done]

    def _encode(self, token_ids: list[list[int]]) -> Iterator[torch.Tensor]:
        return embeddings(self._encoder.model, token_ids, self._encoder.pad, self._device)

    def _of_references(self, texts: list[str], tokens: dict[str, list[int]]) -> Iterator[torch.Tensor]:
        """The embeddings of the references, in the order given: kept ones, or new ones, which are kept if they are not too large."""
        ids = [tokens[text] for text in texts]
        lengths, width = [len(one) for one in ids], self._encoder.model.config.hidden_size
        if not reference_cache.fits(lengths, width):
            yield from self._encode(ids)
            return
        on_gpu = torch.device(self._device).type == "cuda"
        processor = torch.cuda.get_device_name(self._device) if on_gpu else torch.backends.cpu.get_cpu_capability()
        made_by = [self.signature(), self._device, processor, torch.get_num_threads(), platform.machine()]
        key = hashing.sha256_json([made_by, texts])
        if (found := reference_cache.read(key, lengths, width)) is not None:
            yield from (embedding.to(self._device) for embedding in found)
            return
        new = []
        for embedding in self._encode(ids):
            new.append(embedding)
            if len(new) == len(ids):
                reference_cache.write(key, new)
            yield embedding

    def _padded_by_evaluate(self, pairs: list[tuple[str, str]], tokens: dict[str, list[int]]) -> torch.Tensor:
        """Whether `bert-score` pads the prediction and the reference of each pair in its batches of 64, in the order given: (n, 2)."""
        others = {text for pair in pairs for text in pair if text.strip()} - tokens.keys()
        lengths = {text: len(ids) for text, ids in tokens.items()}
        lengths |= {text: len(sent_encode(self._encoder.tokenizer, text)) for text in others}
        counts = torch.tensor([[lengths.get(text, 0) for text in pair] for pair in pairs])
        return torch.cat([batch < batch.amax(dim=0) for batch in counts.split(_EVALUATE_BATCH)])

    def _padded(
        self, texts: list[str], known: dict[str, torch.Tensor], tokens: dict[str, list[int]]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One side of the input of `greedy_f1`; special tokens at both ends can be matched but have weight 0."""
        tokenizer = self._encoder.tokenizer
        ids = pad_sequence([torch.tensor(tokens[text]) for text in texts], batch_first=True, padding_value=-1).to(self._device)
        special = torch.tensor([-1, *(i for i in (tokenizer.cls_token_id, tokenizer.sep_token_id) if i is not None)])
        weight = ~torch.isin(ids, special.to(self._device))
        return pad_sequence([known[text] for text in texts], batch_first=True), ids != -1, weight

    def unscorable(self, references: Sequence[str]) -> int:
        """References of which more than half of the tokens are unknown to the encoder, and empty ones."""
        tokenizer = self._encoder.tokenizer
        framing = {tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
        texts = [text for text in references if text.strip()]
        own = [[token for token in sent_encode(tokenizer, text) if token not in framing] for text in texts]
        unknown = sum(2 * tokens.count(tokenizer.unk_token_id) > len(tokens) or not tokens for tokens in own)
        return len(references) - len(texts) + unknown

    def signature(self) -> str:
        """Encoder, layer and content hash first, then tokenization, weighting and versions. Loads the encoder."""
        source, layer = self._source
        encoder = self._encoder
        paper = _model_name(source.reference) == PAPER_ENCODER and layer == PAPER_LAYER
        return format_signature(
            self.name,
            self._as_evaluate,
            encoder=source.reference if source.revision is None else f"{source.reference.partition('@')[0]}@{source.revision}",
            layer=layer,
            scale=f"{PAPER_ENCODER}-L{PAPER_LAYER}" if paper else f"NOT-{PAPER_ENCODER}-L{PAPER_LAYER}",
            weights=f"sha256-{source.content_hash()[:16]}",
            tokenizer=f"sha256-{_tokenizer_hash(source.path)[:16]}",
            max_tokens=encoder.max_tokens,
            prefix_space="yes" if encoder.prefix_space else "no",
            idf="no",
            rescale="no",
            **({"padding": f"0-in-batches-of-{_EVALUATE_BATCH}"} if self._as_evaluate else {}),
            dtype="fp32",
            aggregate="mean",
            empty=0,
            bert_score=package_version("bert-score"),
            transformers=package_version("transformers"),
            torch=package_version("torch"),
        )


def greedy_f1(
    hypothesis: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    reference: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    padded: torch.Tensor | None = None,
) -> torch.Tensor:
    """F1 of greedy matching (BERTScore, section 3): (batch,).

    Each side is embeddings (batch, tokens, dim), mask (batch, tokens) and token weights (batch, tokens). In `bert-score`,
    padding has a similarity of 0, which exceeds every negative one, so its values depend on the batch. Here padding is never
    matched, unless `padded` (batch, 2) says which hypotheses and references have some to match.
    """
    (hyp, hyp_mask, hyp_weight), (ref, ref_mask, ref_weight) = hypothesis, reference
    similarity = normalize(hyp, dim=-1) @ normalize(ref, dim=-1).transpose(1, 2)
    similarity = similarity.masked_fill(ref_mask[:, None, :] == 0, -2.0).masked_fill(hyp_mask[:, :, None] == 0, -2.0)
    best_of_hyp, best_of_ref = similarity.amax(dim=2), similarity.amax(dim=1)
    if padded is not None:
        best_of_hyp = torch.where(padded[:, 1:], best_of_hyp.clamp_min(0.0), best_of_hyp)
        best_of_ref = torch.where(padded[:, :1], best_of_ref.clamp_min(0.0), best_of_ref)
    precision = (best_of_hyp * hyp_weight.to(similarity)).sum(dim=1) / hyp_weight.to(similarity).sum(dim=1)
    recall = (best_of_ref * ref_weight.to(similarity)).sum(dim=1) / ref_weight.to(similarity).sum(dim=1)
    # A text of only control characters has no tokens, so the weights sum to 0.
    return (2 * precision * recall / (precision + recall)).nan_to_num(0.0, 0.0, 0.0)


def _is_cut(text: str, kept: int, tokenizer: Any) -> bool:
    """Whether a text has more tokens than the `kept` ones of `sent_encode`."""
    return len(tokenizer.encode(text.strip(), add_special_tokens=True, truncation=False, verbose=False)) > kept


def recommended_layer(reference: str) -> int:
    """The layer that `bert-score` recommends for a model of this name, chosen for agreement with human judgements.

    Raises `CoraError` if it recommends none.
    """
    hub_id, name = reference.partition("@")[0], _model_name(reference)
    layer = model2layers.get(hub_id, model2layers.get(name))
    if layer is None:
        raise CoraError(
            f"bert-score recommends no layer for encoder {reference!r}; set --bertscore-layer, or use {PAPER_ENCODER} "
            f"(layer {PAPER_LAYER}) or the embedded default"
        )
    return layer


def load_encoder(source: ModelPath, layer: int, device: str) -> Encoder:
    """Load an encoder, remove all transformer layers after `layer`, and set the maximum length of its tokenizer.

    Raises `CoraError` if it cannot be loaded, lacks weights, or has fewer layers.
    """
    try:
        config = AutoConfig.from_pretrained(source.path)
        model, report = AutoModel.from_pretrained(source.path, dtype=torch.float32, weights_only=True, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(source.path)
        # bert-score needs a space before the first word, but since transformers 5 tokenizers ignore that argument of `encode`.
        prefix_space = isinstance(tokenizer, GPT2Tokenizer | RobertaTokenizer)
        if prefix_space:
            tokenizer = AutoTokenizer.from_pretrained(source.path, add_prefix_space=True)
    except Exception as error:  # transformers and safetensors raise many unrelated types for damaged files
        if is_out_of_memory(error):
            raise
        raise CoraError(f"encoder {source.reference} cannot be loaded: {reason(error)}") from error
    # The pooler comes after the last layer, and the decoder of T5 after its encoder. Neither is used; many checkpoints have none.
    missing = sorted(key for key in report["missing_keys"] if not key.startswith(("pooler.", "decoder.")))
    if missing:
        raise CoraError(
            f"encoder {source.reference} lacks {len(missing)} weights that its config.json requires, such as {missing[0]}; "
            "download it again"
        )
    layers = getattr(config, "num_hidden_layers", layer)
    if not 1 <= layer <= layers:
        raise CoraError(
            f"encoder {source.reference} has {layers} layers, so layer {layer} does not exist; set --bertscore-layer to "
            f"1-{layers}"
        )
    stack = getattr(getattr(model, "encoder", None), "layer", None)
    if stack is None:
        # Called only here: it treats every path that contains "t5" as a T5 model.
        try:
            model = get_model(str(source.path), layer).float()
        except ValueError as error:
            raise CoraError(
                f"encoder {source.reference} is a {config.model_type} model, which bert-score does not support; use an encoder such as {PAPER_ENCODER}"
            ) from error
    else:
        del stack[layer:]
    tokenizer.model_max_length = max_tokens = longest_input(model, config, tokenizer)
    for name, weight in model.named_parameters():
        finite(weight.detach(), f"encoder {source.reference}", name)
    # Padding is masked, so any token with a row will do; but RoBERTa numbers its positions by its own.
    pads = (tokenizer.pad_token_id, getattr(config, "pad_token_id", None))
    pad = next((one for one in pads if isinstance(one, int) and 0 <= one < _rows(model)), 0)
    return Encoder(model.eval().to(device), tokenizer, pad, max_tokens, prefix_space)


def _rows(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def longest_input(model: Any, config: Any, tokenizer: Any) -> int:
    """Maximum input length in tokens, with special tokens: the lower of the encoder's and the tokenizer's limit."""
    positions = getattr(config, "max_position_embeddings", None) or _UNKNOWN_LENGTH
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    if padding is not None:  # RoBERTa's positions start after the padding index
        positions -= padding + 1
    return int(min(positions, tokenizer.model_max_length))


def _model_name(reference: str) -> str:
    return reference.partition("@")[0].rstrip("/").rpartition("/")[2]


def _tokenizer_hash(directory: Path) -> str:
    return hashing.sha256_files(file for file in directory.iterdir() if _TOKENIZER_FILES.fullmatch(file.name))


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bar and its table of unused weights: dropping the head of an encoder is intended."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
