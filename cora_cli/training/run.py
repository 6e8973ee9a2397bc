"""One training run, from its configuration to a finished run directory: start, resume, record failures, finish.

Everything a user can get wrong is checked before the first file is written. `trainer` holds the training loop.
"""

import contextlib
import dataclasses
import datetime
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from transformers import TrainingArguments

from cora_cli import hashing, writing
from cora_cli.adapters.card import write_card
from cora_cli.adapters.facts import AdapterFacts
from cora_cli.adapters.install import AngleMeter
from cora_cli.adapters.storage import save_adapter
from cora_cli.data.batches import BatchForm
from cora_cli.data.encode import EncodedSet
from cora_cli.environment import forget_settings
from cora_cli.errors import CoraError, is_lost_process, lost_process, reason
from cora_cli.lock import own_directory
from cora_cli.methods.plan import AdapterPlan
from cora_cli.methods.registry import method_of
from cora_cli.models.loading import save_model
from cora_cli.models.references import absolute
from cora_cli.models.tokenizer import save_tokenizer
from cora_cli.progress import note, progress, say
from cora_cli.reading import read_jsonl
from cora_cli.records import LogLine, read_run, template_date, write_run, write_sealed
from cora_cli.rundir import RunDirectory
from cora_cli.training.arguments import total_steps, training_arguments
from cora_cli.training.assemble import assemble, barrier, share_start
from cora_cli.training.checkpoints import checkpoint_to_resume, checkpoints_in, step_of
from cora_cli.training.config import TrainConfig
from cora_cli.training.directory import difference, has_stopped_at, is_replaced, open_directory, refuse_occupied, write_start
from cora_cli.training.fitting import fit_rows, out_of_memory
from cora_cli.training.heldout import HeldOutLoss, held_out_loss, loss_change
from cora_cli.training.prepare import Prepared, prepare
from cora_cli.training.probe import with_rate
from cora_cli.training.proposal import AUTO
from cora_cli.training.record import FAILED, FINISHED, INTERRUPTED, STOPPED, first_record, parameter_counts, peak_memory_bytes
from cora_cli.training.sharding import complete_weights, is_sharded
from cora_cli.training.trainer import PARTIAL, CoraTrainer, Diverged, RunLog, append_line

_NO_STEP: dict[str, Any] = {"steps": 0, "seconds": 0.0, "tokens": 0, "tokens_per_second": None}
"""The speed of a run that trains nothing."""


def train(config: TrainConfig) -> dict[str, Any]:
    """Run or resume one training and return its record, which is also `run.json`.

    Raises `CoraError` for anything a user can cause. Nothing is written before all inputs have been checked, and an interrupted run
    keeps its last complete checkpoint.
    """
    places = ("model", "dataset", "test_dataset", "basis", "peft_config")
    inputs: dict[str, Any] = {name: absolute(path) for name in places if (path := getattr(config, name))}
    if config.start_models:
        inputs["start_models"] = tuple(map(absolute, config.start_models))
    with contextlib.ExitStack() as held:
        return _train(dataclasses.replace(config, **inputs), RunDirectory(Path(config.output_dir)), held)


