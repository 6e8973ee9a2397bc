"""Builds the document of an inspection: tables, figures, and the verdict with its rule.

`render` writes the same document in every format.
"""

from collections.abc import Iterator, Sequence
from statistics import fmean

from cora_cli.inspection.function_tables import function_sentences, function_table
from cora_cli.inspection.group_tables import MOST_PAIRS, groups_table, pairs_table
from cora_cli.inspection.inspect import Inspection
from cora_cli.inspection.measure import (
    ALONG,
    BASE,
    CEILING,
    CHANCE,
    DELTA,
    FILE,
    MEAN,
    OWN,
    PAPER,
    POOLED,
    START,
    WEIGHTS,
    Findings,
    Overlap,
    chance_of,
)
from cora_cli.inspection.sharing_verdict import RULE, shares_of
from cora_cli.inspection.spectra import LEVELS, needed, paper_note
from cora_cli.render.canvas import Figure
from cora_cli.render.document import Block, Heading, Items, Text
from cora_cli.render.table import Cell, Table

SHARES = (POOLED, MEAN, PAPER, OWN, START, CHANCE, CEILING, ALONG)
_SUBSPACES = {WEIGHTS: "weights W", DELTA: "changes ΔW = W − W_base", FILE: "basis files"}


def build_document(inspection: Inspection, figures: Sequence[Figure] = (), detail: bool = False) -> list[Block]:
    """The complete document.

    `detail` is for a page: it leads with the verdict, names the references of the models, and ends with a table of every weight
    matrix. On a terminal, the verdict comes last, where it is read.
    """
    tables: list[Block] = [Heading(2, "Tables"), *(table for table in _tables(inspection) if table.rows)]
    if found := [one.spectra.mean_share for one in inspection.findings if one.spectra]:
        tables.append(Text(paper_note(max(found)), "note"))
    if figures:
        tables += [Heading(2, "Figures"), *figures]
    verdict = inspection.verdict
    answer: list[Block] = [
        Heading(2, "Verdict"),
        Text(verdict.headline, "verdict"),
        Items((*verdict.sentences, *function_sentences(inspection.function or (), verdict.unjudged))),
        Text(RULE, "note"),
    ]
    blocks: list[Block] = [Heading(1, "Do these models share a subspace?"), Text(_subject(inspection, detail))]
    blocks += [*answer, *tables] if detail else [*tables, *answer]
    blocks.append(Text(f"Read {inspection.bytes_read / 1e9:.2f} GB; took {inspection.seconds:.0f} s.", "note"))
    if detail and inspection.findings:
        blocks += [Heading(2, "Details"), _matrices(inspection)]
    return blocks


def _subject(inspection: Inspection, detail: bool) -> str:
    named = ", ".join(
        [
            *(
                f"{name} ({reference})" if detail and name != reference else name
                for name, reference in inspection.models.items()
            ),
            *(f"{name} (basis file)" for name in inspection.bases),
        ]
    )
    read = f"{len(inspection.findings)} weight matrices ({', '.join(inspection.kinds)}), " if inspection.findings else ""
    return f"Inspected: {named}; {read}rank {inspection.rank}, {inspection.side} side. " + (
        f"Base model: {inspection.base}." if inspection.base else "No base model."
    )


def _tables(inspection: Inspection) -> Iterator[Table]:
    yield _sizes(inspection)
    for kind in (WEIGHTS, DELTA, FILE):
        yield _overlaps(inspection, kind)
    yield _angles(inspection)
    yield _captures(inspection)
    yield pairs_table(inspection.grouping)
    yield groups_table(inspection.verdict)
    yield _spectra(inspection)
    yield _bases(inspection)
    yield _points(inspection)
    yield function_table(inspection.function or ())


def _of_kind(inspection: Inspection, kind: str) -> list[Findings]:
    return [found for found in inspection.findings if found.kind == kind]


def _sizes(inspection: Inspection) -> Table:
    rows = []
    for name in inspection.models if inspection.base else ():
        cells = []
        for kind in inspection.kinds:
            values = [found.sizes[name] for found in _of_kind(inspection, kind)]
            cells.append(Cell(f"{fmean(values):.4f} [{min(values):.4f}, {max(values):.4f}]"))
        rows.append((Cell(name), *cells))
    notes = ("‖W − W_base‖_F / ‖W_base‖_F, mean [minimum, maximum] over layers.",)
    return Table("Size of the change", ("model", *inspection.kinds), tuple(rows), notes)


