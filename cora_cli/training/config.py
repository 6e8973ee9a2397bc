"""The settings of `cora train`; `contradictions` checks their values.

One frozen object holds the complete request; a run directory records it as `config.yaml`.
"""

import dataclasses
import functools
import typing
from typing import TYPE_CHECKING, Any

from cora_cli.errors import CoraError, UsageError
from cora_cli.methods.plan import AdapterPlan, AdapterRequest
from cora_cli.methods.registry import METHODS, OWN_SETTINGS, plan_adapter
from cora_cli.reading import checked, read_yaml
from cora_cli.rundir import RunDirectory
from cora_cli.settings import given, setting
from cora_cli.training.contradictions import check_plan, contradictions
from cora_cli.training.proposal import AUTO
from cora_cli.training.settings import DEFAULT_RATE, SharedSettings

_ONE_METHOD = "Settings of single modes"
NOT_PART_OF_THE_RESULT = frozenset(
    {
        "output_dir",
        "resume",
        "stop_at",
        "dry_run",
        "rate_from",
        "processes",
        "report_to",
        "device",
        "save_steps",
        "keep_checkpoints",
        "save_tokenizer",
        "validation_loss",
        "tokens_per_row",
        "attention",
        "compile",
        "liger",
        "shard",
        "model",
        "dataset",
        "test_dataset",
        "columns",
        "subset",
        "split",
        "basis",
        "start_models",
    }
)
"""Settings that may differ between a run and its resumption: they do not change the result beyond rounding, or they locate an input whose content
hash is compared anyway."""


@dataclasses.dataclass(frozen=True)
class _CheckedSettings(SharedSettings):
    """The shared settings, checked, and what follows from them."""

    def __post_init__(self) -> None:
        """Check everything that needs no file or model, and report all problems together."""
        problems = contradictions(self)
        if problems:
            raise UsageError("; ".join(problems))
        if (plan := self.adapter_plan()) is not None:
            check_plan(self, plan)

    @property
    def peak_rate(self) -> float:
        """The learning rate; while it is to be proposed, the default in its place, for what does not depend on it."""
        return DEFAULT_RATE if self.learning_rate == AUTO else self.learning_rate

    def adapter_plan(self) -> AdapterPlan | None:
        """The adapter that this configuration asks for; None for full fine-tuning. Raises `UsageError` for contradictions."""
        return self._adapter_plan

    def notices(self) -> list[str]:
        """Sentences on settings that have no effect, such as those of an adapter, which a user may keep from another run, and on others that may not be
        meant."""
        plan = self.adapter_plan()
        found = [] if plan is None else METHODS[self.mode].notices(plan)
        return [*(f"{flag} has no effect {why}" for why, names in self.unused().items() for flag in given(self, names)), *found]

    def unused(self) -> dict[str, list[str]]:
        """The settings that have no effect, whether they are given or not, by the words for why."""
        if (plan := self.adapter_plan()) is None:
            names, where = ["rank", "target_modules", "dropout"], f"in mode {self.mode}, which has no adapter"
        else:
            overruled = self.mode == "peft"
            names = [name for name in ("rank", "target_modules") if overruled and getattr(plan, name) != getattr(self, name)]
            where = "with --peft-config, which states it"
        unused = {where: names}
        if self.max_steps is not None:
            unused["with --max-steps, which decides how long the run is"] = ["epochs"]
        if self.test_size == 0 and self.test_dataset is None:
            unused["with --test-size 0, which holds out nothing"] = ["eval_steps", "eval_limit"]
        return unused

    @functools.cached_property
    def _adapter_plan(self) -> AdapterPlan | None:
        own = {setting.name: getattr(self, setting.name) for setting in METHODS[self.mode].settings}
        request = AdapterRequest(
            rank=self.rank,
            alpha=2.0 * self.rank if self.alpha is None else self.alpha,
            rslora=self.rslora,
            target_modules=self.target_modules,
            dropout=self.dropout,
            seed=self.seed,
            b_init=self.b_init,
            a_init=self.a_init,
            has_basis=bool(self.basis),
            start=self.start,
            own={name: value for name, value in own.items() if value is not None},
        )
        return plan_adapter(self.mode, request)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for YAML, readable by `--config`; unset ones are left out, and so is what makes a command no run."""
        others = ("dry_run", "probe", "probe_examples", "stop_at")  # a run that stopped goes on by its file
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in others}
        values |= {name: list(value) for name, value in values.items() if isinstance(value, tuple)}
        return {name: value for name, value in values.items() if value is not None}

    def result_settings(self) -> dict[str, Any]:
        """The settings that determine the result; a resumed run must have the same ones.

        Settings that came after the first version are left out at their defaults, as in the records of runs from before.
        """
        later = {"load_in_4bit": False, "train_on": "last"}
        left_out = NOT_PART_OF_THE_RESULT | {name for name, default in later.items() if getattr(self, name) == default}
        return {name: value for name, value in self.as_dict().items() if name not in left_out}


if TYPE_CHECKING:
    TrainConfig = _CheckedSettings
else:
    TrainConfig = dataclasses.make_dataclass(
        "TrainConfig",
        [(own.name, own.type | None, setting(own.help, None, panel=_ONE_METHOD)) for own in OWN_SETTINGS],
        bases=(_CheckedSettings,),
        frozen=True,
        namespace={"__module__": __name__, "__doc__": "Every setting of `cora train`: the shared ones and each method's own."},
    )


def config_of_run(run: RunDirectory, **changes: Any) -> TrainConfig:
    """The settings that a run recorded, with `changes`. Raises `CoraError` naming the file where they are missing or damaged."""
    values = read_yaml(run.config, "configuration of the run")
    hints = typing.get_type_hints(TrainConfig)
    if unknown := sorted(values.keys() - hints):
        raise CoraError(f"{run.config} is damaged or from another version of cora: it has the unknown key {unknown[0]}")
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    for name in values.keys() - lists.keys():
        checked(values[name], hints[name], f"{run.config}: {name}")
    try:
        return TrainConfig(**{**values, **lists, **changes})
    except TypeError as error:
        raise CoraError(f"{run.config} is damaged: {error}") from error