def _train(config: TrainConfig, run: RunDirectory, held: contextlib.ExitStack) -> dict[str, Any]:
    """As `train`; `held` keeps the lock of the run directory, which the main process takes for all."""
    forget_settings()
    started = read_run(run) if config.resume and run.exists() and not is_replaced(run, resume=True) else None
    if config.learning_rate == AUTO:
        refuse_occupied(run, config.resume)  # again with the lock below, but measuring takes a while
    config, proposal = with_rate(config, started)
    prepared = prepare(config, template_date(started) if started else None)
    if prepared.template.reads_clock:
        config = dataclasses.replace(config, template_date=prepared.template.date)
        say(
            f"the chat template writes the date into its prompts: {prepared.template.date}, here and in evaluations of this run"
        )
    arguments = training_arguments(config, prepared.hardware, len(prepared.train.examples), run)
    steps = total_steps(config, len(prepared.train.examples))
    main = arguments.process_index == 0
    fingerprint = prepared.fingerprint(config)

    def is_continued() -> bool:
        held.enter_context(own_directory(run.root, run.checkpoints.name, run.log.name))
        return open_directory(run, fingerprint, config.resume, arguments.world_size)

    if _agree(arguments, is_continued, fingerprint):
        record = read_run(run)
        if config.stop_at and has_stopped_at(run, config.stop_at):
            say(f"{run.root} has already stopped at step {config.stop_at}")
            return record
        if record["status"] == FINISHED and record.get("result_sha256") == run.result_hash():
            say(f"{run.root} is already finished")
            return record
        if "laplace" in record:
            run.check_result()  # training it again would lose what `cora laplace` made of it
        if record["status"] == FINISHED:
            say(f"the result in {run.root} was damaged after it was written: writing it again from the last checkpoint")
        if checkpoints_in(run.checkpoints):
            # Earlier versions rounded down and did not record it; the run goes on with what it began with, however often it is resumed.
            rounded_down = int(config.warmup_ratio * steps)
            arguments.warmup_steps = record.get("warmup_steps", rounded_down)
    config = fit_rows(config, prepared)
    try:
        model, batching, observation = assemble(config, prepared, arguments, run)
    except torch.OutOfMemoryError as error:
        raise out_of_memory(config, prepared) from error
    share_start(model, arguments, observation)

    def begin() -> None:
        first = first_record(config, prepared, fingerprint, model, batching, observation)
        rate = {"proposal": proposal} if proposal else {}
        write_start(run, config, prepared, {**first, "warmup_steps": arguments.warmup_steps, **rate})

    _by_main(arguments, begin)
    try:
        with _interrupts_recorded(run, main):
            outcome = _train_and_save(config, prepared, run, arguments, model, batching.form)
    except Exception as error:
        if main:
            # An incomplete checkpoint is useless, and on a full disk it takes the space that the record needs.
            shutil.rmtree(run.checkpoints / PARTIAL, ignore_errors=True)
            _mark_failed(run, error, _meaning(error, run, config, prepared))
        raise _explained(error, run, _meaning(error, run, config, prepared)) from error
    _by_main(arguments, lambda: _write_end(run, outcome))
    barrier(arguments)
    return read_run(run)


def _write_end(run: RunDirectory, outcome: dict[str, Any]) -> None:
    """Write the card of a finished run and its record, last; a run that stops has no result, and its record says how to read it."""
    shutil.rmtree(run.checkpoints / PARTIAL, ignore_errors=True)
    record = {**read_run(run), **outcome, "status": STOPPED}
    if "finished" in outcome:
        files = run.result_files()
        record |= {"status": FINISHED, "result_files": files, "result_sha256": hashing.sha256_json(files)}
        if run.log.exists():  # which a run without steps does not write
            record["log_sha256"] = hashing.sha256_file(run.log)
        write_card(run.result, record)
    write_run(run, record)


def _by_main(arguments: TrainingArguments, act: Callable[[], Any]) -> Any:
    """What `act` returns in the main process, told to all of them; where it fails there, all of them fail, and none waits for the others."""
    told: list[Any] = [None, None]
    failure: Exception | None = None
    if arguments.process_index == 0:
        try:
            told[0] = act()
        except Exception as error:
            failure = error
            said = f"the first process of this run failed: {type(error).__name__}: {reason(error)}"
            told[1] = error if isinstance(error, CoraError) else CoraError(said)
    if arguments.world_size > 1:
        broadcast_object_list(told)
    if failure is not None or told[1] is not None:
        raise failure or told[1]
    return told[0]


def _agree(arguments: TrainingArguments, decide: Callable[[], bool], fingerprint: dict[str, Any]) -> bool:
    """Let the main process decide about the directory and tell the others, so that no process reads while another writes.

    Raises `CoraError` also where processes have different inputs, as when the day ends between their starts.
    """
    answer, first = _by_main(arguments, lambda: (decide(), fingerprint))
    if first != fingerprint:
        detail = difference(first, fingerprint, "in the first process", "in this one")
        raise CoraError(f"the processes of this training have different inputs: {detail}; start it again")
    return bool(answer)


