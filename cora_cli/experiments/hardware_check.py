"""Check that this machine computes what the tests check on a processor: attention, packing, training, answers and bases.

Each check runs the product's own functions, most of them on the embedded model, and compares the results with a computation that
shares no kernel with them: float64 on the processor, or the same command on the processor in fp32.
"""

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from cora_cli.basis.artifact import read_basis
from cora_cli.basis.choices import BasisChoices
from cora_cli.data.encode import Example, encode_records
from cora_cli.data.pack import Layout, lay_out
from cora_cli.data.split import load_split
from cora_cli.data.templates import Template
from cora_cli.device import Hardware, has_varlen, is_installed, select_hardware, select_packed_attention
from cora_cli.errors import CoraError, reason
from cora_cli.evaluation.config import EvaluateConfig
from cora_cli.evaluation.evaluate import evaluate
from cora_cli.experiments.stock_trainer import time_stock_trainer
from cora_cli.extraction.extract import extract_basis
from cora_cli.models.loading import load_model
from cora_cli.models.quantized import require_four_bit
from cora_cli.models.references import EMBEDDED_MODEL, resolve_model
from cora_cli.models.tokenizer import load_tokenizer
from cora_cli.progress import say
from cora_cli.reading import read_jsonl
from cora_cli.records import LogLine, Prediction, read_run
from cora_cli.rundir import EvaluationDirectory, RunDirectory
from cora_cli.settings import DtypeName
from cora_cli.training.attention import block_mask_attention, layout_mask, segment_attention, varlen_attention
from cora_cli.training.batching import choose_batching
from cora_cli.training.config import TrainConfig
from cora_cli.training.preflight import preflight
from cora_cli.training.run import train

