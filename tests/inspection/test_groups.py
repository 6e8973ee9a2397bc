"""Groups of models are found where they are planted, and not where nothing is; shares carry intervals that cover."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch

from cora_cli.inspection.changes import Change
from cora_cli.inspection.groups import LEVEL, Grouping, find_groups, recovered
from cora_cli.inspection.inspect import group_and_judge
from cora_cli.inspection.measure import POOLED, Findings, Held, measure
from cora_cli.inspection.sharing_verdict import Verdict
from cora_cli.inspection.subspaces import chance_deviation
from tests.inspection.test_measure import FactoredSource
from tests.weights.helpers import CPU, ArraySource

TARGETS = ("q_proj",)


def verdict_on(
    deltas: Mapping[str, list[np.ndarray]], rank: int, rows: int, seed: int = 0
) -> tuple[list[Findings], Grouping, Verdict]:
    """Findings, groups and verdict of models with the changes `deltas`, one per layer, on a random base."""
    rng = np.random.default_rng(1000 + seed)
    layers = len(next(iter(deltas.values())))
    base = [rng.standard_normal((rows, rows)) for _ in range(layers)]

    def source(changes: list[np.ndarray]) -> ArraySource:
        return ArraySource({f"layers.{n}.q_proj": base[n] + change for n, change in enumerate(changes)})

    models = {name: source(changes) for name, changes in deltas.items()}
    of_base = source([np.zeros((rows, rows))] * layers)
    findings = measure(models, of_base, {}, rank, TARGETS, CPU, {})
    grouping, verdict = group_and_judge(findings, models, of_base, None, (), rank, TARGETS, CPU, "output")
    return findings, grouping, verdict


def planted(
    spaces: Mapping[str, str | None], rows: int = 40, rank: int = 4, layers: int = 4, noise: float = 0.3, seed: int = 0
) -> dict[str, list[np.ndarray]]:
    """Changes of `rank` directions per layer plus noise in others; models of one space have the same directions, None is one's own."""
    rng = np.random.default_rng(seed)
    frames = {
        space: [np.linalg.qr(rng.standard_normal((rows, rank)))[0] for _ in range(layers)]
        for space in set(spaces.values()) - {None}
    }
    changes: dict[str, list[np.ndarray]] = {}
    for name, space in spaces.items():
        changes[name] = []
        for layer in range(layers):
            frame = np.linalg.qr(rng.standard_normal((rows, rank)))[0] if space is None else frames[space][layer]
            extra = noise * rng.standard_normal((rows, 2)) @ rng.standard_normal((2, rows)) / np.sqrt(rows)
            changes[name].append(frame @ rng.standard_normal((rank, rows)) + extra)
    return changes


def times(deltas: dict[str, list[np.ndarray]], name: str, size: float) -> dict[str, list[np.ndarray]]:
    return {key: [size * one for one in changes] if key == name else changes for key, changes in deltas.items()}


FOUR_AND_ONE = planted({"a": "s", "b": "s", "c": "s", "d": "s", "other": None})


def test_an_unrelated_model_ten_times_larger_hides_no_common_subspace():
    _, _, found = verdict_on(times(FOUR_AND_ONE, "other", 10.0), rank=4, rows=40)
    assert found.headline.startswith("Common to four of five models (a, b, c and d): the others of them recover ")
    assert " Outside: other (the group's basis recovers " in found.headline
    assert [group.models for group in found.groups] == [("a", "b", "c", "d")]
    assert found.outside == ("other",)
    assert min(found.recovered[name].share for name in "abcd") > 0.85
    assert abs(found.recovered["other"].share) < 0.1


@pytest.mark.parametrize("size", [1e-3, 10.0, 1e4])
def test_the_size_of_a_models_change_does_not_matter(size):
    deltas = planted({"a": "s", "b": "s", "c": "s", "d": None}, noise=1.0)
    plain = verdict_on(deltas, rank=4, rows=40)
    for name in deltas:
        scaled = verdict_on(times(deltas, name, size), rank=4, rows=40)
        assert scaled[2].headline == plain[2].headline
        for one, other in zip(plain[0], scaled[0], strict=True):
            for capture, same in zip(one.captures, other.captures, strict=True):
                assert same.shares[POOLED] == pytest.approx(capture.shares[POOLED], abs=1e-6)