def _train_and_save(
    config: TrainConfig, prepared: Prepared, run: RunDirectory, arguments: TrainingArguments, model: Any, form: BatchForm
) -> dict[str, Any]:
    main = arguments.process_index == 0
    if main:
        shutil.rmtree(run.checkpoints / PARTIAL, ignore_errors=True)
    checkpoint = checkpoint_to_resume(run)
    if config.stop_at is not None:
        return _train_to_stop(config, prepared, run, arguments, model, form, checkpoint)
    before = _measure(model, form, prepared, arguments, "held-out loss before training", prepared.test)
    frozen_for_good = prepared.plan is not None and not method_of(prepared.plan.mode).can_train(prepared.plan)
    is_base = prepared.plan is not None and frozen_for_good and not prepared.plan.own.get("start")
    if frozen_for_good:
        zero = "a frozen factor is zero, so all gradients are zero: this run equals the base model and takes no step"
        say(zero if is_base else f"mode {config.mode} trains nothing here: this run takes no step")
        meter, speed, after = None, _NO_STEP, before
    else:
        trainer = _trainer(config, prepared, run, arguments, model, form)
        meter = _angle_meter(model, prepared.plan)
        speed = _fit(trainer, run, meter, checkpoint, config, prepared, form)
        after = _measure(model, form, prepared, arguments, "held-out loss after training", prepared.test)
    validation = None
    if config.validation_loss:
        validation = _measure(model, form, prepared, arguments, "validation loss after training", prepared.validation)
    weights = complete_weights(model, keep=main) if prepared.plan is None and is_sharded(model) else None
    written = {}
    if main:
        _save_result(config, prepared, run, model, weights)
        if before is not None and after is not None:
            rows = zip(before.nll.tolist(), after.nll.tolist(), before.tokens.tolist(), strict=True)
            writing.write_jsonl(run.heldout, [{"before": b, "after": a, "tokens": int(t)} for b, a, t in rows])
            written = {"heldout_sha256": hashing.sha256_file(run.heldout)}
    return {
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        # Again, since the method may have changed them.
        "parameters": parameter_counts(model, prepared.plan),
        "speed": speed,
        "peak_memory_bytes": peak_memory_bytes(prepared.hardware.device),
        "heldout": {"before": before.summary(), "after": after.summary(), "change": loss_change(before, after)}
        if before is not None and after is not None
        else None,
        **written,
        "validation": validation.summary() if validation is not None else None,
        "largest_angle_rad": meter.largest() if meter else None,
        "is_base_model": is_base,
    }


def _train_to_stop(
    config: TrainConfig,
    prepared: Prepared,
    run: RunDirectory,
    arguments: TrainingArguments,
    model: Any,
    form: BatchForm,
    checkpoint: Path | None,
) -> dict[str, Any]:
    """Train up to `stop_at` and write the validation loss there. The result is for sweeps, so nothing else is measured."""
    if prepared.plan is not None and not method_of(prepared.plan.mode).can_train(prepared.plan):
        speed = {**_NO_STEP, "steps": config.stop_at}
    else:
        trainer = _trainer(config, prepared, run, arguments, model, form)
        speed = _fit(trainer, run, _angle_meter(model, prepared.plan), checkpoint, config, prepared, form)
    step = speed["steps"]
    validation = _measure(model, form, prepared, arguments, f"validation loss at step {step}", prepared.validation)
    if validation is None:
        raise CoraError(f"{config.dataset} leaves no validation records, whose loss is the result of --stop-at")
    if arguments.process_index == 0:
        write_sealed(run.stop(step), {"step": step, "validation": validation.summary()})
    return {"speed": speed, "validation": validation.summary()}


def _trainer(
    config: TrainConfig, prepared: Prepared, run: RunDirectory, arguments: TrainingArguments, model: Any, form: BatchForm
) -> CoraTrainer:
    examples = prepared.train.examples
    last = config.stop_at or total_steps(config, len(examples))
    return CoraTrainer(model, arguments, examples, prepared.plan, run.checkpoints, config.keep_checkpoints, form, last)


def _angle_meter(model: Any, plan: AdapterPlan | None) -> AngleMeter | None:
    if not AngleMeter.applies(plan):
        return None
    assert isinstance(model, PeftModel)
    return AngleMeter(model)


def _fit(
    trainer: CoraTrainer,
    run: RunDirectory,
    meter: AngleMeter | None,
    checkpoint: Path | None,
    config: TrainConfig,
    prepared: Prepared,
    form: BatchForm,
) -> dict[str, Any]:
    done = step_of(checkpoint) if checkpoint else 0
    if trainer.is_world_process_zero():
        lines = read_jsonl(run.log, LogLine, drop_partial_tail=True) if run.log.exists() else []
        kept = [line for line in lines if line["step"] <= done]
        if lost := done - sum("loss" in line for line in kept):
            note(
                f"{run.log} has lost {lost:,} of {done:,} steps: the speed in {run.record.name} and the curve in reports will lack them"
            )
        writing.write_jsonl(run.log, kept)
    if checkpoint:
        say(f"resuming after step {done}")
    steps = total_steps(config, len(prepared.train.examples))
    with progress("training", steps, "steps", done=done) as shown:
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.add_callback(RunLog(run, trainer, meter, shown))
        if config.eval_steps:
            trainer.add_callback(_HeldOutEvery(config.eval_steps, steps, run, trainer, prepared, form))
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    # From the log, since a resumed run was trained by several processes.
    log = read_jsonl(run.log, LogLine) if trainer.is_world_process_zero() else []
    lines = [line for line in log if line.keys() >= {"loss", "tokens", "seconds"}]
    tokens, seconds = sum(line["tokens"] for line in lines), sum(line["seconds"] for line in lines)
    return {
        "steps": trainer.state.global_step,
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds if seconds else None,
    }


