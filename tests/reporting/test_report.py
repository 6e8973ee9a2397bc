import base64
import csv
import gzip
import io
import json
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cora_cli import writing
from cora_cli.errors import CoraError
from cora_cli.experiments.paper import paper, paper_row
from cora_cli.reading import read_json, read_jsonl
from cora_cli.reporting.collect import collect
from cora_cli.reporting.measures import LOSS
from cora_cli.reporting.numbers import COLUMNS
from cora_cli.reporting.plots import side_by_side
from cora_cli.reporting.report import FILES, report
from cora_cli.reporting.report_rows import read_plan
from cora_cli.reporting.tables import p_value_cell
from cora_cli.rundir import RunDirectory
from tests.render.strict_latex import check
from tests.reporting.helpers import Made, make_grid, plan_entry, write_plan

VOID = {"meta", "br", "img", "link", "hr", "input"}


EVIL = "<script>alert('x')</script> & \"q\" $x_1$ \\end{table} `|`"


class StrictHtml(HTMLParser):
    """Refuses unbalanced elements, and keeps names, attributes and ids."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag


def parse(page):
    parser = StrictHtml()
    parser.feed(page)
    assert not parser.open
    return parser


@pytest.fixture(scope="module")
def paper_grid(tmp_path_factory):
    """A grid under the paper's printed names, with two learning rates, a missing row and a hostile name."""
    rows = [Made("base", "base", rank=None, rate=None, skill=0.2)]
    for rank in (8, 16):
        for rate, handicap in ((1e-4, 0.2), (1e-3, 0.0)):
            for seed in (0, 1):
                rows += [
                    Made(
                        "lora",
                        "lora",
                        seed,
                        0.5,
                        1.0 + handicap,
                        rank,
                        rate=rate,
                        printed=f"LoRA_code_{rank}",
                        trained=200 * rank,
                    ),
                    Made(
                        "fb", "fb", seed, 0.9, 0.8 + handicap, rank, 5, rate, printed=f"CoRA_code_FB_{rank}", trained=100 * rank
                    ),
                ]
    root = make_grid(
        tmp_path_factory.mktemp("paper") / "grid",
        rows,
        paper_table="rank",
        title=f"Ranks {EVIL}",
        preset="small",
        conditions=[f"Differs: {EVIL}"],
    )
    shutil.rmtree(root / "runs" / rows[-1].name)
    return root


@pytest.fixture(scope="module")
def written(paper_grid, tmp_path_factory):
    """All formats of the paper's grid on disk."""
    out = tmp_path_factory.mktemp("written") / "report"
    report([str(paper_grid)], output_dir=out)
    return out


def test_a_grid_of_losses_alone_is_reported_in_every_format(made_grid, tmp_path):
    grid = Path(shutil.copytree(made_grid, tmp_path / "grid"))
    plan = read_json(grid / "plan.json")
    writing.write_json(grid / "plan.json", plan | {"rows": [row | {"evaluation": None} for row in plan["rows"]]})
    text = report([str(grid)], "markdown", tmp_path / "report")
    assert "held-out loss" in text
    assert "rouge" not in text
    assert "## Missing" not in text
    assert {path.name for path in (tmp_path / "report").iterdir()} == {*FILES.values(), "plots"}
    parse((tmp_path / "report" / "report.html").read_text())


def test_every_format_and_every_plot_is_written(written):
    assert {path.name for path in written.iterdir()} == {*FILES.values(), "plots"}
    names = {path.name for path in (written / "plots").iterdir()}
    assert names == {f"1-{name}.{kind}" for name in ("forest", "loss", "by-rank", "bars", "pareto") for kind in ("svg", "png")}