def test_three_models_and_an_outlier_are_common_to_three_of_four():
    _, grouping, found = verdict_on(planted({"a": "s", "odd": None, "b": "s", "c": "s"}), rank=4, rows=40)
    assert found.headline.startswith("Common to three of four models (a, b and c): the others of them recover ")
    assert "Outside: odd (" in found.headline
    assert grouping.order == ("a", "b", "c", "odd")
    assert not found.groups[0].partly


@pytest.mark.parametrize("rank", [4, 8])
def test_two_disjoint_pairs_are_two_groups(rank):
    """At rank 8 the pool of all others holds both spaces, so that leaving one model out would call everything shared."""
    _, _, found = verdict_on(planted({"a": "s", "b": "t", "c": "s", "d": "t"}), rank=rank, rows=40)
    assert found.headline.startswith("Two groups: a and c (shared, ")
    assert "; b and d (shared, " in found.headline
    assert {group.models for group in found.groups} == {("a", "c"), ("b", "d")}
    assert found.between is not None
    assert found.between < 0.15
    assert found.outside == ()


def test_a_merge_of_two_models_joins_them_and_the_pair_without_anything_in_common_is_named():
    deltas = planted({"a": "s", "b": "t"}, noise=0.0, rank=2)
    deltas["merged"] = [one + other for one, other in zip(deltas["a"], deltas["b"], strict=True)]
    _, _, found = verdict_on(deltas, rank=4, rows=40)
    assert found.headline.startswith("Shared: ")
    [said] = [sentence for sentence in found.sentences if "through the other models" in sentence]
    assert "(1 of 3 pairs are below 5% or inside the chance band). The least related are a and b: " in said


def test_models_that_are_weakly_related_stay_one_group():
    """Noise takes some pairs below the link, but not their mean; complete linkage would split them."""
    rng = np.random.default_rng(0)
    frames = [np.linalg.qr(rng.standard_normal((120, 2)))[0] for _ in range(2)]
    deltas = {
        f"m{n}": [1.2 * frame @ rng.standard_normal((2, 120)) + rng.standard_normal((120, 120)) for frame in frames]
        for n in range(10)
    }
    _, grouping, found = verdict_on(deltas, rank=2, rows=120)
    assert found.headline.startswith("Partly shared: the other models recover ")
    assert len(grouping.groups) == 1


@pytest.mark.parametrize(("rows", "rank", "layers"), [(12, 2, 1), (16, 4, 3), (40, 4, 2), (64, 16, 4), (128, 8, 2)])
@pytest.mark.parametrize("models", [2, *(pytest.param(count, marks=pytest.mark.slow) for count in (3, 6))])
@pytest.mark.parametrize("of_rank", [2, None])
def test_random_changes_share_nothing(rows, rank, layers, models, of_rank):
    for seed in range(4):
        rng = np.random.default_rng(seed)
        inner = of_rank or rows
        deltas = {
            f"m{n}": [rng.standard_normal((rows, inner)) @ rng.standard_normal((inner, rows)) for _ in range(layers)]
            for n in range(models)
        }
        found = verdict_on(deltas, rank, rows, seed)[2]
        assert found.headline.startswith("No shared subspace found: the other model"), found.headline
        assert found.groups == ()
        assert len(found.outside) == models


def test_two_and_three_models_and_those_without_a_change_get_a_sentence():
    two = verdict_on(planted({"a": "s", "b": "s"}), rank=4, rows=40)[2]
    assert two.headline.startswith("Shared: the other model recovers ")
    three = verdict_on(planted({"a": "s", "b": "s", "c": None}), rank=4, rows=40)[2]
    assert three.headline.startswith("Common to two of three models (a and b): the other of them recovers ")
    still = planted({"a": "s", "b": "s", "c": None})
    still["same"] = [np.zeros((40, 40))] * 4
    found = verdict_on(still, rank=4, rows=40)[2]
    assert found.headline.startswith("Common to two of three judged models (a and b): ")
    assert found.unjudged == {"same": "its weights here equal those of the base model"}


