"""The transformers Trainer with batches of any form, a verified set of trained parameters, complete checkpoints, and a stop at NaN.

Optimizer, schedule, precision, distribution and reporting are the Trainer's own. `run` starts and ends the training.
"""

import json
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import AutocastKwargs
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from cora_cli.adapters.install import AngleMeter, apply_trained_set
from cora_cli.adapters.names import names_kept
from cora_cli.adapters.storage import make_room
from cora_cli.data.batches import GHOST, BatchForm, Collator, ExampleSet, GlobalBatches
from cora_cli.data.encode import Example
from cora_cli.errors import CoraError
from cora_cli.methods.method import Step
from cora_cli.methods.plan import AdapterPlan
from cora_cli.methods.registry import method_of
from cora_cli.progress import Progress
from cora_cli.rundir import RunDirectory
from cora_cli.training.checkpoints import checkpoints_in, seal
from cora_cli.training.losses import batch_losses
from cora_cli.training.sharding import average_gradients, complete_weights, divided, gathered, is_sharded, load_weights, most
from cora_cli.writing import give_usual_modes, open_to_append

PARTIAL = ".partial"


_NORM = "gradient norm"


class Diverged(CoraError):
    """The loss or its gradient is no longer finite."""


class CoraTrainer(Trainer):
    """Trains on batches of `form` up to `last_step`, and keeps the `keep` newest checkpoints in `root`.

    `plan` is None for full fine-tuning. A last step before the schedule's end gets a checkpoint.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        args: TrainingArguments,
        examples: Sequence[Example],
        plan: AdapterPlan | None,
        root: Path,
        keep: int,
        form: BatchForm,
        last_step: int,
    ) -> None:
        self._examples, self._root = ExampleSet(examples), root
        super().__init__(model=model, args=args, train_dataset=self._examples, data_collator=Collator(form))
        # Of a class that cannot divide by the tokens of a batch itself; `compute_loss` does it for every class.
        self.model_accepts_loss_kwargs = True
        self._plan, self._keep, self._last_step, self._form = plan, keep, last_step, form
        self._divides_trained = plan is None and is_sharded(model)
        if is_sharded(model):
            # Autocast would keep the bfloat16 copy of every complete layer until the end of the forward pass.
            self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
        self._method = method_of(plan.mode) if plan is not None else None
        for module in model.modules():
            if isinstance(module, LoraLayer):
                # Autocast already gives a bfloat16 input; PEFT would convert it to float32, and autocast back again.
                module.cast_input_dtype_enabled = not args.bf16
        self.batches = GlobalBatches(
            len(examples),
            args.per_device_train_batch_size,
            args.gradient_accumulation_steps,
            args.process_index,
            args.world_size,
            args.seed,
        )
        self.tokens = 0

    def get_train_dataloader(self) -> DataLoader:
        """The batches of this process; `GlobalBatches` has already distributed them, so nothing else may shard them."""
        return DataLoader(
            self._examples,
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
        )

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Sum of the response losses divided by the response tokens of the complete optimizer batch, over all processes.

        Gradients are averaged over processes afterwards, hence the factor. A method's own loss term is added once per micro-batch.
        """
        loss = batch_losses(model, inputs).sum() / num_items_in_batch * self.accelerator.num_processes
        if self._method is None or self._plan is None:
            return loss
        added = self._method.added_loss(self.accelerator.unwrap_model(model), self._plan) if inputs["is_last"] else None
        if added is None:
            return loss
        return loss + added / self.args.gradient_accumulation_steps

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """One micro-batch forward and backward, one pass after the other, so that only one of them takes memory.

        Raises `Diverged` before the optimizer uses a gradient that is not finite.
        """
        self.tokens += inputs["real_tokens"]
        *earlier, last = inputs["passes"]
        if is_sharded(model) and not self._form.is_one_pass:
            # Every process gathers every layer in each pass, so all of them need as many; a ghost has no loss.
            collate: Any = self.data_collator
            (ghost,) = collate([self._examples[GHOST]])["passes"]
            earlier += [ghost] * (self._most_passes(len(earlier)) - len(earlier))
        parts = []
        for each in earlier:
            # Processes may have different numbers of passes, so they only meet at the last one.
            with self.accelerator.no_sync(model):
                parts.append(super().training_step(model, {"passes": [each], "is_last": False}, num_items_in_batch))
        parts.append(super().training_step(model, {"passes": [last], "is_last": True}, num_items_in_batch))
        if is_sharded(model) and self.accelerator.sync_gradients:
            average_gradients(model)
        loss = torch.stack(parts).sum() if earlier else parts[0]
        self._require_usable(loss, "loss")
        return loss

    def _most_passes(self, count: int) -> int:
        return most(count, self.args.device)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Verify the trained set, then create the optimizer: the method's, or the Trainer's. Runs at every start and resume."""
        if self._plan is None or self._method is None:
            return super().create_optimizer(model)
        assert isinstance(self.model, PeftModel)
        apply_trained_set(self.model, self._plan)
        kind, options = self.get_optimizer_cls_and_kwargs(self.args)
        own = self._method.optimizer(self.model, kind, options, self.args.weight_decay, self._plan)
        if own is None:
            return super().create_optimizer(model)
        self.optimizer = own
        return own

    def _move_model_to_device(self, model: torch.nn.Module, device: torch.device) -> None:
        if not is_sharded(model):
            super()._move_model_to_device(model, device)

    def _wrap_model(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        if is_sharded(model):
            # Autocast only: accelerate would wrap it for data parallelism next.
            self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        return super()._wrap_model(model, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter, or the complete model under its own names, from the main process; all of them call this."""
        model: Any = self.model
        if self._plan is not None:
            if self.args.should_save:
                # PEFT would look for the size of the vocabulary in config.json, where models with code of their own may state none.
                model.save_pretrained(output_dir, save_embedding_layers=False)
            return
        weights = complete_weights(model, self.args.should_save) if self._divides_trained else None
        if self.args.should_save:
            # In the original form, the experts that transformers fuses would have names that the model does not know.
            model.save_pretrained(output_dir, state_dict=weights, save_original_format=False)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._divides_trained:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # Complete, so that a run can be resumed with or without `--shard`.
        optimizer, scheduler = self._optimizer_and_scheduler()
        state = gathered(optimizer.state_dict(), self.args.should_save)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self._divides_trained:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer, scheduler = self._optimizer_and_scheduler()
        state = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", mmap=True, weights_only=True)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for number, values in state["state"].items():
            values.update({name: divided(value, parameters[number]) for name, value in values.items()})
        optimizer.load_state_dict(state)
        scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _optimizer_and_scheduler(self) -> tuple[Any, Any]:
        return self.optimizer, self.lr_scheduler

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._plan is None:
            loaded: Any = self.model
            load_weights(loaded, Path(resume_from_checkpoint))
            return
        if isinstance(self.model, PeftModel):
            make_room(self.model, Path(resume_from_checkpoint))
        with names_kept():
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def before_step(self) -> None:
        """Let the method prepare the optimizer step that begins."""
        if self._method is not None and self._plan is not None:
            self._method.before_step(
                self.accelerator.unwrap_model(self.model), self._plan, self._step(self.state.global_step + 1)
            )

    def stop_if_last(self) -> None:
        """Save a checkpoint and stop after the last step."""
        if self.state.global_step >= self._last_step < self.state.max_steps:
            self.control.should_save = self.control.should_training_stop = True

    def after_step(self) -> None:
        """Let the method act on the weights of the optimizer step that has ended."""
        if self._method is not None and self._plan is not None:
            self._method.after_step(self.accelerator.unwrap_model(self.model), self._plan, self._step(self.state.global_step))

    def _step(self, number: int) -> Step:
        optimizer: Any = self.optimizer
        batch = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return Step(number, self.state.max_steps, getattr(optimizer, "optimizer", optimizer), len(self._examples), batch)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        # The last hook before the optimizer, called whether gradients are clipped or not.
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self._require_usable(torch.as_tensor(norm, device=self.args.device), _NORM)
        return norm

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A run killed between its last checkpoint and its end has no step left; the Trainer would take one more.
        if self.state.global_step >= self._last_step:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _require_usable(self, value: torch.Tensor, what: str) -> None:
        values = value.reshape(1)
        if self.accelerator.num_processes > 1:
            # Otherwise one process would wait for the others forever.
            values = self.accelerator.gather(values)
        if what == _NORM and self.state.global_step == 0 and not values.any():
            raise CoraError(
                "the gradient of everything that this run trains is exactly zero at step 1, so that it would learn nothing: the layers of "
                "--target-modules do not change the loss, or a kernel without a backward pass is in the way; --dtype fp32 may help"
            )
        wrong = values[~values.isfinite()]
        if len(wrong):
            step = self.state.global_step + 1
            raise Diverged(
                f"the {what} at step {step} is {wrong[0].item()}: training stopped before the weights changed; a lower "
                "--learning-rate usually helps"
            )

    def _get_output_dir(self, trial: Any) -> str:
        # Checkpoints are written elsewhere and renamed, so that one that exists is complete.
        return str(self._root / PARTIAL)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            name = f"checkpoint-{self.state.global_step}"
            root = self._root
            if (root / name).exists():
                shutil.rmtree(root / name)
            give_usual_modes(root / PARTIAL / name)
            seal(root / PARTIAL / name)
            (root / PARTIAL / name).rename(root / name)
            for old in checkpoints_in(root)[: -self._keep]:
                # Renamed first: a half-deleted checkpoint must not look complete.
                shutil.rmtree(old.rename(root / PARTIAL / old.name))
        self.accelerator.wait_for_everyone()