@pytest.mark.parametrize(
    ("methods", "drawn"),
    [
        pytest.param([(4, 1), (8, 2)], {}, marks=pytest.mark.slow),
        pytest.param([(4, 1), (8, 1)], {"1-by-rank": ["fb"]}, marks=pytest.mark.slow),
        ([(4, 1), (8, 1), (4, 2), (8, 2)], {"1-by-number-of-models": ["fb r=4", "fb r=8"], "1-by-rank": ["fb n=1", "fb n=2"]}),
    ],
)
def test_along_a_line_of_a_plot_rank_and_number_of_models_do_not_both_change(methods, drawn, tmp_path):
    rows = [Made("fb", "fb", rank=rank, n_models=count) for rank, count in methods]
    report([str(make_grid(tmp_path / "grid", rows))], output_dir=tmp_path / "report")
    plots = {path.stem: path.read_text() for path in sorted((tmp_path / "report" / "plots").glob("1-by-*.svg"))}
    assert {name: re.findall(r">(fb(?: [nr]=[0-9])?)<", text) for name, text in plots.items()} == drawn


def test_the_papers_number_stands_beside_ours(written):
    text = (written / "report.txt").read_text()
    line = next(line for line in text.splitlines() if "CoRA_code_FB_16" in line)
    assert "fb r=16 n=5" in line
    assert "(0.418)" in line
    assert "(27.502)" in line
    assert "arXiv 2409.02119v1, meta-llama/Llama-2-13b-hf, one seed" in text


def test_the_learning_rate_was_chosen_by_the_held_out_loss_and_the_report_says_so(written):
    data = json.loads((written / "report.json").read_text())
    (group,) = data["experiments"][0]["groups"]
    assert {line["learning_rate"] for line in group["lines"] if line["chosen"]} == {None, 1e-3}
    assert {line["learning_rate"] for line in group["lines"]} == {None, 1e-4, 1e-3}
    text = (written / "report.md").read_text()
    assert "at the learning rate with its lowest held-out loss (mean over seeds)" in text
    assert "This choice makes the held-out loss, and any measure on the same records, slightly too favourable" in text
    assert "all learning rates" in text


def test_what_is_missing_is_listed_with_its_reason(written):
    assert "seed1 (run): not started" in (written / "report.txt").read_text()


