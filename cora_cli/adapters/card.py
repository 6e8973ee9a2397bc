"""Writes the model card of what a run trained, and of what was exported or merged from it: `README.md` with the hub's metadata.

Everything in it is read from the run's record and from the files next to it, so equal runs have equal cards.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cora_cli import rundir, writing
from cora_cli.adapters.elsewhere import is_plain_lora, peft_loads, vllm_rank
from cora_cli.adapters.facts import SIDE_FILE, read_facts
from cora_cli.adapters.posterior import has_posterior
from cora_cli.errors import CoraError
from cora_cli.methods.method import AS_THE_FILE_SAYS
from cora_cli.methods.registry import label_of, method_of
from cora_cli.models.model_path import ModelPath
from cora_cli.models.trained_on import run_of
from cora_cli.records import read_run
from cora_cli.render.markdown_table import markdown_table
from cora_cli.render.table import with_interval

_ARXIV = re.compile(r"\d{4}\.\d{4,5}")
_HUB_DATASET = re.compile(r"[\w.-]+(/[\w.-]+)?")
"""No local path: a record names those from the root."""
_SHOWN_MODULES = 12


def write_card(directory: Path, record: Mapping[str, Any]) -> None:
    """Write the card of `directory`, which holds what the run with this `run.json` trained, or what was made of that."""
    writing.write_text(directory / rundir.CARD, card(directory, record))


def carry_card(
    directory: Path, adapter: ModelPath, base: ModelPath | None = None, rank: int | None = None, lost: float | None = None
) -> None:
    """Write the card of `directory`, exported or merged from `adapter`; nothing if that is not the result of a finished run.

    `base` is what it was merged into, `rank` what it was cut to and `lost` the share of its change that rounding took, if much; where these are not
    those of the training, its losses are those of another model.
    """
    run = run_of(adapter)
    if run is not None and run.result.resolve() == adapter.path.resolve() and (record := read_run(run))["status"] == "finished":
        notes, measured = [], record["heldout"] or record.get("validation")
        if base is not None and record["fingerprint"]["model_sha256"] not in base.content_hashes():
            name = base.reference.partition("@")[0] if base.revision else base.path.name
            notes.append(
                f"It is merged into {_code(name)} with the SHA-256 {_code(base.content_hash())}, another model than the one of the training"
                f"{', on which these losses were measured' if measured else ''}."
            )
        if measured and rank is not None and rank < record["plan"]["rank"]:
            notes.append(f"These are the losses of all {record['plan']['rank']} ranks, of which this has the first {rank}.")
        if lost is not None:
            notes.append(
                f"{lost:.0%} of the adapter's change is lost here, where weights are rounded to their type"
                f"{'; these losses are those of the adapter' if measured else ''}."
            )
        writing.write_text(directory / rundir.CARD, card(directory, record, notes=notes))


def card(
    directory: Path,
    record: Mapping[str, Any],
    name: str | None = None,
    evaluations: Mapping[str, Mapping[str, Any]] | None = None,
    verdict: Sequence[str] = (),
    remarks: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> str:
    """The text of the card.

    `name` is where others find the files, such as `org/name`; `evaluations` has the `metrics.json` of each evaluation by its folder, `remarks`
    sentences on scores that say less than they seem to, `verdict` sentences of a report, and `notes` say of what other model the losses are.
    """
    found = ModelPath(str(directory), directory, None)
    parts = [
        _metadata(found, record),
        f"# {_plain(_title(found, record))}",
        _facts(found, record),
        "## Data\n\n" + _data(record),
        "## Losses\n\n" + "\n\n".join([_losses(record), *notes]),
        *(["## Evaluation\n\n" + _evaluation(evaluations, remarks)] if evaluations else []),
        *(["## Verdict\n\n" + "\n\n".join(map(_plain, verdict))] if verdict else []),
        "## How to load it\n\n"
        + ("" if name else "`PATH` is the directory with these files.\n\n")
        + _loading(found, record, name or "PATH"),
        "## Versions and hashes\n\n" + _origin(record),
    ]
    return "\n\n".join(parts) + "\n"


def _base(record: Mapping[str, Any]) -> str | None:
    """The base model's name on the hub; None for one that is not from there."""
    model = record["model"]
    return str(model["reference"]).partition("@")[0] if model["revision"] else None


