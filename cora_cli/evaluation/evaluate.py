"""One evaluation, from a model or saved predictions to `metrics.json`.

This module reuses complete predictions; `targets` finds models and records, `backend` opens the model, `generate` produces the tokens, and
`scoring` computes the scores and writes the results.
"""

import contextlib
import dataclasses
import functools
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cora_cli import hashing
from cora_cli import records as shapes
from cora_cli.adapters.base import check_base
from cora_cli.adapters.loading import check_basis
from cora_cli.data.encode import (
    check_rows,
    continues_prompt,
    control_tokens_notice,
    encode_prompt,
    has_unknown,
    shorten_prompt,
    split_tokens,
    unknown_notice,
)
from cora_cli.data.records import (
    Record,
    Schema,
    is_among,
    place_of,
    repeated_notice,
    repeated_prompts,
    unused_columns,
)
from cora_cli.data.split import BUILTIN_PREFIX, Choice, load_test_records
from cora_cli.data.templates import (
    Rendered,
    Template,
    choose_template,
    end_notice,
    left_out_notice,
    plain_notice,
    unread_notice,
)
from cora_cli.device import Hardware, select_hardware
from cora_cli.errors import CoraError
from cora_cli.evaluation.backend import Backend, open_transformers, open_vllm
from cora_cli.evaluation.config import EvaluateConfig, check_predictions
from cora_cli.evaluation.directory import (
    BASE_ENDS,
    OWN_CODE,
    REPLACEMENT,
    check_nothing_is_lost,
    place_of_work,
    predictions_are_complete,
    put_in_place,
    recorded_date,
)
from cora_cli.evaluation.execution.problems import continues_function, problem_columns, problem_of
from cora_cli.evaluation.execution.sandbox import require_sandbox
from cora_cli.evaluation.execution.score import Executor
from cora_cli.evaluation.generate import Engine, Request, Work, generate, gives_back, say_left_out
from cora_cli.evaluation.metrics.calibration import tokens_of
from cora_cli.evaluation.processes import Processes, launched
from cora_cli.evaluation.reference_tokens import add_reference_tokens, reference_examples, reference_tokens
from cora_cli.evaluation.sampling import describe, streams
from cora_cli.evaluation.scoring import Evaluation, fetch_metrics, score
from cora_cli.evaluation.targets import Target, TrainedPrompts, check_own_records, find_targets, trained_prompts
from cora_cli.evaluation.thoughts import thought_tokens
from cora_cli.evaluation.vllm import lora_rank, require_vllm
from cora_cli.lock import own_directory
from cora_cli.models.tokenizer import load_tokenizer
from cora_cli.models.trained_on import known_prompts, say_other_weights, trained_on
from cora_cli.progress import note, say
from cora_cli.reading import read_jsonl
from cora_cli.rundir import EvaluationDirectory


def evaluate(config: EvaluateConfig) -> list[Evaluation]:
    """Evaluate everything that `config` names, in order, and return the results in the same order.

    Of several processes under a launcher, the first does this, and the others, which return nothing, help it to answer. Raises
    `CoraError` if a model, run, data set or predictions file cannot be read, or if other results are in the way.
    """
    hardware = select_hardware(config.device, config.dtype)
    with launched() as processes:
        if processes.is_first:
            return _evaluate(config, hardware, processes)
        _help(config, hardware, processes)
        return []


def _help(config: EvaluateConfig, hardware: Hardware, processes: Processes) -> None:
    """Answer the waves that the first process deals out, until it needs no more help."""
    while (told := processes.told()) is not None:
        if isinstance(told, Work):
            # Opened by the first wave, so that an error is the first process's as well, which ends the evaluation with it.
            engine = functools.cache(functools.partial(_helping_engine, config, hardware, told))
            answer = functools.partial(_answer_wave, told, engine)
            waves = told.waves
        else:
            with contextlib.suppress(Exception):  # the first process has it too, and reports it
                processes.answer_round(waves, told, answer)


def _helping_engine(config: EvaluateConfig, hardware: Hardware, work: Work) -> Engine:
    target, ends = work.model
    tokenizer = load_tokenizer(target.base, config.trust_remote_code, target.adapter)
    return open_transformers(config, target, hardware, tokenizer, ends).start(work.prompts)


def _answer_wave(work: Work, engine: Callable[[], Engine], wave: Sequence[int]) -> list[list[int]]:
    return work.answer(engine(), wave, lambda: None)