def _overlaps(inspection: Inspection, subspace: str) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for what, with_base in (("pairs", False), (f"with the {BASE}", True)):
        found: dict[tuple[str, str], dict[str, list[Overlap]]] = {}
        for one in inspection.findings:
            for overlap in one.overlaps:
                if overlap.kind == subspace and (overlap.other == BASE) is with_base:
                    found.setdefault((overlap.one, overlap.other), {}).setdefault(one.kind, []).append(overlap)
        by_kind = [[pair[kind] for pair in found.values() if kind in pair] for kind in inspection.kinds]
        if len(found) <= MOST_PAIRS:
            for (name, other), pair in found.items():
                cells = (_mean([o.value for o in pair.get(kind, ())]) for kind in inspection.kinds)
                rows.append((Cell(f"{name} – {other}"), *cells))
        else:
            means = [[fmean(o.value for o in overlaps) for overlaps in pairs] for pairs in by_kind]
            for word, of in (("mean", fmean), ("minimum", min), ("maximum", max)):
                rows.append(
                    (Cell(f"{word} of {len(found)} {what}"), *(_mean([of(column)] if column else []) for column in means))
                )
        if found:
            chances = (_mean([o.chance for overlaps in pairs for o in overlaps]) for pairs in by_kind)
            rows.append((Cell(f"chance, {what}"), *chances))
    notes = (
        f"Overlap: ‖U₁ᵀU₂‖_F² / r of the r = {inspection.rank} leading directions, mean over layers; 1 means the same subspace. {CHANCE}: r / d, the "
        f"mean for random subspaces in d dimensions. If a matrix has fewer than r directions, all of them are used. {BASE}: the leading "
        "directions of its W.",
    )
    return Table(f"Overlap of the subspaces of the {_SUBSPACES[subspace]}", ("pair", *inspection.kinds), tuple(rows), notes)


def _angles(inspection: Inspection) -> Table:
    rows = []
    for subspace in (WEIGHTS, DELTA, FILE):
        for with_base in (False, True):
            cells = []
            for kind in inspection.kinds:
                overlaps = [o for one in _of_kind(inspection, kind) for o in one.overlaps if o.kind == subspace]
                cells.append(_degrees([o for o in overlaps if (o.other == BASE) is with_base]))
            if any(cell.text != "–" for cell in cells):
                rows.append((Cell(f"{subspace}, {'with the base model' if with_base else 'pairs'}"), *cells))
    notes = ("Smallest / median / largest principal angle in degrees, each averaged over pairs and layers.",)
    return Table("Principal angles", ("subspaces", *inspection.kinds), tuple(rows), notes)


def _degrees(overlaps: Sequence[Overlap]) -> Cell:
    if not overlaps:
        return Cell()
    return Cell(" / ".join(f"{fmean(column):.1f}" for column in zip(*(o.angles for o in overlaps), strict=True)))


def _captures(inspection: Inspection) -> Table:
    columns = [*SHARES, *(column for name in inspection.bases for column in (name, chance_of(name)))]
    given = [c for one in inspection.findings for c in one.captures]
    columns = [column for column in columns if any(column in c.shares for c in given)]
    left_out = list(dict.fromkeys(c.left_out for c in given))
    rows = [(Cell(name), *(_mean(shares_of(inspection.findings, name, column)) for column in columns)) for name in left_out]
    for kind in inspection.kinds if left_out else ():
        captures = [c for one in _of_kind(inspection, kind) for c in one.captures]
        cells = []
        for column in columns:
            cells.append(_mean([c.shares[column] for c in captures if column in c.shares]))
        rows.append((Cell(f"all, {kind}"), *cells))
    start = START in columns
    notes = (
        f"Capture: the share of the left-out model's ‖ΔW‖_F² inside a basis of at most {inspection.rank} directions, mean over weight matrices. "
        f"{POOLED}, {MEAN}, {PAPER} (the paper's basis): leading directions computed from the other models; for the first two, each ΔW is divided by "
        f"its Frobenius norm first. {OWN}: leading directions of the base "
        "model. "
        + (
            f"{START}: the best directions from which both this adapter and another one started, filled up with random ones. "
            if start
            else ""
        )
        + f"{CHANCE}: random directions, k / d. {', '.join((PAPER, OWN, *((START,) if start else ())))} and {CHANCE} use k directions, as many as "
        f"{POOLED} has (fewer than {inspection.rank} if the changes have a lower rank). {CEILING}: leading directions of the model's own ΔW. "
        f"{ALONG}: the share along {MEAN}, taken as one direction in the space of matrices (chance: 1 / number of weights)."
        + (" A basis file may have been created from the left-out model itself." if inspection.bases else ""),
    )
    return Table("Leave-one-out capture", ("left-out model", *columns), tuple(rows), notes)