class RunLog(TrainerCallback):
    """Writes `log.jsonl`, a line per optimizer step with its time and its tokens (prompts included, of all processes), and shows progress."""

    def __init__(self, run: RunDirectory, trainer: CoraTrainer, meter: AngleMeter | None, shown: Progress) -> None:
        self._run, self._trainer, self._meter, self._shown = run, trainer, meter, shown
        self._began = self._seconds = 0.0
        self._seen = self._tokens = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save at this command's interval; a resumed Trainer would use the checkpoint's."""
        state.compute_steps(args, state.max_steps)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Tell the sampler the epoch, which the Trainer only tells samplers that accelerate has wrapped."""
        self._trainer.batches.set_epoch(int(state.epoch or 0))

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the step's clock."""
        self._began = time.monotonic()
        self._trainer.before_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the step's clock and count its tokens."""
        self._trainer.after_step()
        self._seconds = time.monotonic() - self._began
        self._tokens, self._seen = self._trainer.tokens - self._seen, self._trainer.tokens
        if args.world_size > 1:
            self._tokens = int(self._trainer.accelerator.gather(torch.tensor([self._tokens], device=args.device)).sum())
        self._trainer.stop_if_last()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Append the step's line."""
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        line = {
            "step": state.global_step,
            "epoch": state.epoch,
            "loss": logs["loss"],
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs.get("grad_norm"),
            "tokens": self._tokens,
            "seconds": round(self._seconds, 4),
        }
        if self._meter is not None:
            line["largest_angle_rad"] = self._meter.largest()
        append_line(self._run.log, line)
        self._shown.advance(1, f"loss {logs['loss']:.4f}")


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Append one JSON line and hand it to the operating system, so that a killed process loses no line."""
    with open_to_append(path) as file:
        file.write((json.dumps({key: _plain(value) for key, value in line.items()}) + "\n").encode())


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
