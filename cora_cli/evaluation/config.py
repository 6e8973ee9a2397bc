"""What `cora evaluate` can be told, and the checks that need nothing but these values."""

import dataclasses
from typing import Literal

from cora_cli.data.templates import TemplateName
from cora_cli.errors import UsageError
from cora_cli.evaluation.metrics import parse_metrics
from cora_cli.settings import DtypeName, setting

ALL_METRICS = ("rouge", "meteor", "bleu", "bertscore")
_WHAT, _GENERATION, _METRICS, _RUN = "What to evaluate", "Generation", "Metrics", "Run"


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Every setting of `cora evaluate`."""

    runs: tuple[str, ...] | None = setting("Run directories of `cora train`.", None, argument=True)
    model: str | None = setting("A bare model, or a PEFT adapter directory, instead of runs.", None, panel=_WHAT)
    from_predictions: str | None = setting(
        "Recompute the metrics of this predictions.jsonl; no model is needed.", None, panel=_WHAT, flags=("--from",)
    )
    dataset: str | None = setting("Records to answer. Default: the run's own test.jsonl.", None, panel=_WHAT)
    output_dir: str | None = setting(
        "Where to write. Default: RUN/eval, or beside --from.", None, flags=("--output-dir", "-o"), panel=_RUN
    )
    limit: int | None = setting("Answer the first N records only.", None, panel=_WHAT)
    basis: str | None = setting("Basis file of a compact adapter, if it has moved.", None, panel=_WHAT)
    backend: Literal["transformers", "vllm"] = setting(
        "What generates; vllm: a GPU and the package vllm are needed, and --batch-size is vLLM's own affair.",
        "transformers",
        panel=_GENERATION,
    )
    batch_size: int = setting("Prompts generated together; fewer need less memory.", 48, panel=_GENERATION)
    max_new_tokens: int = setting("Longest answer, in tokens.", 256, panel=_GENERATION)
    template: TemplateName = setting("Prompt template; auto: the run's own.", "auto", panel=_GENERATION)
    merge: bool = setting(
        "Merge the adapter into the weights first: faster; exact in fp32, rounded once in bf16.", True, panel=_GENERATION
    )
    metrics: tuple[str, ...] = setting("Comma-separated: rouge, meteor, bleu, bertscore.", ALL_METRICS, panel=_METRICS)
    bertscore_model: str | None = setting(
        "Encoder of BERTScore, such as roberta-large. Default: the embedded MiniLM-L6.", None, panel=_METRICS
    )
    bertscore_layer: int | None = setting(
        "Layer of that encoder. Default: the one that bert-score recommends.", None, panel=_METRICS
    )
    bootstrap: int = setting("Resamples behind each interval.", 1000, panel=_METRICS)
    seed: int = setting("Seed of the resampling; greedy decoding has none.", 0, panel=_METRICS)
    device: str = setting("auto, cpu, cuda or cuda:<index>.", "auto", panel=_RUN)
    dtype: DtypeName = setting("auto: bf16 where the hardware multiplies it, else fp32.", "auto", panel=_RUN)
    overwrite: bool = setting("Replace an evaluation that was made with other settings.", False, panel=_RUN)
    trust_remote_code: bool = setting(
        "Run code that comes with the model. Off unless you trust its author.", False, panel="Risky"
    )

    def __post_init__(self) -> None:
        """Check that exactly one thing is evaluated, and the numbers."""
        given = [bool(self.runs), bool(self.model), bool(self.from_predictions)]
        if sum(given) != 1:
            raise UsageError("name either run directories, or --model, or --from predictions.jsonl")
        if self.from_predictions and (
            useless := [name for name in ("dataset", "limit", "basis") if getattr(self, name) is not None]
        ):
            raise UsageError(f"--{useless[0]} is of no use with --from, whose predictions are finished; leave it out")
        if self.from_predictions and self.backend != "transformers":
            raise UsageError(f"--backend {self.backend} is of no use with --from, whose predictions are finished; leave it out")
        if self.model and not (self.dataset and self.output_dir):
            raise UsageError("--model needs --dataset (what to answer) and --output-dir (where to write)")
        for name, least in (("batch_size", 1), ("max_new_tokens", 1), ("bootstrap", 100)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(self, name)}")
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"--limit must be at least 1, not {self.limit}")
        parse_metrics(",".join(self.metrics))

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The metrics' own names, such as `rouge1`."""
        return parse_metrics(",".join(self.metrics))
