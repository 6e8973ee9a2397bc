"""The settings of `cora evaluate`, and the checks that need only their values."""

import dataclasses
import shlex
from pathlib import Path
from typing import Literal

from cora_cli.errors import CoraError, UsageError
from cora_cli.evaluation.metrics import GROUPS, PASS_AT, Variant, parse_metrics, variant_problem
from cora_cli.rundir import RunDirectory
from cora_cli.settings import MOST, DtypeName, TemplateName, check_date, range_problems, refuse_useless, setting

DEFAULT_DRAWS = 10
"""As in the experiments of ScalaBL."""
ALL_METRICS = ("rouge", "meteor", "bleu", "bertscore")
_WHAT, _GENERATION, _METRICS, _RUN = "What to evaluate", "Generation", "Metrics", "Run"


def check_run(name: str) -> None:
    """Raise `CoraError` if there is no run of `cora train` in the directory `name`."""
    run = RunDirectory(Path(name))
    if not run.exists():
        if not run.root.exists():
            raise CoraError(
                f"{name} does not exist; name run directories of `cora train`. To evaluate a model of the hub: "
                f"cora evaluate --model {name} --dataset FILE -o DIR."
            )
        if below := sorted(str(record.parent) for record in run.root.glob(f"*/{run.record.name}")):
            raise CoraError(
                f"{name} is not a cora run (no {run.record.name} of cora); name the runs below it, such as: cora evaluate {shlex.join(below[:2])}"
            )
        raise CoraError(
            f"{name} is not a cora run (no {run.record.name} of cora). To evaluate a model or adapter: "
            f"cora evaluate --model {name} --dataset FILE -o DIR."
        )


def check_predictions(name: str) -> None:
    """Raise `CoraError` if there is no file `name` for `--from`."""
    if not Path(name).is_file():
        raise CoraError(f"{name} is not a file; --from needs the predictions.jsonl of an evaluation")