def _title(found: ModelPath, record: Mapping[str, Any]) -> str:
    base = _base(record) or Path(record["model"]["reference"]).name
    kind = f"{_mode(record)} adapter of {base}"
    if not found.is_adapter:
        return f"{base}, fine-tuned" if record["mode"] == "full" else f"{base} with a merged {_mode(record)} adapter"
    return kind if (found.path / SIDE_FILE).exists() else f"LoRA equal to a {kind}"


def _mode(record: Mapping[str, Any]) -> str:
    return f"{label_of(record['mode'], record['plan'])}{' (Laplace)' if 'laplace' in record else ''}"


def _metadata(found: ModelPath, record: Mapping[str, Any]) -> str:
    dataset, method = str(record["data"]["dataset"]), method_of(record["mode"])
    library = "transformers" if not found.is_adapter else "peft" if peft_loads(found) else "cora"
    kind = ["lora"] if found.is_adapter and found.adapter_config().get("peft_type") == "LORA" else []
    papers = [f"arxiv:{method.paper}"] if _ARXIV.fullmatch(method.paper) else []
    values = {
        **({"base_model": base} if (base := _base(record)) else {}),
        "library_name": library,
        "pipeline_tag": "text-generation",
        **({"datasets": [dataset]} if _HUB_DATASET.fullmatch(dataset) else {}),
        "tags": list(dict.fromkeys(["cora", *kind, record["mode"], *papers])),
    }
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---"


def _facts(found: ModelPath, record: Mapping[str, Any]) -> str:
    method, plan = method_of(record["mode"]), record["plan"]
    base = _code(_base(record) or Path(record["model"]["reference"]).name)
    revision = f" at revision {_code(record['model']['revision'])}" if record["model"]["revision"] else ""
    in_four_bits = ", held in 4 bits (NF4)" if record["fingerprint"]["settings"].get("load_in_4bit") else ""
    paper = f" ([arXiv {method.paper}](https://arxiv.org/abs/{method.paper}))" if _ARXIV.fullmatch(method.paper) else ""
    rows = [("base model", f"{base}{revision}{in_four_bits}"), ("method", f"{_code(method.name)}: {method.summary}{paper}")]
    if plan is not None:
        modules = plan["target_modules"]
        names = ", ".join(map(_code, modules[:_SHOWN_MODULES])) + (" …" if len(modules) > _SHOWN_MODULES else "")
        if own := plan.get("peft"):  # not every method of PEFT has a rank and an alpha
            stated = {name: value for name, value in own.items() if name != "target_modules"}
            rows.append(("settings", f"{_code(json.dumps(stated, ensure_ascii=False))}, on {names}"))
        else:
            rows.append(("rank and alpha", f"{plan['rank']} and {plan['alpha']:g}, on {names}"))
        # The summary has the starts of the method itself.
        starts = (("B", plan["b_init"], method.b_init), ("A", plan["a_init"], method.a_init))
        if unusual := " and ".join(f"{what} as {used} instead of {own}" for what, used, own in starts if used != own):
            rows.append(("start", f"{unusual} in this run"))
        rows += [("start", f"the mean change of other models ({plan['start']})")] if plan.get("start") else []
    if basis := record["basis"]:
        sources = ", ".join(_code(Path(source["reference"]).name) for source in basis["sources"])
        rows.append(("basis", f"of {sources}; SHA-256 {_code(basis['sha256'])}"))
    if found.is_adapter:
        config = found.adapter_config()
        rank = f" of rank {config['r']}" if config.get("r") else ""
        rows.append(
            ("stored as", f"{_code(config.get('peft_type'))}{rank}{', A alone (compact)' if _is_compact(found) else ''}")
        )
    rows.append(("trained parameters", f"{record['parameters']['trained']:,} of {record['parameters']['total']:,}"))
    steps, seed = record["speed"]["steps"], record["seeds"]["seed"]
    rows.append(
        ("training", f"{steps} steps, learning rate {record['fingerprint']['settings']['learning_rate']:g}, seed {seed}")
    )
    return "\n".join(f"- {what}: {text}" for what, text in rows)