def test_the_page_needs_nothing_but_itself_and_fits_a_phone(written):
    page = (written / "report.html").read_text()
    parser = parse(page)
    assert not [tag for tag, _ in parser.elements if tag in ("link", "img", "iframe", "object")]
    assert not [attributes for tag, attributes in parser.elements if tag == "script" and "src" in attributes]
    policy = next(attributes["content"] for tag, attributes in parser.elements if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'")
    links = [
        value for _, attributes in parser.elements for key, value in attributes.items() if key in ("src", "href", "xlink:href")
    ]
    assert all(link.startswith("#") for link in links)
    assert not re.search(r"@import|url\((?!#)", page)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in parser.elements
    assert "prefers-color-scheme: dark" in page
    ids = [attributes["id"] for _, attributes in parser.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links} <= set(ids)


def test_what_comes_from_files_is_escaped_on_the_page(written):
    page = (written / "report.html").read_text()
    assert EVIL not in page
    assert "<script>alert" not in page
    assert "&lt;script&gt;" in page


def test_the_page_has_the_answers_of_every_chosen_run_with_their_scores(written, paper_grid):
    page = (written / "report.html").read_text()
    packed = re.search(r'<script type="application/octet-stream">([^<]*)</script>', page)
    data = json.loads(gzip.decompress(base64.b64decode(packed[1])))
    assert data["total"] == len(data["prompts"]) == 40
    assert {"LoRA_code_16, seed 0", "LoRA_code_16, seed 1"} <= set(data["runs"])
    place = data["runs"].index("LoRA_code_16, seed 1")
    evaluation = next((paper_grid / "runs").glob("*lora_r16*lr0.001_seed1")) / "evaluation"
    lines, scores = read_jsonl(evaluation / "predictions.jsonl"), read_jsonl(evaluation / "scores.jsonl")
    for (prompt, reference, answers), line, score in zip(data["prompts"], lines, scores, strict=True):
        assert (prompt, reference) == (line["prompt"], line["reference"])
        text, values, notes = answers[place]
        assert (text, notes) == (line["prediction"], [])
        assert values == [round(score[name], 4) for name in data["measures"]]


def test_the_latex_is_well_formed_and_holds_every_table(written):
    environments = check((written / "report.tex").read_text())
    assert environments.count("tabular") == 4


def test_markdown_shows_names_as_they_are(written):
    text = (written / "report.md").read_text()
    assert "\\<script\\>" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", line)) == len(re.findall(r"(?<!\\)\|", table[0])) for line in table[:6])


def test_the_csv_is_tidy_and_in_full_precision(written, paper_grid):
    rows = list(csv.DictReader(io.StringIO((written / "report.csv").read_text())))
    assert tuple(rows[0]) == COLUMNS
    keys = [(row["row"], row["learning_rate"], row["measure"]) for row in rows]
    assert len(keys) == len(set(keys))
    base = next(row for row in rows if row["mode"] == "base" and row["measure"] == "rougeL")
    recorded = read_json(paper_grid / "evaluations" / "base" / "metrics.json")["metrics"]["rougeL"]
    assert float(base["value"]) == recorded["value"]
    assert [float(base["low"]), float(base["high"])] == recorded["ci95"]
    paper = next(row for row in rows if row["row"] == "LoRA_code_8" and row["measure"] == "sacrebleu")
    assert paper["paper"] == "25.558"


def test_the_json_has_the_value_of_every_seed(written):
    (group,) = json.loads((written / "report.json").read_text())["experiments"][0]["groups"]
    line = next(line for line in group["lines"] if line["row"] == "LoRA_code_8" and line["chosen"])
    by_seed = line["measures"]["rougeL"]["by_seed"]
    assert set(by_seed) == {"0", "1"}
    assert line["measures"]["rougeL"]["value"] == pytest.approx(sum(by_seed.values()) / 2)


def test_plots_are_complete_pictures_that_name_what_they_show(written):
    for path in (written / "plots").glob("*.svg"):
        root = ElementTree.fromstring(path.read_text())
        assert root.tag.endswith("svg")
        assert len([element for element in root.iter() if element.tag.endswith("text")]) > 5
    for path in (written / "plots").glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_the_same_directories_give_the_same_bytes(paper_grid, written, tmp_path):
    report([str(paper_grid)], output_dir=tmp_path)
    for path in written.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / path.relative_to(written)).read_bytes(), path.name


@pytest.fixture(scope="module")
def swept_report(tmp_path_factory):
    """Three seeds at three rates each: fb is clearly the best, lora and the random control are alike; all formats on disk."""
    root = tmp_path_factory.mktemp("swept")
    rows = [Made("base", "base", skill=0.2, rank=None, rate=None)]
    for rate, handicap in ((3e-4, 0.3), (1e-3, 0.0), (3e-3, 0.3)):
        for seed in range(3):
            rows += [
                Made("lora", "lora", seed, 0.5, 1.0 + handicap, rate=rate, trained=2000),
                Made("fb", "fb", seed, 0.9, 0.8 + handicap, n_models=2, rate=rate),
                Made("fb orthonormal", "fb", seed, 0.5, 1.0 + handicap, b_init="orthonormal", rate=rate),
            ]
    report([str(make_grid(root / "grid", rows, margin={"heldout_loss": 0.05}))], output_dir=root / "report")
    return root / "report"


def test_the_best_is_bold_where_it_is_better_by_the_rule_and_the_note_says_what_bold_means(swept_report):
    text = (swept_report / "report.md").read_text()
    fb = next(line for line in text.splitlines() if line.startswith(("| **fb", "| fb r=4 n=2")))
    assert fb.count("**") >= 2 * 3
    assert text.count("Bold: the best value of its column") == 1
    assert "Holm-corrected over the table" in text