def _evaluate(config: EvaluateConfig, hardware: Hardware, processes: Processes) -> list[Evaluation]:
    """As `evaluate`, in the first of the processes."""
    if config.backend == "vllm" and processes.count > 1:
        raise CoraError("--backend vllm runs in one process; start it without torchrun, or use --backend transformers")
    executor = None
    if config.execute_code:
        require_sandbox()
        executor = Executor(config.same_process)
    if config.from_predictions:
        check_predictions(config.from_predictions)
        path = Path(config.from_predictions)
        out = EvaluationDirectory(Path(config.output_dir) if config.output_dir else path.parent)
        with own_directory(out.root):
            generation = _recorded_generation(path)
            return [
                score(
                    config, generation.get("name") or path.parent.name or path.name, path, out, hardware, generation, executor
                )
            ]
    targets = find_targets(config)
    adapters = [member.adapter for target in targets for member in target.members]
    check_basis(adapters, Path(config.basis) if config.basis else None)
    fetch_metrics(config)
    trained = trained_prompts(targets)
    with contextlib.ExitStack() as held:
        for target in targets:
            held.enter_context(own_directory(target.output.root, target.output.partial_predictions.name, REPLACEMENT))
        return [_evaluate_target(config, target, hardware, trained, executor, processes) for target in targets]


def _recorded_generation(path: Path) -> dict[str, Any]:
    """The `generation.json` next to the predictions at `path`; empty if it describes other predictions."""
    out = EvaluationDirectory(path.parent)
    recorded = shapes.read_generation(out)
    if recorded and recorded.get("predictions_sha256") != hashing.sha256_file(path):
        note(
            f"{path} is not the file that {out.generation.name} describes: it was changed after it was generated, so its settings are left out"
        )
        return {}
    return recorded


def _evaluate_target(
    config: EvaluateConfig,
    target: Target,
    hardware: Hardware,
    trained: TrainedPrompts,
    executor: Executor | None,
    processes: Processes,
) -> Evaluation:
    records, schema, also_trained = records_to_answer(config, target, trained)
    columns = [problem_columns(record) for record in records]
    problems = None
    if executor is not None:
        problems = [problem_of(own, place_of(record)) for own, record in zip(columns, records, strict=True)]
        executor.calibrate(problems)
    base_sha256 = target.base.content_hash()
    for member in target.members:
        if member.adapter is not None:
            check_base(member.adapter, member.base)
    settings = {
        "model": target.base.reference,
        "model_sha256": base_sha256,
        "tokenizer_sha256": target.tokenizer_hash(),
        # The base's settings end answers, too, and are no part of a tokenizer that lies with an adapter; None is that there are none.
        **({BASE_ENDS: target.base_ends_hash()} if target.tokenizer != target.base else {}),
        "adapter_sha256": target.adapter and target.adapter.content_hash(),
        **_ensemble_settings(target),
        "merged": config.merge and any(member.adapter and not member.draws for member in target.members),
        **({"draws": [member.draws for member in target.members]} if any(member.draws for member in target.members) else {}),
        **({"rank": target.rank} if target.rank is not None else {}),
        "records_sha256": hashing.sha256_json(records),
        "template": target.template,
        "max_new_tokens": config.max_new_tokens,
        "decoding": describe(config.temperature, config.samples, config.seed),
        "dtype": hardware.dtype_name,
        # A folder with code may have a type that transformers knows too, and be one model or the other.
        **({OWN_CODE: config.trust_remote_code} if any(one.base.has_own_code for one in target.members) else {}),
        **_backend_settings(config, target, hardware),
    }
    tokenizer = load_tokenizer(target.base, config.trust_remote_code, target.adapter)
    template = _template(target, schema, tokenizer, recorded_date(target.output, settings, config.overwrite))
    if template.reads_clock:
        settings["template_date"] = template.date
        say(f"{target.name}: the chat template writes the date into its prompts: {template.date}")
    elif config.template_date:
        raise CoraError(
            f"--template-date has no effect: the template {template.name} of {target.name} writes no date; leave it out"
        )
    out = place_of_work(target.output, settings, config.overwrite)
    complete = predictions_are_complete(out, settings, config.overwrite)
    if complete:
        check_nothing_is_lost(config, out.predictions, out)
    measured = not config.measures_calibration or (complete and _tokens(out.predictions) is not None)
    if not (complete and measured):
        say(f"{target.name}: {hardware.describe()}")
        rendered = [template.render(record) for record in records]
        prompts = [encode_prompt(text, tokenizer) for text in rendered]
        if [] in prompts:
            raise CoraError(f"{target.dataset}, record {prompts.index([]) + 1}: the prompt is empty; remove the record")
        # Some templates end an answer that calls a tool otherwise than the rest.
        ends = template.ends | {text.end for text in rendered if text.end is not None}
        backend = _open(config, target, hardware, tokenizer, ends, out)
        if not measured:
            examples = reference_examples(records, rendered, tokenizer, backend.rows, backend.context)
        if not complete:
            _say_about_records(target, records, rendered, prompts, template)
            _answer(
                config,
                target,
                settings,
                also_trained,
                records,
                columns,
                rendered,
                prompts,
                tokenizer,
                template,
                backend,
                out,
                processes,
            )
        if not measured:
            add_reference_tokens(out, reference_tokens(backend.model, examples))
            now = {**shapes.read_generation(out), "predictions_sha256": hashing.sha256_file(out.predictions)}
            shapes.write_sealed(out.generation, now)
    generation = _renamed(out, target.name, settings)
    evaluation = dataclasses.replace(
        score(config, target.name, out.predictions, out, hardware, generation, executor, problems), of_base=target.of_base
    )
    if out != target.output:
        put_in_place(target.output, out)
    shutil.rmtree(target.output.root / REPLACEMENT, ignore_errors=True)
    return evaluation