def _data(record: Mapping[str, Any]) -> str:
    data = record["data"]
    held_out = "held-out, measured" if record["fingerprint"]["settings"].get("eval_limit") else "held-out"
    parts = [("training", data["train"]), (held_out, data["test"]), ("validation", data.get("validation"))]
    rows = [[name, f"{part['records']:,}", f"{part['tokens']:,}"] for name, part in parts if part and part["records"]]
    hashes = [f"SHA-256 of the records as they are divided {_code(record['fingerprint']['data_sha256'])}"]
    hashes += [f"of the held-out ones {_code(data['test_sha256'])}"] if "test_sha256" in data else []
    held_out_from = f" (held-out records: {_published({'dataset': other})})" if (other := data.get("test_dataset")) else ""
    return f"{_published(data)}{held_out_from}, template {_code(data['template'])}; {', '.join(hashes)}.\n\n" + markdown_table(
        ["records", "number", "tokens"], rows
    )


def _published(data: Mapping[str, Any]) -> str:
    """The reference of the data set that a record names, of a local one its name alone, and which part of it was read."""
    dataset = data["dataset"]
    parts = [f", {name} {_code(data[name])}" for name in ("subset", "split") if data.get(name)]
    return _code(Path(dataset).name if Path(dataset).is_absolute() else dataset) + "".join(parts)


def _losses(record: Mapping[str, Any]) -> str:
    heldout, validation = record["heldout"], record.get("validation")
    rows = [(f"held-out, {when} training", heldout[when]) for when in ("before", "after")] if heldout else []
    rows += [("validation, after training", validation)] if validation else []
    if not rows:
        return "No records were held out, so no loss was measured."
    cells = [[what, with_interval(loss["loss"], loss["ci95"], 4), f"{loss['n']:,}"] for what, loss in rows]
    change = ""
    if heldout:
        value = with_interval(heldout["change"]["value"], heldout["change"]["ci95"], 4)
        change = f"\n\nChange of the held-out loss, paired over records: {value}."
        if known := record["data"].get("held_out_trained_on"):
            change += (
                f"\n\nThe models behind it were trained on the prompts of {known} of these {heldout['after']['n']} held-out records, so the held-out "
                "loss says little about new ones."
            )
    if record["fingerprint"]["settings"].get("load_in_4bit"):
        change += (
            "\n\nThey were measured on the base in 4 bits; on its stored weights, as below, losses and answers differ a little."
        )
    return (
        "In nats per response token, with 95 % bootstrap intervals over records; one seed, whose spread they do not contain.\n\n"
        + markdown_table(["loss", "value", "records"], cells)
        + change
    )


def _evaluation(evaluations: Mapping[str, Mapping[str, Any]], remarks: Sequence[str]) -> str:
    rows = []
    signatures: dict[str, dict[str, list[str]]] = {}
    for folder, record in evaluations.items():
        for name, metric in record["metrics"].items():
            value = with_interval(metric["value"], metric["ci95"], 2 if name == "sacrebleu" else 4)
            rows.append([f"{_code(folder)} {name}", value, f"{metric['n']:,}"])
            signatures.setdefault(name, {}).setdefault(metric["signature"], []).append(_code(folder))
    generations = {folder: record["generation"] for folder, record in evaluations.items()}
    where = [
        f"The scores of {_code(folder)} are of the records of {_published(made)}."
        for folder, made in generations.items()
        if made.get("dataset")
    ]
    table = "\n\n".join([markdown_table(["metric", "value", "records"], rows), *where, *map(_plain, remarks)])
    notes = "95 % bootstrap intervals over records. Their signatures:"
    listed = []
    for name, found in signatures.items():
        for signature, folders in found.items():
            # Values of different signatures do not compare, so each says whose it is.
            whose = f" of {', '.join(folders)}" if len(found) > 1 else ""
            listed.append(f"- {name}{whose}: {_code(signature)}")
    return f"{table}\n\n{notes}\n\n" + "\n".join(listed)


