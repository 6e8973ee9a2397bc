"""Chooses the files of a run for the hub, completes them with a card and their hashes, and uploads them in one commit.

The result lies at the top of the repository, where PEFT, vLLM and transformers look for it, and the run's records next to it, so that
`cora verify` can check a download.
"""

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cora_cli import hashing, rundir
from cora_cli.adapters.card import card
from cora_cli.environment import checked_proxy
from cora_cli.errors import CoraError, reason
from cora_cli.evaluation.metrics import unscorable_references
from cora_cli.evaluation.shortcomings import KINDS
from cora_cli.progress import say
from cora_cli.publishing.verify import check_run
from cora_cli.reading import read_json, read_text
from cora_cli.records import Metrics, Report, read_run, read_sealed
from cora_cli.reporting.collect import is_of_other_weights
from cora_cli.reporting.results import asked_otherwise
from cora_cli.rundir import RunDirectory, evaluations_in

Files = dict[str, Path | bytes]
"""What goes to each path of the repository: a file of this disk, or content."""
_KEPT = ".gitattributes"
"""The hub's own file."""


def size_of(content: Path | bytes) -> int:
    """The size in bytes of what goes to one path."""
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def files_of(run: RunDirectory, name: str, with_records: bool = True, report: Path | None = None) -> Files:
    """The files of a finished run, by their path in the repository `name`.

    Without `with_records`, held-out records and evaluations, which quote the data, are left out. `report` is a `report.json` whose verdict on
    the run goes into the card. Raises `CoraError` if the run is not finished or a file is not as recorded.
    """
    if not run.exists():
        raise CoraError(
            f"{run.root} is not a cora run (no {run.record.name} of cora); `cora publish` needs a finished run of `cora train`"
        )
    check_run(run)
    record = read_run(run)
    result = run.result_files()
    files: Files = {own: run.result / own for own in result}
    for path in (run.config, run.log, run.heldout, run.trained_prompts):
        files |= {path.name: path} if path.exists() else {}
    # Earlier versions did not list the files of the result, which now lie next to others.
    complete = json.dumps({**record, "result_files": result}, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    files[run.record.name] = run.record if "result_files" in record else complete.encode()
    evaluations = evaluations_in(run) if with_records else []
    if with_records and run.test_records.exists():
        files[run.test_records.name] = run.test_records
    for one in evaluations:
        paths = (one.predictions, one.generation, one.metrics, one.scores, one.executions)
        files |= {f"{one.root.name}/{path.name}": path for path in paths if path.exists()}
    scores = {one.root.name: read_json(one.metrics, Metrics) for one in evaluations}
    files[rundir.CARD] = _card(run, record, name, scores, verdict_of(report, record, scores) if report else [])
    return {**files, run.sums.name: _sums(files)}


def _card(run: RunDirectory, record: Mapping[str, Any], name: str, scores: Mapping[str, Any], verdict: list[str]) -> bytes:
    """The card with what came after the training, unless somebody has edited the one that is there."""
    there = run.result / rundir.CARD
    if there.exists() and read_text(there) != card(run.result, record):
        if verdict:
            raise CoraError(
                f"{there} was edited, so --report cannot add to it; write the verdict into it, or remove it to have a new one"
            )
        say(f"{there} was edited, so it is published as it is")
        return there.read_bytes()
    remarks = [
        sentence
        for folder, metrics in scores.items()
        for sentence in (*_conditions(folder, metrics["generation"], run, record), *_remarks(folder, metrics))
    ]
    remarks += _unlike_answers({folder: metrics["generation"] for folder, metrics in scores.items()})
    return card(run.result, record, name, scores, verdict, remarks).encode()


def _conditions(folder: str, generation: Mapping[str, Any], run: RunDirectory, record: Mapping[str, Any]) -> list[str]:
    """Sentences on what gave the answers of an evaluation, as far as it is not the run's result by itself, decoding greedily as it was trained."""
    if not (settings := generation.get("settings")):
        return [f"{folder}: nothing records which model gave its answers."]
    found = []
    if "members" in settings:
        found.append(f"{folder}: its scores are those of an ensemble of {len(settings['members'])} models.")
    elif is_of_other_weights(run, {"result_files": run.result_files()}, settings):
        is_base = settings["adapter_sha256"] is None and settings["model_sha256"] == record["fingerprint"]["model_sha256"]
        found.append(f"{folder}: its scores are those of {'the base model' if is_base else 'other weights than these'}.")
    elif rank := settings.get("rank"):
        found.append(f"{folder}: its scores are those of the first {rank} of {record['plan']['rank']} ranks.")
    if draws := sum(settings.get("draws") or ()):
        found.append(
            f"{folder}: its scores are those of probabilities averaged over {draws} draws of the weights, not of their mean."
        )
    if (decoding := settings.get("decoding", "greedy")) != "greedy":
        found.append(f"{folder}: its answers were {decoding}; of several, text metrics score the first.")
    if (lost := generation.get("rounded_away")) is not None:
        found.append(f"{folder}: its answers are of merged weights, where rounding lost {lost:.0%} of the adapter's change.")
    if asked := asked_otherwise(record, generation):
        found.append(f"{folder}: its prompts are not those of the training ({'; '.join(asked)}).")
    if record["heldout"] and (dtype := settings.get("dtype")) not in (None, measured := record["hardware"]["dtype"]):
        found.append(f"{folder}: its answers were computed in {dtype}, the losses above in {measured}.")
    return found


def _unlike_answers(generations: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence on the settings by which the answers of evaluations differ, with whose they are."""
    listed = []
    for name in ("max_new_tokens", "end_tokens", "dtype"):
        values: dict[str, list[str]] = {}
        for folder, made in generations.items():
            if (value := {**made.get("settings", {}), **made}.get(name)) is not None:
                values.setdefault(str(value), []).append(folder)
        if len(values) > 1:
            whose = (f"{value} ({', '.join(folders)})" for value, folders in values.items())
            listed.append(f"{name} {', '.join(whose)}")
    said = "The answers were generated with different settings, from which differences between these scores may come"
    return [f"{said}: {'; '.join(listed)}."] if listed else []


def _remarks(folder: str, record: Mapping[str, Any]) -> list[str]:
    """Sentences on the scores of an evaluation that say less than they seem to, as a report has them."""
    metrics, found = record["metrics"], []
    answers = next(iter(metrics.values()))["n"] if metrics else 0
    if known := record["generation"].get("prompts_trained_on"):
        found.append(f"{folder}: {known} of its {answers} prompts were trained on, so its scores say little about new ones.")
    found += [
        f"{folder}: {count} of {answers} answers {KINDS[kind]}."
        for kind, count in record.get("shortcomings", {}).items()
        if count
    ]
    return found + [f"{folder}: {name}: {said}." for name, said in unscorable_references(metrics).items()]


def _sums(files: Files) -> bytes:
    lines = []
    for name, content in sorted(files.items()):
        # Resolved, so that a link into the hub's cache is read.
        digest = hashing.sha256_bytes(content) if isinstance(content, bytes) else hashing.sha256_file(content.resolve())
        lines.append(f"{digest}  {name}\n")
    return "".join(lines).encode()


def verdict_of(path: Path, record: Mapping[str, Any], scores: Mapping[str, Any]) -> list[str]:
    """The sentences of a `report.json` about the method of the run with this `run.json`, and the conditions under which they hold. Raises `CoraError` if
    there are none, or if they are about other scores than the run's `metrics.json`, which `scores` has by folder."""
    digest = record["result_sha256"]
    for experiment in read_sealed(path, Report, remedy="; write it again with `cora report`")["experiments"]:
        for group in experiment["groups"]:
            line = next((line for line in group["lines"] if digest in line.get("results", [])), None)
            if line is None:
                continue
            if not line.get("chosen", True):
                raise CoraError(
                    f"the verdict of {path} on {line['method']} is about runs at another learning rate than this run's, which was not chosen; publish one of "
                    "them, or leave --report out"
                )
            _check_scores(path, line, record["seeds"]["seed"], scores)
            shown = [each for each in group["verdict"]["comparisons"] if line["method"] in (each["one"], each["other"])]
            sentences = (each["sentence"] for each in shown)
            return [group["verdict"]["headline"], *sentences, *experiment.get("conditions", ())]
    raise CoraError(
        f"{path} has no verdict on this run; name the report.json that `cora report RUNS -o DIR` wrote about it as it is now"
    )


def _check_scores(path: Path, line: Mapping[str, Any], seed: int, scores: Mapping[str, Any]) -> None:
    """Raise `CoraError` if the `line` of a report has a score of the run that no evaluation in it gives, as after it answered again."""
    for name, measure in line.get("measures", {}).items():
        reported = measure.get("by_seed", {}).get(str(seed))
        own = [metrics["metrics"][name]["value"] for metrics in scores.values() if name in metrics["metrics"]]
        if reported is not None and own and not any(math.isclose(reported, value, rel_tol=1e-9) for value in own):
            raise CoraError(
                f"the verdict of {path} is about another {name} of this run ({reported:.4g}) than its evaluations give now "
                f"({', '.join(f'{value:.4g}' for value in own)}); write the report again with `cora report`"
            )


def upload(name: str, files: Files, private: bool, overwrite: bool) -> str:
    """Create the repository if need be and put the files there in one commit; returns the address of the commit.

    Raises `CoraError` without a token, if the hub cannot be reached or refuses, and if the repository holds other files and `overwrite` is off.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
    from huggingface_hub.errors import HTTPError as NoAnswer  # type: ignore[attr-defined]  # of whichever library it uses

    if get_token() is None:
        raise CoraError("there is no Hugging Face token; run `hf auth login`, or set HF_TOKEN to a token that may write")
    api = HfApi()
    proxy = checked_proxy(api.endpoint, ("http", "https", "socks4", "socks5", "socks5h"), reads_all=True)
    try:
        try:
            there = api.model_info(name)
            others = sorted({file.rfilename for file in there.siblings or []} - {_KEPT})
            if others and not overwrite:
                raise CoraError(
                    f"{name} holds files already, such as {others[0]}; choose another name, or replace all of them with --overwrite"
                )
            if private and not there.private:
                raise CoraError(
                    f"{name} exists and is public, so --private would have no effect; make it private on the hub, or choose another name"
                )
        except RepositoryNotFoundError:
            others = []
            api.create_repo(name, private=private or None)
        say(f"uploading {len(files)} files, {sum(map(size_of, files.values())):,} bytes")
        operations = [CommitOperationAdd(path, content) for path, content in files.items()]
        removed = [CommitOperationDelete(path) for path in others if path not in files]
        commit = api.create_commit(name, [*operations, *removed], commit_message="Upload a run with cora publish")
    except OfflineModeIsEnabled as error:
        raise CoraError("the hub is not asked for anything while HF_HUB_OFFLINE is set; unset it to publish") from error
    except HfHubHTTPError as error:
        said = " ".join((error.server_message or reason(error)).split())
        raise CoraError(f"the hub refused {name}: {said} (status {error.response.status_code})") from error
    except ValueError as error:
        raise CoraError(f"{name} cannot be published: {reason(error)}") from error
    except (NoAnswer, OSError, ImportError) as error:  # the last one for a proxy of a kind that it cannot use
        raise CoraError(f"the hub at {api.endpoint} cannot be reached: {reason(error)}{proxy}") from error
    if changed := _changed(files):
        raise CoraError(
            f"{changed} was changed while it was uploaded to {name}, whose files do not fit together now; run the same command again with --overwrite"
        )
    return str(commit.commit_url)


def _changed(files: Files) -> str | None:
    """The first of the files that is not as their list of hashes says, such as one of an evaluation that was made again meanwhile."""
    stated = files.get(rundir.SUMS)
    if not isinstance(stated, bytes):
        return None
    for line in stated.decode().splitlines():
        name = line.partition("  ")[2]
        with contextlib.suppress(FileNotFoundError):
            if _sums({name: files[name]}).decode().strip() == line:
                continue
        return name
    return None