def _renamed(out: EvaluationDirectory, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The record of the generation, rewritten where it was made under other names, such as those of a directory that was moved."""
    recorded = shapes.read_generation(out)
    generation = {**recorded, "name": name, "settings": settings}
    if generation != recorded:
        shapes.write_sealed(out.generation, generation)
    return generation


def _template(target: Target, schema: Schema, tokenizer: Any, recorded: str | None) -> Template:
    """The template of the target's prompts, whose date may be a `recorded` one; says so where the training had another."""
    name = choose_template(target.template, schema, tokenizer)
    known = trained_on(target.adapter or target.base)
    if known is not None and known.template not in (None, name):
        note(f"{target.name} was trained with the template {known.template}, but these prompts have the template {name}")
    if target.template == "auto" and name == "plain":
        note(f"{target.dataset}: {plain_notice(tokenizer)}")
    return Template(name, schema, tokenizer, target.date or recorded)


def records_to_answer(config: EvaluateConfig, target: Target, trained: TrainedPrompts) -> tuple[list[Record], Schema, int]:
    """The records to answer, their schema, and how many of them the target itself was trained on. Raises `CoraError` if there are none."""
    with hashing.unchanged(Path(target.dataset)):
        records, schema = load_test_records(target.dataset, Choice(config.columns, config.subset, config.split))
        if not config.dataset:  # again, as they are read
            check_own_records(Path(target.dataset))
    if schema == "text":
        raise CoraError(
            f"{target.dataset} holds texts without prompts, so there is nothing to answer; compare runs by their held-out loss"
        )
    records = trained.separate(records, schema, target, config.exclude_trained)[: config.limit]
    if not records:
        raise CoraError(f"{target.dataset} has no records to answer")
    if repeated := repeated_prompts(records, schema):
        note(f"{target.dataset}, records: {repeated_notice(repeated, len(records))}")
    models = [model for one in target.members for model in (one.adapter, one.base) if model is not None]
    own = frozenset[str]().union(*map(known_prompts, models))
    return records, schema, sum(is_among(record, schema, own) for record in records)


def _ensemble_settings(target: Target) -> dict[str, Any]:
    """The members of an ensemble by the hashes of base and adapter; their order can change the last bits."""
    if not target.others:
        return {}
    members = [[one.base.content_hash(), one.adapter and one.adapter.content_hash()] for one in target.members]
    # Earlier versions took the mean over all draws of all members.
    weighted = {"mean": "over members"} if len({max(one.draws, 1) for one in target.members}) > 1 else {}
    return {"adapter_sha256": hashing.sha256_json(members), "members": members, **weighted}


def _open(
    config: EvaluateConfig, target: Target, hardware: Hardware, tokenizer: Any, ends: set[int], out: EvaluationDirectory
) -> Backend:
    if config.backend == "vllm":
        return open_vllm(config, target.base, target.adapter, hardware, ends, out.root)
    return open_transformers(config, target, hardware, tokenizer, ends)


def _answer(
    config: EvaluateConfig,
    target: Target,
    settings: dict[str, Any],
    also_trained: int,
    records: Sequence[Record],
    columns: Sequence[dict[str, Any] | None],
    rendered: Sequence[Rendered],
    prompts: Sequence[list[int]],
    tokenizer: Any,
    template: Template,
    backend: Backend,
    out: EvaluationDirectory,
    processes: Processes,
) -> None:
    """Write the answers to all records, and how they came about."""
    for member in target.members:
        say_left_out(member.base)
        if member.adapter is not None:
            say_other_weights(member.adapter)
    for record, prompt in zip(records, prompts, strict=True):
        check_rows(prompt, backend.rows, place_of(record), tokenizer)
    room = backend.context - config.max_new_tokens
    if room < 1:
        raise CoraError(
            f"--max-new-tokens {config.max_new_tokens} leaves no room for a prompt in the context of {backend.context} tokens; choose a smaller one"
        )

    def continues(text: Rendered, problem: dict[str, Any] | None) -> bool:
        return template.name != "chat" and continues_function(problem) and continues_prompt(text, tokenizer)

    references = [template.without_end(text.answer, backend.ends) for text in rendered]
    keeps = thought_tokens(tokenizer).union(*map(template.spelled_tokens, references)) - {*backend.ends}
    requests = [
        Request(
            shorten_prompt(prompt, room, tokenizer), text.prompt, reference, text.lead, stream, own, continues(text, own), keeps
        )
        for place, (prompt, text, reference, own) in enumerate(zip(prompts, rendered, references, columns, strict=True))
        for stream in streams(place, config.temperature, config.samples)
    ]
    # Without the end alone, whatever follows it.
    own = [
        (request, dataclasses.replace(text, closing=None))
        for request, text in zip(requests[:: config.samples], rendered, strict=True)
    ]
    if lost := sum(not gives_back(tokenizer, request, split_tokens(text, tokenizer)[1][:-1]) for request, text in own):
        note(
            f"{target.dataset} has {len(records)} records, {lost} with a reference that the tokenizer changes, such as by lower case, so that no "
            "answer can equal it"
        )
    cut = sum(len(prompt) > room for prompt in prompts)
    if cut:
        note(f"{target.name}: {cut} prompts were cut at the start to fit the context")
    shapes.write_sealed(out.generation, {"name": target.name, "settings": settings})
    engine = backend.start([request.input_ids for request in requests])
    speed = generate(engine, tokenizer, backend.ends, requests, out, config.samples, processes, (target, backend.ends))
    shapes.write_sealed(
        out.generation,
        {
            "name": target.name,
            "settings": settings,
            "template": template.name,
            **({"text_sha256": text} if (text := target.text_hash()) else {}),
            "prompts_cut": cut,
            "end_tokens": list(backend.ends),
            **({"dataset": other, **_chosen(config)} if (other := target.other_dataset(records)) else {}),
            **({"prompts_trained_on": also_trained} if also_trained else {}),
            **({"not_merged": backend.not_merged} if backend.not_merged else {}),
            **({"rounded_away": backend.rounded_away} if backend.rounded_away is not None else {}),
            "predictions_sha256": hashing.sha256_file(out.predictions),
            **speed,
            **({"processes": processes.count} if processes.count > 1 else {}),
        },
    )


def _chosen(config: EvaluateConfig) -> dict[str, str]:
    """Which part of a data set holds the records, as far as it was named."""
    return {name: chosen for name in ("subset", "split") if (chosen := getattr(config, name))}


def _tokens(predictions: Path) -> Sequence[shapes.ReferenceTokens] | None:
    """What the predictions hold of the reference tokens; None where they hold nothing."""
    return tokens_of(read_jsonl(predictions), predictions)


def _say_about_records(
    target: Target,
    records: Sequence[Record],
    rendered: Sequence[Rendered],
    prompts: Sequence[Sequence[int]],
    template: Template,
) -> None:
    if not target.dataset.startswith(BUILTIN_PREFIX) and (unused := unused_columns(records, template.schema)):
        note(f"{target.dataset}: columns that are not used: {', '.join(unused)}")
    if unread := template.unread(records):
        note(f"{target.dataset}: {unread_notice(unread)}")
    if (end := template.end_as_text) is not None:
        note(f"{target.name}: {end_notice(end)}")
    if left_out := Counter(role for text in rendered for role in text.left_out):
        note(f"{target.dataset}: {left_out_notice(left_out)}")
    asked = zip(prompts, rendered, strict=True)
    if count := sum(has_unknown(prompt, text.prompt, template.tokenizer) for prompt, text in asked):
        note(f"{target.dataset} has {len(records)} records, {unknown_notice(count)}")
    if count := sum(map(template.spells_control_tokens, records)):
        note(f"{target.dataset} has {len(records)} records, {control_tokens_notice(count)}")


def _backend_settings(config: EvaluateConfig, target: Target, hardware: Hardware) -> dict[str, Any]:
    """Backend settings that can change the tokens. Raises `CoraError` if vLLM is requested but cannot run this target."""
    if config.backend == "transformers":
        return {"backend": "transformers", "batch_size": config.batch_size, "attention": "transformers' default"}
    version = require_vllm(hardware)
    if target.adapter is not None and not config.merge:
        lora_rank(target.adapter)
    return {"backend": "vllm", "vllm": version, "batch_size": None, "attention": "vllm"}