def _loading(found: ModelPath, record: Mapping[str, Any], name: str) -> str:
    trusts = record["fingerprint"]["settings"].get("trust_remote_code") if found.is_adapter else found.has_own_code
    argument, flag = (", trust_remote_code=True", " --trust-remote-code") if trusts else ("", "")
    if not found.is_adapter:
        ways = {
            "transformers": f'AutoModelForCausalLM.from_pretrained("{name}"{argument})',
            "vLLM": f'vllm.LLM("{name}"{argument})',
        }
        return "\n".join(f"- {program}: `{call}`" for program, call in ways.items())
    base = _base(record) or "BASE"
    revision = f', revision="{record["model"]["revision"]}"' if record["model"]["revision"] else ""
    lines = []
    if not _base(record):
        lines.append("`BASE` is a local copy of the base model; its hash is below.")
    export = "`cora export` writes it as a plain LoRA for all of them"
    merge = "`cora merge` writes the base model with it as a plain model, which all of them load"
    other = merge if method_of(record["mode"]).lora_rank in (None, AS_THE_FILE_SAYS) else export
    if not peft_loads(found):
        lines.append(f"PEFT, transformers and vLLM cannot load it as it is stored; {other}.")
        if _is_compact(found):
            lines.append("B is not stored: `--basis` names the basis file, or the seed gives it.")
        where = "" if _base(record) else f" --base {base}"
        return "\n\n".join([*lines, f"    cora evaluate --model {name}{where} --dataset DATA -o EVALUATION{flag}"])
    lines.append(
        "With PEFT:\n\n"
        "```python\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{base}"{revision}{argument})\n'
        f'model = PeftModel.from_pretrained(base, "{name}")\n'
        "```"
    )
    if ends := record["data"].get("end_tokens"):
        lines.append(
            f"The base model's generation settings lack some of the tokens that end its answers; `generate` stops at all of them with `eos_token_id={ends}`."
        )
    if not is_plain_lora(found):
        return "\n\n".join([*lines, f"transformers alone and vLLM cannot load it as it is stored; {other}."])
    lines.append(
        "With transformers, where PEFT is installed:\n\n"
        "```python\n"
        f'model = AutoModelForCausalLM.from_pretrained("{base}"{revision}{argument})\n'
        f'model.load_adapter("{name}")\n'
        "```"
    )
    try:
        rank = vllm_rank(ModelPath("This adapter", found.path, None))
        at = f" --revision {record['model']['revision']}" if record["model"]["revision"] else ""
        lines.append(
            f"With vLLM:\n\n    vllm serve {base}{at}{flag} --enable-lora --max-lora-rank {rank} --lora-modules adapter={name}"
        )
    except CoraError as error:
        lines.append(f"{error}; `cora merge` writes the base model with it as a plain model.")
    if has_posterior(found):
        lines.append(
            f"They load the mean. `{rundir.POSTERIOR}` holds a distribution around it, which `cora evaluate` averages over."
        )
    return "\n\n".join(lines)


def _is_compact(found: ModelPath) -> bool:
    facts = read_facts(found.path)
    return facts is not None and facts.compact


def _origin(record: Mapping[str, Any]) -> str:
    used, before = (
        ", ".join(f"{name} {version}" for name, version in record.get(key, {}).items())
        for key in ("versions", "versions_before")
    )
    hashes = {"base model": record["fingerprint"]["model_sha256"], "what the run trained": record["result_sha256"]}
    listed = "\n".join(f"- SHA-256 of {what}: {_code(digest)}" for what, digest in hashes.items())
    return (
        f"Trained by {used}{f'; begun with {before}' if before else ''}.\n\n{listed}\n\n"
        "These hashes are over names and hashes of files. Of a published run, `cora verify DIR` computes that of what it trained again, and its losses and metrics."
    )


def _code(value: object) -> str:
    """A value as code, in which nothing acts as Markdown."""
    return f"`{' '.join(str(value).replace('`', chr(39)).split())}`"


def _plain(text: str) -> str:
    """Text in which a name cannot act as Markdown or HTML."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))