def test_equal_changes_are_recovered_in_full():
    deltas = planted({"a": "s"})
    found = verdict_on({"a": deltas["a"], "b": deltas["a"], "c": deltas["a"]}, rank=4, rows=40)[2]
    assert found.headline.startswith("Shared: the other models recover 100.0% [–] (for a) to 100.0% [–]")


def test_one_layer_has_no_interval():
    found = verdict_on(planted({"a": "s", "b": "s", "c": "s"}, layers=1), rank=4, rows=40)[2]
    assert all(one.interval is None for one in found.recovered.values())
    assert "% [–] (for " in found.headline


def test_what_no_pair_shows_may_still_be_in_the_pool():
    """Each model's own noise covers what it shares with one other, but not what it shares with all."""
    rng = np.random.default_rng(0)
    frames = [np.linalg.qr(rng.standard_normal((120, 2)))[0] for _ in range(2)]
    deltas = {
        f"m{n}": [0.9 * frame @ rng.standard_normal((2, 120)) + rng.standard_normal((120, 120)) for frame in frames]
        for n in range(10)
    }
    _, grouping, found = verdict_on(deltas, rank=2, rows=120)
    assert not grouping.linked
    assert found.headline.startswith("Partly shared: the other models recover ")


@pytest.mark.parametrize("layers", [3, 8, 30])
def test_the_interval_covers_the_true_share_as_often_as_it_says(layers):
    rng = np.random.default_rng(layers)
    hits, draws = 0, 2000
    for _ in range(draws):
        shares = np.clip(rng.normal(0.6, 0.1, layers), 0, 1)
        ceilings = rng.uniform(0.6, 0.9, layers)
        held = [
            (n, Held("a", "b", 0.1 + share * (ceiling - 0.1), 0.0, 0.1, 0.01, ceiling))
            for n, (share, ceiling) in enumerate(zip(shares, ceilings, strict=True))
        ]
        interval = recovered(held, 1).interval
        assert interval is not None
        hits += interval[0] <= 0.6 <= interval[1]
    assert LEVEL - 0.03 <= hits / draws <= LEVEL + 0.03


@pytest.mark.parametrize("of_rank", [2, 30])
def test_the_chance_band_is_left_as_often_as_it_says(of_rank):
    rng = np.random.default_rng(0)
    change = Change(torch.from_numpy(rng.standard_normal((30, of_rank)) @ rng.standard_normal((of_rank, 20))))
    deviation = chance_deviation(3, 30, change.concentration)
    captures = []
    for _ in range(4000):
        frame = torch.from_numpy(np.linalg.qr(rng.standard_normal((30, 3)))[0])
        captures.append(change.captured_by(frame))
    assert np.mean(captures) == pytest.approx(3 / 30, abs=4 * deviation / 4000**0.5)
    assert np.std(captures) == pytest.approx(deviation, rel=0.05)
    outside = np.mean([recovered([(0, Held("a", "b", one, 0.0, 0.1, deviation, 1.0))], 1).above_chance for one in captures])
    assert 0.03 <= outside <= 0.08, "5 % by a normal approximation, of one matrix"


def test_no_models_and_one_model_form_no_groups():
    assert find_groups([], []).groups == ()
    assert find_groups([], ["a"]).linked is False


def test_changes_held_in_factors_give_the_groups_of_the_dense_ones():
    name = "model.layers.3.self_attn.q_proj"
    rng = np.random.default_rng(0)
    base = rng.standard_normal((40, 20))
    shared = rng.standard_normal((40, 2))
    factors = {n: (shared if n < 3 else rng.standard_normal((40, 2)), rng.standard_normal((2, 20))) for n in range(4)}
    found = []
    for sources in (
        {str(n): FactoredSource(base, pair) for n, pair in factors.items()},
        {str(n): ArraySource({name: base + left @ right}) for n, (left, right) in factors.items()},
    ):
        of_base = ArraySource({name: base})
        findings = measure(sources, of_base, {}, 2, TARGETS, CPU, {})
        found.append(group_and_judge(findings, sources, of_base, None, (), 2, TARGETS, CPU, "output")[1])
    for one in found:
        assert one.groups[0].models == ("0", "1", "2")
    assert {name: one.share for name, one in found[0].recovered.items()} == pytest.approx(
        {name: one.share for name, one in found[1].recovered.items()}
    )