DATASET = "builtin:code"
ATTENTION_ERROR = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest ‖x − reference‖ / ‖reference‖ of an output or gradient. Products in TF32 would exceed that of float32."""
MODES: dict[str, tuple[str, dict[str, Any]]] = {"lora": ("lora_B", {}), "fb": ("lora_A", {"b_init": "orthonormal"})}
"""Modes to train, the factor that starts at zero and so ends as the change, and the settings of the mode."""
STEPS, BATCH, LEARNING_RATE = 3, 4, 1e-3
LOSS_ERROR, LEAST_COSINE = 1e-4, 0.99
"""Relative difference of the losses; cosine of the updates, since AdamW divides tiny gradients by their own size."""
FOUR_BIT_ERROR = 0.1
PROMPTS, NEW_TOKENS, LEAST_EQUAL = 8, 24, 0.75
"""Two logits that are equal to rounding may change places, and the rest of that answer with them."""
RANK, BASIS_ERROR = 16, 1e-6
TIMED_RANK, TIMED_BATCH, TIMED_STEPS = 48, 16, 16
PLAN_ERROR = 0.1
LAYOUTS = 20


@dataclasses.dataclass(frozen=True)
class Check:
    """One check: what was found in a sentence, and its figures. `passed` is None where it does not apply to this machine."""

    name: str
    passed: bool | None
    found: str
    figures: dict[str, Any]
    seconds: float

    def line(self) -> str:
        """One line for the terminal."""
        word = {True: "passed", False: "FAILED", None: "skipped"}[self.passed]
        return f"{word:<8} {self.name:<11} {self.found} ({self.seconds:.0f} s)"


Finding = tuple[bool | None, str, dict[str, Any]]


def check_hardware(
    device: str, dtype: DtypeName, work: Path, model: str = EMBEDDED_MODEL, chosen: Sequence[str] | None = None
) -> Iterator[Check]:
    """Run the checks, or the `chosen` ones, one after another with `model`, in the empty directory `work`. A check that raises has failed, and
    the next ones still run."""
    bench = _Bench(select_hardware(device, dtype), work, model)
    checks: dict[str, Callable[[], Finding]] = {
        "attention": bench.attention,
        "layouts": bench.layouts,
        "packing": bench.packing,
        "speed": bench.speed,
        "memory": bench.memory,
        "repetition": bench.repetition,
        "answers": bench.answers,
        "4-bit": bench.four_bit,
        "extraction": bench.extraction,
        "training": bench.training,
        "options": bench.options,
    }
    for name, run in checks.items():
        if chosen is not None and name not in chosen:
            continue
        say(f"checking {name} …")
        began = time.perf_counter()
        try:
            passed, found, figures = run()
        except Exception as error:  # this command exists to show what a machine does, whatever that is
            passed, found, figures = False, f"{type(error).__name__}: {reason(error)}", {}
        yield Check(name, passed, found, figures, time.perf_counter() - began)


class _Bench:
    """The checks of one machine; those that train leave their runs in `work` for the next ones."""

    def __init__(self, hardware: Hardware, work: Path, model: str) -> None:
        self._hardware, self._work, self._model = hardware, work, model
        self._gpu = hardware.device.type == "cuda"
        self._forms: list[str] = []
        """The values of `--attention` whose implementation is ours and works here, first what `auto` takes."""
        if self._gpu:
            varlen = has_varlen() and hardware.dtype == torch.bfloat16
            self._forms = [*["varlen"] * varlen, *["flex"] * is_installed("triton")]

    def attention(self) -> Finding:
        """Our attention over a packed row, and its gradients, compared with a dense mask in float64."""
        forms: dict[str, tuple[Callable[..., Any], tuple[torch.dtype, ...]]] = {
            "segments": (segment_attention, tuple(ATTENTION_ERROR)),
            "flex": (block_mask_attention, tuple(ATTENTION_ERROR)),
            "varlen": (varlen_attention, (torch.bfloat16,)),
        }
        layout, _ = lay_out(_sequences(0), 16)
        figures, passed = {}, True
        for name in self._forms or ["segments"]:
            form, kinds = forms[name]
            for dtype in kinds:
                error = max(self._attention_error(form, layout, window, dtype) for window in (None, 48))
                figures[f"{name}, {str(dtype).removeprefix('torch.')}"] = error
                passed &= error <= ATTENTION_ERROR[dtype]
        worst = "; ".join(f"{name}: {error:.1e}" for name, error in figures.items())
        return passed, f"largest error, with and without a window: {worst}", figures

    def _attention_error(self, form: Callable[..., Any], layout: Layout, window: int | None, dtype: torch.dtype) -> float:
        generator = torch.Generator().manual_seed(0)

        def draw(heads: int) -> torch.Tensor:
            return torch.randn(1, heads, layout.tokens, 64, generator=generator).to(dtype)

        inputs, upstream = [draw(9), draw(3), draw(3)], draw(9).transpose(1, 2)
        found = self._with_gradients(
            _attend(form, layout, window),
            [tensor.to(self._hardware.device) for tensor in inputs],
            upstream.to(self._hardware.device),
        )
        places = torch.arange(layout.tokens)
        sees = layout_mask(layout, window, torch.device("cpu"))(None, None, places[:, None], places[None])

        def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            keys, values = (tensor.repeat_interleave(3, dim=1) for tensor in (key, value))
            scores = (query @ keys.transpose(2, 3) * 0.125).masked_fill(~sees, -torch.inf)
            return (scores.softmax(-1) @ values).transpose(1, 2)

        wanted = self._with_gradients(dense, [tensor.double() for tensor in inputs], upstream.double())
        return max(float((x.cpu().double() - y).norm() / y.norm()) for x, y in zip(found, wanted, strict=True))

    @staticmethod
    def _with_gradients(
        function: Callable[..., torch.Tensor], inputs: list[torch.Tensor], upstream: torch.Tensor
    ) -> list[torch.Tensor]:
        leaves = [tensor.requires_grad_() for tensor in inputs]
        output = function(*leaves)
        return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]

    def layouts(self) -> Finding:
        """How often FlexAttention compiles over rows of different layouts and lengths."""
        if "flex" not in self._forms:
            return None, "only FlexAttention on a GPU compiles", {}
        graphs, seconds = _compiled_graphs(), []
        for number in range(LAYOUTS):
            layout, _ = lay_out(_sequences(number, 8 + number), 16)
            inputs = [
                torch.randn(1, heads, layout.tokens, 64, device=self._hardware.device, dtype=torch.bfloat16)
                for heads in (9, 3, 3)
            ]
            torch.cuda.synchronize()
            began = time.perf_counter()
            upstream = torch.randn(1, layout.tokens, 9, 64, device=self._hardware.device, dtype=torch.bfloat16)
            self._with_gradients(_attend(block_mask_attention, layout, None), inputs, upstream)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        compiled = _compiled_graphs() - graphs
        later = statistics.median(seconds[-5:])
        return (
            compiled <= 4,
            f"{LAYOUTS} layouts compiled {compiled} graphs; the last ones take {later * 1e3:.1f} ms",
            {"graphs": compiled, "seconds": seconds},
        )

    def packing(self) -> Finding:
        """The losses of packed rows by every form of attention here, compared with the model's own attention on single examples."""
        path = resolve_model(self._model)
        examples = self._examples(2 * BATCH)
        asked = ["sdpa", *self._forms, *["flash-attn"] * is_installed("flash_attn")] if self._gpu else ["auto"]
        figures = {}
        for form in (select_packed_attention(self._hardware.device.type, self._hardware.dtype, each) for each in asked):
            model = load_model(path, self._hardware.dtype, self._hardware.device, None)
            figures[form.name] = choose_batching(model, form, examples, self._hardware).describe()
        passed = all(sentence.startswith("attention ") for sentence in figures.values())
        bad = [f"{name}: {sentence}" for name, sentence in figures.items() if not sentence.startswith("attention ")]
        return passed, "; ".join(bad) or f"{', '.join(figures)} give the losses of single examples", figures

    def _examples(self, limit: int | None = None) -> list[Example]:
        tokenizer = load_tokenizer(resolve_model(self._model))
        records = load_split(DATASET, None, 0).train[:limit]
        return encode_records(records, Template("alpaca", "alpaca", tokenizer), 1024, DATASET).examples

    def training(self) -> Finding:
        """Three optimizer steps here and on the processor, in fp32."""
        figures: dict[str, Any] = {}
        for mode, (trained, own) in MODES.items():
            here, there = (self._train(f"{mode}-{name}", name, "fp32", mode=mode, **own) for name in (self._name, "cpu"))
            losses = [[line["loss"] for line in read_jsonl(run.log, LogLine) if "loss" in line] for run in (here, there)]
            changes = [
                torch.cat([weight.double().flatten() for name, weight in sorted(_adapter(run).items()) if trained in name])
                for run in (here, there)
            ]
            figures[mode] = {
                "loss": max(abs(a - b) / b for a, b in zip(*losses, strict=True)),
                "cosine": float(torch.nn.functional.cosine_similarity(changes[0], changes[1], dim=0)),
                "losses": losses,
            }
        passed = all(found["loss"] <= LOSS_ERROR and found["cosine"] >= LEAST_COSINE for found in figures.values())
        said = "; ".join(
            f"{mode}: losses differ by {f['loss']:.1e}, cosine of the adapters {f['cosine']:.5f}" for mode, f in figures.items()
        )
        return passed, f"{STEPS} steps compared with the processor's: {said}", figures

    @property
    def _name(self) -> str:
        return str(self._hardware.device.type)

    def _train(self, name: str, device: str, dtype: DtypeName, **settings: Any) -> RunDirectory:
        config = self._config(name, device, dtype, **settings)
        train(config)
        return RunDirectory(Path(config.output_dir))

    def _config(self, name: str, device: str, dtype: DtypeName, **settings: Any) -> TrainConfig:
        usual: dict[str, Any] = {
            "max_steps": STEPS,
            "batch_size": BATCH,
            "eval_limit": BATCH,
            "rank": RANK,
            "learning_rate": LEARNING_RATE,
        }
        return TrainConfig(
            model=self._model,
            dataset=DATASET,
            output_dir=str(self._work / name),
            device=device,
            dtype=dtype,
            resume=True,
            **{**usual, **settings},
        )

    def answers(self) -> Finding:
        """Greedy answers here and on the processor, in fp32."""
        texts, speed = [], {}
        for device in (self._name, "cpu"):
            folder = self._work / f"answers-{device}"
            settings: dict[str, Any] = {"limit": PROMPTS, "max_new_tokens": NEW_TOKENS, "metrics": ("rouge",), "dtype": "fp32"}
            (found,) = evaluate(
                EvaluateConfig(
                    model=self._model, dataset=DATASET, output_dir=str(folder), device=device, overwrite=True, **settings
                )
            )
            texts.append([line["prediction"] for line in read_jsonl(EvaluationDirectory(folder).predictions, Prediction)])
            speed[device] = found.record["generation"]
        equal = sum(a == b for a, b in zip(*texts, strict=True))
        return (
            equal >= LEAST_EQUAL * PROMPTS,
            f"{equal} of {PROMPTS} greedy answers of {NEW_TOKENS} tokens are those of the processor",
            {"equal": equal, "prompts": PROMPTS, "generation": speed},
        )

    def four_bit(self) -> Finding:
        """Training on a base model in 4 bits."""
        try:
            require_four_bit()
        except CoraError as error:
            return None, str(error), {}
        run = self._train("four-bit", self._name, self._hardware.dtype_name, mode="lora", load_in_4bit=True)
        own = self._plain()
        first, wanted = (next(line["loss"] for line in read_jsonl(each.log, LogLine) if "loss" in line) for each in (run, own))
        difference = abs(first - wanted) / wanted
        return (
            difference <= FOUR_BIT_ERROR,
            f"first loss {first:.3f}, {wanted:.3f} with the stored weights",
            {"first": first, "stored": wanted},
        )

    def _plain(self) -> RunDirectory:
        """A LoRA of a few steps, trained once."""
        return self._train("lora", self._name, self._hardware.dtype_name, mode="lora")

    def extraction(self) -> Finding:
        """A basis of two models, decomposed here and on the processor."""
        sources = [
            resolve_model(self._model),
            resolve_model(str(self._plain().root)),
        ]
        bases, seconds = [], {}
        for device in (self._hardware.device, torch.device("cpu")):
            path = self._work / f"{device.type}.safetensors"
            summary = extract_basis(sources, path, BasisChoices(rank=RANK), None, device, overwrite=True)
            seconds[device.type] = summary.seconds_decomposing
            bases.append(read_basis(path))
        here, there = bases
        values = max(float(((here.singular_values[g] - v) / v).abs().max()) for g, v in there.singular_values.items())
        common = min(
            float(torch.linalg.svdvals(here.directions[g].double().T @ there.directions[g].double()).min())
            for g, gap in there.gaps.items()
            if gap
        )
        return (
            values <= BASIS_ERROR and common >= 1 - BASIS_ERROR,
            f"singular values differ by {values:.1e}, the smallest cosine between the subspaces is {common:.8f}",
            {"singular_values": values, "cosine": common, "seconds_decomposing": seconds},
        )

    def speed(self) -> Finding:
        """Tokens per second and peak memory of training as users would start it, and of PEFT's LoRA with the stock Trainer."""
        figures = {mode: self._timed(mode, mode, **own) for mode, (_, own) in MODES.items()}
        for name in self._forms[1:]:
            figures[f"lora, {name}"] = self._timed(f"lora-{name}", "lora", attention=name)
        figures["PEFT and Trainer"] = time_stock_trainer(
            resolve_model(self._model),
            self._examples(),
            self._hardware,
            self._work / "peer",
            rank=TIMED_RANK,
            rate=LEARNING_RATE,
            batch=TIMED_BATCH,
            steps=self._timed_steps,
            warm_up=self._warm_up,
        )
        rows = [
            f"{name}: {f['tokens_per_second']:,.0f} tokens/s, peak {f['peak_memory_bytes'] / 2**30:.2f} GiB"
            for name, f in figures.items()
        ]
        return True, f"{self._hardware.dtype_name}, {TIMED_BATCH} examples a step, r = {TIMED_RANK}: {'; '.join(rows)}", figures

    def _timed(self, name: str, mode: str, **own: Any) -> dict[str, float]:
        gc.collect()  # the model before this one would count
        run = self._train(f"speed-{name}", self._name, self._hardware.dtype_name, mode=mode, **self._timed_settings(), **own)
        lines = [line for line in read_jsonl(run.log, LogLine) if "loss" in line][self._warm_up :]
        record = read_run(run)
        return {
            "tokens_per_second": sum(line["tokens"] for line in lines) / sum(line["seconds"] for line in lines),
            "peak_memory_bytes": record["peak_memory_bytes"],
            "trained_parameters": record["parameters"]["trained"],
        }

    def _timed_settings(self) -> dict[str, Any]:
        return {"max_steps": self._timed_steps, "batch_size": TIMED_BATCH, "rank": TIMED_RANK}

    @property
    def _timed_steps(self) -> int:
        return TIMED_STEPS if self._gpu else STEPS

    @property
    def _warm_up(self) -> int:
        """Steps that are not timed, because kernels are compiled or chosen in them."""
        return TIMED_STEPS // 2 if self._gpu else 1

    def memory(self) -> Finding:
        """Peak memory of the timed trainings compared with what their plan says."""
        if not self._gpu:
            return None, "on a processor, the peak of a process is not that of its training", {}
        figures = {}
        for mode, (_, own) in MODES.items():
            config = self._config("unused", self._name, self._hardware.dtype_name, mode=mode, **self._timed_settings(), **own)
            plan = preflight(dataclasses.replace(config, resume=False, dry_run=True)).measured
            if isinstance(plan, str):
                return False, plan, {}
            found = int(self._timed(mode, mode, **own)["peak_memory_bytes"])
            figures[mode] = {"planned": plan.memory.total, "found": found, "ratio": plan.memory.total / found}
        said = ", ".join(f"{mode}: {figure['ratio']:.3f}" for mode, figure in figures.items())
        passed = all(abs(figure["ratio"] - 1) <= PLAN_ERROR for figure in figures.values())
        return passed, f"planned peak ÷ real peak: {said}", figures

    def options(self) -> Finding:
        """Speed with `--compile`, and what it compiled, and with `--liger`; both check their losses themselves."""
        if not self._gpu:
            return None, "compilation and liger's kernels are compared on a GPU", {}
        graphs = _compiled_graphs()
        figures = {"--compile": self._timed("compile", "lora", compile=True)}
        figures["--compile"]["graphs"] = _compiled_graphs() - graphs
        if is_installed("liger_kernel"):
            figures["--liger"] = self._timed("liger", "lora", liger=True)
        said = "; ".join(f"{name}: {f['tokens_per_second']:,.0f} tokens/s" for name, f in figures.items())
        return True, f"{said}; --compile compiled {figures['--compile']['graphs']} graphs", figures

    def repetition(self) -> Finding:
        """Whether a training gives the same bits twice, which a GPU's kernels need not do."""
        figures: dict[str, bool] = {}
        for name in self._forms or ["auto"]:
            runs = [
                self._train(f"repeat-{name}-{number}", self._name, self._hardware.dtype_name, mode="lora", attention=name)
                for number in (1, 2)
            ]
            one, other = map(_adapter, runs)
            figures[name] = all(torch.equal(one[key], other[key]) for key in one)
        said = ", ".join(f"{name}: {'the same bits' if equal else 'other bits'}" for name, equal in figures.items())
        same = all(figures.values())
        return (True if same else None if self._gpu else False), f"two runs of {STEPS} steps: {said}", figures


def _attend(form: Callable[..., Any], layout: Layout, window: int | None) -> Callable[..., torch.Tensor]:
    """The output of `form` as a function of queries, keys and values."""
    return lambda *inputs: form(torch.nn.Identity(), *inputs, None, layout=layout, sliding_window=window, scaling=0.125)[0]


def _sequences(seed: int, more: int = 4) -> list[list[int]]:
    """Token sequences of many lengths, of which some share a prefix."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> list[int]:
        return torch.randint(1000, (length,), generator=generator).tolist()

    prefix = draw(40)
    own = [draw(int(length)) for length in torch.randint(3, 200, (more,), generator=generator)]
    return [*(prefix + draw(length) for length in (5, 17, 150)), draw(300), *own]


def _compiled_graphs() -> int:
    """The graphs that torch.compile has compiled in this process, each again where it was compiled again."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def _adapter(run: RunDirectory) -> dict[str, torch.Tensor]:
    return load_file(run.adapter / "adapter_model.safetensors")