def _spectra(inspection: Inspection) -> Table:
    rows = []
    for kind in inspection.kinds:
        found = [one.spectra for one in _of_kind(inspection, kind) if one.spectra]
        if found:
            cells = [
                Cell(f"{fmean(needed(getattr(s, how), level) for s in found):.0f}")
                for level in LEVELS
                for how in ("svd", "pca")
            ]
            rows.append((Cell(kind), *cells, Cell(f"{max(s.mean_share for s in found):.2%}")))
    headers = tuple(f"{level:.0%} {how}" for level in LEVELS for how in ("SVD", "PCA"))
    notes = (
        "Number of directions that hold this share of ‖M‖_F² (PCA: after the mean column of M is subtracted), mean over layers. M is the mean of "
        "the models' W. mean column: the largest share of ‖M‖_F² that subtracting the mean column removes.",
    )
    return Table("Explained variance of one matrix", ("projection", *headers, "mean column"), tuple(rows), notes)


def _bases(inspection: Inspection) -> Table:
    rows = []
    for name, basis in inspection.bases.items():
        choices, shares = basis.choices, list(basis.explained_variance.values())
        rows.append(
            (
                Cell(name),
                Cell(str(len(basis.sources))),
                Cell(str(len(shares))),
                Cell(str(basis.rank)),
                Cell(
                    ", ".join((choices.share, choices.merge, choices.source, choices.side, choices.method, choices.component))
                ),
                Cell(f"{fmean(shares):.1%} [{min(shares):.1%}, {max(shares):.1%}]"),
            )
        )
    headers = ("basis", "models", "groups", "rank", "choices", "explained variance")
    notes = ("Explained variance of the kept directions as recorded in the file, mean [minimum, maximum] over groups.",)
    return Table("Basis files", headers, tuple(rows), notes)


def _points(inspection: Inspection) -> Table:
    rows = [
        (
            Cell(point.basis),
            Cell(found.stratum),
            Cell(f"{point.capture:.4f}"),
            Cell(f"{point.loss:.4f}"),
            Cell(str(point.runs)),
            Cell("–" if point.learning_rate is None else f"{point.learning_rate:g}"),
            Cell(str(len(point.rates))),
        )
        for found in inspection.predictions or ()
        for point in found.points
    ]
    notes = (
        "capture: mean share of ‖ΔW‖_F² inside B, over the given models that the basis was not created from. If it was created from exactly these "
        "models, the leave-one-out bases of the same kind stand in for it. loss: held-out loss in nats per response token, mean over the runs that "
        "started from this B. Only seeds that were run with every basis of the same group count, because the seed also draws a random B. Spearman's ρ "
        "is taken over bases, with the interval by Fisher's z and the standard error of Bonett and Wright (2000). Runs that share data are not "
        "independent, and the intervals are not corrected for multiple comparisons. rates tried: a rate by which a grid widened a sweep is not counted.",
    )
    return Table(
        "Prediction: the capture of each basis and the loss of its runs",
        ("basis", "runs of", "capture", "loss", "runs", "learning rate", "rates tried"),
        tuple(rows),
        notes,
    )


def _matrices(inspection: Inspection) -> Table:
    known = any(START in c.shares for found in inspection.findings for c in found.captures)
    controls = (POOLED, OWN, *((START,) if known else ()), CHANCE, CEILING)
    rows = []
    for found in inspection.findings:
        cells = [_mean(list(found.sizes.values()))]
        for subspace in (WEIGHTS, DELTA):
            for with_base in (False, True):
                cells.append(_mean([o.value for o in found.overlaps if o.kind == subspace and (o.other == BASE) is with_base]))
        for share in controls:
            cells.append(_mean([c.shares[share] for c in found.captures if share in c.shares]))
        rows.append((Cell(found.module), Cell("×".join(map(str, found.shape))), *cells))
    headers = ("out×in", "size", "W pairs", "W base", "ΔW pairs", "ΔW base", *controls)
    notes = ("Means over models or pairs: size of the change, overlaps, and leave-one-out captures.",)
    return Table("Every weight matrix", ("module", *headers), tuple(rows), notes)


def _mean(values: Sequence[float]) -> Cell:
    return Cell(f"{fmean(values):.3f}") if values else Cell()