def test_the_page_opens_with_the_forest_plot_in_which_the_controls_row_is_under_the_informed_one(swept_report):
    main = (swept_report / "report.html").read_text().partition("<main>")[2]
    before = ElementTree.fromstring(f"<main>{main.partition('<figure>')[0].replace('<section>', '')}</main>")
    assert [element.tag for element in before] == ["h1", "h2"]  # nothing but the title and the heading of the verdict
    svg = (swept_report / "plots" / "1-forest.svg").read_text()
    labels = [element.text.strip() for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("text")]
    informed = labels.index("fb r=4 n=2 − lora r=4")
    assert labels[informed + 1] == "↳ fb orthonormal r=4 − lora r=4"
    assert {"better", "equivalent", "undecided"} & set(labels)


def test_the_json_and_the_csv_have_every_number_of_a_test(swept_report):
    data = json.loads((swept_report / "report.json").read_text())
    assert data["format_version"] == 2
    comparisons = data["experiments"][0]["groups"][0]["verdict"]["comparisons"]
    test = next(test for test in comparisons[0]["tests"] if test["measure"] == "heldout_loss")
    assert test["outcome"] == "better"
    assert test["margin"] == 0.05  # the grid's
    assert test["ci95"][0] < test["ci90"][0] < test["difference"] < test["ci90"][1] < test["ci95"][1]
    assert test["p"] <= test["p_holm"] < 0.05
    assert test["seeds"] == [3, 3]
    assert set(test["components"]) == {"seed", "record", "interaction"}
    rows = csv.DictReader(io.StringIO((swept_report / "report.csv").read_text()))
    row = next(row for row in rows if row["outcome"] and row["measure"] == "heldout_loss")
    assert (float(row["value"]), float(row["p_holm"])) == (test["difference"], test["p_holm"])


def test_an_interval_of_zero_width_that_an_earlier_version_recorded_is_printed_as_none(tmp_path):
    grid = make_grid(tmp_path / "grid", [Made("fb", "fb", skill=1.0), Made("lora", "lora")], prompts=6)
    metrics = next(path for path in sorted(grid.rglob("metrics.json")) if "fb" in str(path))
    record = read_json(metrics)
    assert record["metrics"]["rouge1"]["ci95"] is None
    record["metrics"]["rouge1"]["ci95"] = [1.0, 1.0]
    writing.write_json(metrics, record)
    row = next(line for line in report([str(grid)], "markdown").splitlines() if line.startswith("| fb"))
    assert row.split("|")[3].strip() == "1.000 –"


def test_a_missing_interval_is_an_empty_cell_of_the_csv(tmp_path):
    grid = make_grid(tmp_path / "grid", [Made("fb", "fb", skill=1.0), Made("lora", "lora")], prompts=6)
    rows = csv.DictReader(io.StringIO(report([str(grid)], "csv")))
    alike = next(row for row in rows if row["mode"] == "fb" and row["measure"] == "rouge1")
    assert (alike["value"], alike["low"], alike["high"]) == ("1.0", "", "")


def test_two_seeds_never_print_an_interval_of_zero_width(made_grid):
    text = report([str(made_grid)], "markdown")
    assert "± 0.000" not in text
    assert "A decision needs at least 3 seeds per method." in text


@pytest.mark.parametrize(
    ("p_holm", "printed"),
    [(None, "–"), (0.0004, "< 0.001"), (0.0494, "0.049"), (0.04999, "< 0.050"), (0.05, "0.050"), (1, "1.000")],
)
def test_a_p_value_below_the_level_is_not_printed_as_the_level(p_holm, printed):
    assert p_value_cell(p_holm).text == printed


def test_nothing_is_bold_where_the_best_two_are_alike(tmp_path):
    rows = [Made("lora", "lora", skill=0.5), Made("fb orthonormal", "fb", skill=0.5, b_init="orthonormal")]
    text = report([str(make_grid(tmp_path, rows))], "markdown")
    assert not [line for line in text.splitlines() if line.startswith("|") and "**" in line]
    assert "Nothing is in bold" in text