class _HeldOutEvery(transformers.TrainerCallback):
    """Measures the held-out loss during training; at its end, after `steps`, it is measured in any case."""

    def __init__(
        self, every: int, steps: int, run: RunDirectory, trainer: CoraTrainer, prepared: Prepared, form: BatchForm
    ) -> None:
        self._every, self._steps, self._run = every, steps, run
        self._trainer, self._prepared, self._form = trainer, prepared, form

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        is_step = "loss" in (logs or {})  # at a stop, transformers also logs a summary
        if not is_step or state.global_step % self._every or state.global_step >= self._steps:
            return
        loss = _measure(
            self._trainer.model,
            self._form,
            self._prepared,
            args,
            f"held-out loss at step {state.global_step}",
            self._prepared.test,
        )
        if state.is_world_process_zero and loss is not None:
            append_line(self._run.log, {"step": state.global_step, "epoch": state.epoch, "heldout_loss": loss.mean})


def _measure(
    model: Any, form: BatchForm, prepared: Prepared, arguments: TrainingArguments, label: str, records: EncodedSet
) -> HeldOutLoss | None:
    if not records.examples:
        return None
    rank, world = arguments.process_index, arguments.world_size
    loss = held_out_loss(model, records.examples, prepared.hardware, form, rank, world, label)
    if not math.isfinite(loss.mean):
        raise Diverged(f"the {label} is {loss.mean}: the model's output is not finite")
    return loss


def _save_result(
    config: TrainConfig, prepared: Prepared, run: RunDirectory, model: Any, weights: dict[str, Any] | None
) -> None:
    """Write the adapter, or the complete model; `weights` are those of one that is sharded."""
    if prepared.plan is None:
        with writing.atomic_path(run.model) as temporary:
            save_model(model, prepared.model_path, temporary, config.trust_remote_code, weights, prepared.template.ends)
            save_tokenizer(prepared.tokenizer, temporary, run.model)
        return
    assert isinstance(model, PeftModel)
    facts = AdapterFacts(
        plan=prepared.plan,
        base=prepared.model_path.reference,
        base_revision=prepared.model_path.revision,
        base_sha256=prepared.model_path.content_hash(),
        basis=str(Path(config.basis).resolve()) if config.basis else None,
        basis_sha256=prepared.basis.sha256 if prepared.basis else None,
        compact=config.compact,
    )
    save_adapter(model, run.adapter, facts, prepared.tokenizer if config.save_tokenizer else None)


@contextlib.contextmanager
def _interrupts_recorded(run: RunDirectory, main: bool) -> Iterator[None]:
    """Let the record of a run say that it was interrupted by the user."""
    try:
        yield
    except KeyboardInterrupt:
        if main:
            write_run(run, {**read_run(run), "status": INTERRUPTED})
        raise


def _meaning(error: Exception, run: RunDirectory, config: TrainConfig, prepared: Prepared) -> str | None:
    """What a library's exception means for a run: another process is gone, or the GPU or the disk is full; None for any other."""
    if is_lost_process(error):
        return str(lost_process(error))
    if isinstance(error, torch.OutOfMemoryError):
        return str(out_of_memory(config, prepared))
    if writing.is_disk_full(error) and not isinstance(error, CoraError):
        return f"{writing.what_is_full(error)}: {run.root} could not be written"
    return None


def _mark_failed(run: RunDirectory, error: Exception, meaning: str | None) -> None:
    """Record the failure if the disk allows it; the error itself matters more than its record."""
    try:
        diverged = {"diverged": True} if isinstance(error, Diverged) else {}
        write_run(run, {**read_run(run), "status": FAILED, "error": (meaning or str(error))[:500], **diverged})
    except CoraError:
        say(f"{run.record} could not be updated")


def _explained(error: Exception, run: RunDirectory, meaning: str | None) -> Exception:
    """Add where the last complete checkpoint is to what an exception means, see `_meaning`."""
    kept = checkpoints_in(run.checkpoints)
    where = (
        f"the last complete checkpoint is {kept[-1]}; --resume continues from it"
        if kept
        else "there was no checkpoint yet, so another training may take its place"
    )
    if isinstance(error, Diverged):
        return Diverged(f"{error}; {where}")
    return error if meaning is None else CoraError(f"{meaning}; {where}")