MOST_RESAMPLES = 1_000_000


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Every setting of `cora evaluate`."""

    runs: tuple[str, ...] | None = setting("Run directories of `cora train`.", None, argument=True, names="run")
    model: str | None = setting(
        "Model or PEFT adapter to evaluate instead of runs; needs --dataset and --output-dir.", None, panel=_WHAT, names="model"
    )
    from_predictions: str | None = setting(
        "Recompute the metrics from this predictions.jsonl; needs no model.",
        None,
        panel=_WHAT,
        flags=("--from",),
        names="predictions",
    )
    dataset: str | None = setting("Records to answer. Default: the run's test.jsonl.", None, panel=_WHAT, names="dataset")
    columns: tuple[str, ...] | None = setting(
        "Columns to use where they are not recognised, comma-separated: prompt=COLUMN,response=COLUMN, with input=COLUMN if there is one, or "
        "messages=COLUMN, or text=COLUMN.",
        None,
        panel=_WHAT,
    )
    subset: str | None = setting("Subset (configuration) of a hub data set.", None, panel=_WHAT)
    split: str | None = setting("Split to read of a data set that has several. Default: train.", None, panel=_WHAT)
    output_dir: str | None = setting(
        "Output directory. Default: RUN/eval, or the directory of the --from file.",
        None,
        flags=("--output-dir", "-o"),
        panel=_RUN,
    )
    ensemble: bool = setting(
        "Evaluate the runs as one model whose probabilities are the mean of theirs; needs --output-dir.", False, panel=_WHAT
    )
    with_base: bool = setting("Also evaluate the base model of the runs, on the same records.", False, panel=_WHAT)
    exclude_trained: bool | None = setting(
        "Leave out records whose prompts the runs were trained on. Default: only where they come from the data set of the training.",
        None,
        panel=_WHAT,
        flags=("--exclude-trained/--no-exclude-trained",),
    )
    limit: int | None = setting("Answer only the first N records.", None, panel=_WHAT)
    base: str | None = setting("Base model of the adapter. Default: the one recorded in it.", None, panel=_WHAT, names="model")
    basis: str | None = setting(
        "Basis file of a compact adapter. Default: the path recorded in the adapter.", None, panel=_WHAT, names="basis"
    )
    ranks: tuple[str, ...] | None = setting(
        "Comma-separated ranks to cut runs of mode dylora to, such as 1,2,4; each is evaluated on its own. Default: the full rank.",
        None,
        panel=_WHAT,
    )
    draws: int | None = setting(
        "Draws of the weights of an adapter with a distribution (mode scalabl, `cora laplace`), whose probabilities are averaged; 0: its mean. "
        "Default: 10.",
        None,
        panel=_WHAT,
        most=10_000,
    )
    backend: Literal["transformers", "vllm"] = setting(
        "Generation backend. vllm needs a GPU and the package vllm, and ignores --batch-size.",
        "transformers",
        panel=_GENERATION,
    )
    batch_size: int = setting("Prompts decoded together; a smaller batch needs less memory.", 48, panel=_GENERATION, most=MOST)
    max_new_tokens: int = setting("Maximum length of an answer, in tokens.", 256, panel=_GENERATION, most=MOST)
    samples: int = setting("Answers to each record, drawn at --temperature, for pass@k.", 1, panel=_GENERATION, most=1000)
    temperature: float = setting(
        "Sampling temperature, such as 0.8. 0: greedy decoding, which always gives the same answer.",
        0.0,
        panel=_GENERATION,
        most=100,
    )
    template: TemplateName = setting(
        "Prompt template. auto: the run's template; with --model, plain for pairs of a prompt and an answer, else the tokenizer's chat template, or "
        "Alpaca's.",
        "auto",
        panel=_GENERATION,
    )
    template_date: str | None = setting(
        "Date, as YYYY-MM-DD, for a chat template that writes the current one into its prompts. Default: that of the run's training; "
        "with --model, today.",
        None,
        panel=_GENERATION,
    )
    merge: bool = setting(
        "Merge the adapter into the weights before decoding. Faster; exact in fp32, rounded in bf16.",
        True,
        panel=_GENERATION,
    )
    metrics: tuple[str, ...] = setting(
        "Comma-separated: rouge, meteor, bleu, bertscore, calibration (NLL, Brier score and calibration error of the reference tokens); for "
        "records that carry tests also pass@1, pass@10 and the like. Default: the first four.",
        ALL_METRICS,
        panel=_METRICS,
    )
    metric_variant: Variant = setting(
        "ours, or hf-evaluate: what evaluate.load(...) of Hugging Face computes by default (ROUGE without stemming, METEOR with word_tokenize).",
        "ours",
        panel=_METRICS,
    )
    bertscore_model: str | None = setting(
        "BERTScore encoder, such as roberta-large. Default: the embedded MiniLM-L6.", None, panel=_METRICS
    )
    bertscore_layer: int | None = setting(
        "Layer of the BERTScore encoder. Default: the layer that bert-score recommends.", None, panel=_METRICS
    )
    bleu_tokenize: Literal["13a", "intl", "zh", "char", "none"] = setting(
        "Tokenizer of SacreBLEU: 13a for languages with spaces between words, zh for Chinese, char for other languages without them.",
        "13a",
        panel=_METRICS,
    )
    readability: bool = setting(
        "Also count proxies of readability in answers that are Python programs, without running them.", False, panel=_METRICS
    )
    bootstrap: int = setting("Number of bootstrap resamples for each interval.", 1000, panel=_METRICS, most=MOST_RESAMPLES)
    seed: int = setting("Seed for the bootstrap and for sampling; greedy decoding uses none.", 0, panel=_METRICS)
    device: str = setting("auto, cpu, cuda or cuda:<index>.", "auto", panel=_RUN)
    dtype: DtypeName = setting("auto: bf16 where the hardware supports it, else fp32.", "auto", panel=_RUN)
    dry_run: bool = setting(
        "Print the prompts, their tokens, the peak memory by part and the cards that it fits, then exit. Needs no weights of the base model and no "
        "GPU; --device cpu plans for a processor.",
        False,
        panel=_RUN,
    )
    rate_from: str | None = setting(
        "With --dry-run: also print the longest time that the answers can take at the rate of the finished evaluation in this directory.",
        None,
        panel=_RUN,
    )
    overwrite: bool = setting("Replace an evaluation that was created with other settings.", False, panel=_RUN)
    execute_code: bool = setting(
        "Run the generated programs for pass@k, in a sandbox (bubblewrap) without network, home or environment.",
        False,
        panel="Risky",
    )
    same_process: bool = setting(
        "Run the tests of a program in its own process, as the script of HumanEval does: for tests that, for example, capture what a program prints. "
        "A program can then pass without being right.",
        False,
        panel="Risky",
    )
    trust_remote_code: bool = setting(
        "Run Python code that comes with the model. Use only if you trust its author.", False, panel="Risky"
    )

    def __post_init__(self) -> None:
        """Check that there is exactly one thing to evaluate, and that the numbers are in range."""
        given = [bool(self.runs), bool(self.model), bool(self.from_predictions)]
        if sum(given) != 1:
            raise UsageError("give exactly one of: run directories, --model, or --from predictions.jsonl")
        if self.from_predictions:
            refuse_useless(self, _WITHOUT_MODEL, "with --from, which scores existing predictions")
        self._check_uses_of_metrics()
        self._check_dry_run()
        self._check_choice_of_records()
        self._check_ranks()
        self._check_samples()
        self._check_ensemble()
        if self.with_base and not self.runs:
            raise UsageError("--with-base needs run directories, whose base model it evaluates; leave it out")
        if self.model and not (self.dataset and self.output_dir):
            raise UsageError("--model needs --dataset FILE (the records to answer) and --output-dir DIR (where to write)")
        for name, least in (("batch_size", 1), ("max_new_tokens", 1), ("bootstrap", 100), ("limit", 1), ("draws", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise UsageError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
        if problems := [*range_problems(self), *filter(None, [check_date(self.template_date)])]:
            raise UsageError("; ".join(problems))
        if self.measures_calibration and self.backend == "vllm":
            raise UsageError("--metrics calibration needs --backend transformers, which gives the probabilities of all tokens")
        if problem := variant_problem(self.metric_variant, self.bleu_tokenize):
            raise UsageError(problem)

    def _check_dry_run(self) -> None:
        if self.dry_run and self.from_predictions:
            raise UsageError("--dry-run has no effect with --from, which needs no model; leave it out")
        if self.rate_from is not None and not self.dry_run:
            raise UsageError("--rate-from has no effect without --dry-run; leave it out")

    def _check_uses_of_metrics(self) -> None:
        """Raise `UsageError` for an unknown metric, and for settings of a metric that is not measured."""
        for group, names in (("bertscore", ("bertscore_model", "bertscore_layer")), ("bleu", ("bleu_tokenize",))):
            if set(GROUPS[group]).isdisjoint(self.metric_names):
                refuse_useless(self, set(names), f"without {group} among --metrics")

    def _check_choice_of_records(self) -> None:
        if self.columns:
            from cora_cli.data.formats.columns import chosen_shape

            chosen_shape(self.columns)
        if (given := [name for name in ("columns", "subset", "split") if getattr(self, name)]) and not self.dataset:
            raise UsageError(f"--{given[0]} needs --dataset, whose records it chooses")

    def _check_samples(self) -> None:
        if self.samples < 1 or self.temperature < 0:
            name = "samples" if self.samples < 1 else "temperature"
            raise UsageError(f"--{name} must be at least {1 if name == 'samples' else 0}, not {getattr(self, name)}")
        if self.samples > 1 and not self.temperature:
            raise UsageError(f"--samples {self.samples} needs --temperature, such as 0.8: greedy decoding gives one answer")
        largest = self.most_samples
        if largest > self.samples and not self.from_predictions:
            raise UsageError(
                f"pass@{largest} needs at least {largest} answers to each record; use --samples {largest} --temperature 0.8"
            )
        if largest and not self.execute_code:
            raise UsageError(f"pass@{largest} runs the programs that the model writes; allow it with --execute-code")
        if self.execute_code and not largest:
            raise UsageError("--execute-code has no effect without pass@1 or the like among --metrics; leave it out")
        if self.same_process and not self.execute_code:
            raise UsageError("--same-process has no effect without --execute-code; leave it out")

    def _check_ensemble(self) -> None:
        if not self.ensemble:
            return
        if len(self.runs or ()) < 2:
            raise UsageError(f"--ensemble needs at least two run directories, not {len(self.runs or ())}")
        if not self.output_dir:
            raise UsageError("--ensemble needs --output-dir DIR, since its results belong to none of the runs alone")
        if self.ranks:
            raise UsageError("--ranks has no effect with --ensemble, whose members keep their ranks; leave it out")
        if self.backend == "vllm":
            raise UsageError("--ensemble needs --backend transformers, which gives the probabilities of all tokens")

    def _check_ranks(self) -> None:
        if self.ranks is not None and not all(rank.isdecimal() and int(rank) for rank in self.ranks or ("",)):
            raise UsageError(f"--ranks must be positive integers, separated by commas, not {','.join(self.ranks)!r}")
        if self.ranks and self.backend == "vllm":
            raise UsageError(
                "--ranks needs --backend transformers; for vllm, write an adapter of each rank with `cora export --rank`"
            )

    @property
    def measures_calibration(self) -> bool:
        """Whether a metric needs the model's probabilities of the reference tokens."""
        return not set(GROUPS["calibration"]).isdisjoint(self.metric_names)

    @property
    def most_samples(self) -> int:
        """The largest k of the metrics pass@k; 0 without one."""
        return max((PASS_AT[name] for name in self.metric_names if name in PASS_AT), default=0)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of the single metrics, such as `rouge1`, in table order."""
        return parse_metrics(",".join(self.metrics))


_WITHOUT_MODEL = {
    field.name
    for field in dataclasses.fields(EvaluateConfig)
    if field.metadata["panel"] in (_WHAT, _GENERATION) or field.name in ("dtype", "trust_remote_code")
} - {"from_predictions"}
"""The settings that say which model answers which records, and how."""