def test_really_trained_runs_give_a_report_with_their_own_records(trained_grid, tmp_path):
    page = report([str(trained_grid)], "html", tmp_path)
    parse(page)
    assert "variance" in {path.stem for path in (tmp_path / "plots").iterdir()}
    text = (tmp_path / "report.txt").read_text()
    record = read_json(next((trained_grid / "runs").iterdir()) / "run.json")
    for expected in (
        "6 runs trained",
        f"torch {record['versions']['torch']}",
        f"{record['data']['train']['records']} training records",
        "4 optimizer steps of 8 × 1 examples",
        "seeds 0 / 1",
        "B starts as zeros / basis / orthonormal",
        "greedy decoding, at most 4 new tokens",
        "sacrebleu|nrefs:1",
        record["hardware"]["dtype_reason"],
    ):
        assert expected in text
    assert "7 of 7 rows are finished." in text
    check((tmp_path / "report.tex").read_text())


def test_a_grid_that_only_extracts_bases_gives_its_figure(tiny_basis, tmp_path):
    entry = plan_entry(Made("svd", "basis", rank=None, rate=None)) | {
        "run": None,
        "evaluation": None,
        "basis": "bases/b.safetensors",
    }
    write_plan(tmp_path, [entry])
    with pytest.raises(CoraError, match="not extracted yet"):
        report([str(tmp_path)])
    (tmp_path / "bases").mkdir()
    shutil.copy(tiny_basis, tmp_path / "bases" / "b.safetensors")
    page = report([str(tmp_path)], "html")
    assert page.count("<figure>") == 1
    assert "<table>" not in page


def test_a_damaged_basis_is_named_and_does_not_stop_the_rest(trained_grid, tmp_path):
    grid = Path(shutil.copytree(trained_grid, tmp_path / "grid"))
    path = grid / "bases" / "tiny.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    page = report([str(grid)], "html")
    assert "(basis):" in page
    assert "tiny.safetensors is not a complete safetensors file" in page


def test_several_grids_stand_one_after_the_other(made_grid, paper_grid):
    text = report([str(made_grid), str(paper_grid)])
    assert text.index("A tiny grid") < text.index("Ranks <script>")


@pytest.mark.slow
def test_grids_of_one_name_are_told_apart_by_their_directories(made_grid, tmp_path):
    other = make_grid(tmp_path / "other", [Made("fb", "fb"), Made("lora", "lora")], prompts=6)
    report([str(made_grid), str(other)], output_dir=tmp_path / "out")
    with (tmp_path / "out" / "report.csv").open(encoding="utf-8") as file:
        names = {line["experiment"] for line in csv.DictReader(file)}
    assert names == {f"tiny in {made_grid}", f"tiny in {other}"}
    assert f"A tiny grid in {other}" in (tmp_path / "out" / "report.txt").read_text(encoding="utf-8")


def test_where_nothing_is_finished_the_first_reason_is_given(tmp_path):
    grid = make_grid(tmp_path, [Made("lora", "lora")])
    shutil.rmtree(grid / "runs")
    with pytest.raises(CoraError, match=r"nothing in .* is finished, .*\(1 missing; .*: not started\)"):
        report([str(grid)])


def test_metrics_that_were_not_measured_are_refused(made_grid):
    with pytest.raises(CoraError, match="none of the metrics meteor was measured"):
        report([str(made_grid)], metrics=("meteor",))


def test_a_table_that_the_paper_does_not_have_is_refused(tmp_path):
    grid = make_grid(tmp_path, [Made("lora", "lora")], paper_table="table9")
    with pytest.raises(CoraError, match=r"the paper has no table 'table9'; its tables are number_of_models, main, rank"):
        report([str(grid)])


def test_the_papers_numbers_are_there_with_their_source():
    assert paper()["source"] == "arXiv 2409.02119v1"
    assert paper_row("main", "LoRA_yahma_48")["rougeL"] == 0.374
    assert "sacrebleu" not in paper_row("rank", "LoRA_yhama_8")
    assert paper_row("main", "unknown") == {}


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=12))
@settings(derandomize=True, deadline=None)
def test_methods_stand_in_the_order_of_size_with_gaps_between_sizes(sizes):
    places, groups = side_by_side(sizes)
    assert sorted(range(len(sizes)), key=places.__getitem__) == sorted(range(len(sizes)), key=sizes.__getitem__)
    group_of = {size: number for number, (_, least, most) in enumerate(groups) for size in sizes if least <= size <= most}
    for (place, size), (after, next_size) in pairwise(sorted(zip(places, sizes, strict=True))):
        assert after - place == (1 if group_of[size] == group_of[next_size] else 2)
    assert sum(sum(least <= size <= most for size in sizes) for _, least, most in groups) == len(sizes)
    assert all(most <= 1.15 * least for _, least, most in groups)
    assert all(after > 1.15 * least for (_, least, _), (_, after, _) in pairwise(groups))


def test_methods_of_about_one_size_share_a_mark_in_their_middle():
    places, groups = side_by_side([1000, 31, 1100, 1000])
    assert places == [3, 1, 5, 4]
    assert groups == [(1, 31, 31), (4, 1000, 1100)]


@pytest.mark.slow
def test_a_plot_of_many_methods_is_cut_and_says_so(made_grid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("forest", "plots"):
        monkeypatch.setattr(f"cora_cli.reporting.{module}.MOST_SHOWN", 2)
    page = report([str(made_grid)], "html")
    assert "The plot shows the first 2 methods; the tables have 2 more." in page
    assert re.search(r"The plot shows the first 2 comparisons; the table of tests has \d+ more\.", page)
    monkeypatch.undo()
    assert "The plot shows the first" not in report([str(made_grid)], "html")


def test_a_laplace_approximation_is_no_further_training_run_and_has_no_loss_of_its_run(tmp_path: Path) -> None:
    rows = [Made("lora", "lora", seed=seed, loss=0.9) for seed in range(2)]
    averaged = Made("laplace lora", "lora", loss=0.1)
    root = make_grid(tmp_path / "grid", [*rows, averaged])
    assert " 3 runs trained " in report([str(root)], "markdown")
    path = root / "runs" / averaged.name / "run.json"
    writing.write_json(path, {**read_json(path), "laplace": {"records": 4}})
    assert " 2 runs trained " in report([str(root)], "markdown")
    found = {one.row.name: one.measures for one in collect(read_plan(root)).results}
    assert LOSS in found[rows[0].name]
    assert LOSS not in found[averaged.name]


@pytest.mark.parametrize(("of_first", "said"), [(5, "5"), (0, "0 / 5")])
def test_records_that_are_set_aside_are_counted_where_no_loss_was_measured_on_them(made_grid, tmp_path, of_first, said):
    root = Path(shutil.copytree(made_grid, tmp_path / "grid"))
    rows = [row for row in read_plan(root).rows if row.run]
    for row in rows:
        path = RunDirectory(row.run).record
        record = read_json(path)
        assert "validation" not in record
        record["data"]["validation"] = {**record["data"]["test"], "records": of_first if row is rows[0] else 5}
        writing.write_json(path, record)
    assert f"; {said} more were set aside for validation." in report([str(root)], "markdown")


def test_a_terminal_shows_the_verdict_and_the_scores_of_a_report_that_is_written(made_grid, tmp_path):
    shown = report([str(made_grid)], "terminal", tmp_path / "report", width=80)
    assert "Verdict" in shown
    assert "held-out loss" in shown
    assert "The written report has every result and the rule." in shown
    complete = (tmp_path / "report" / FILES["terminal"]).read_text(encoding="utf-8")
    for part in ("the tests behind the verdict", "Methods\n-------"):
        assert part not in shown
        assert part in complete
        assert part in report([str(made_grid)], "terminal", width=200)
