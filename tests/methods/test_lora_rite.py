"""The optimizer of LoRA-RITE against the authors' formulas in float64, and its invariance."""

import numpy as np
import pytest
import torch

from cora_cli.errors import UsageError
from cora_cli.methods.parts.rite import Rite
from cora_cli.training.config import TrainConfig
from cora_cli.training.run import train
from tests.training.helpers import config_for, losses

OUT, IN, R = 7, 9, 3
BETA = (0.9, 0.999)


def start(seed: int = 0):
    draw = np.random.default_rng(seed)
    return draw.standard_normal((R, IN)), draw.standard_normal((OUT, R)), draw.standard_normal((OUT, IN))


def ours(a, b, target, steps, **options):
    """B·A after every step of descent on ½‖B·A − target‖² / 50."""
    a, b = (torch.nn.Parameter(torch.tensor(value)) for value in (a, b))
    optimizer = Rite([(a, b)], lr=0.1, betas=BETA, **options)
    path = []
    for _ in range(steps):
        optimizer.zero_grad()
        ((b @ a - torch.tensor(target)).square().sum() / 100).backward()
        optimizer.step()
        path.append((b @ a).detach().numpy())
    return path


def theirs(a, b, target, steps, clip=1.0, eps=1e-6, decay=0.0):
    """lora_rite.py of gkevinyen5418/LoRA-RITE with its defaults, written out for one pair."""
    size = {"a": (IN, OUT), "b": (OUT, IN)}
    first = {key: np.zeros((n, R)) for key, (n, _) in size.items()}
    second = {key: np.zeros((R, R)) for key in size}
    old = {key: np.zeros((m, R)) for key, (_, m) in size.items()}
    path = []
    for t in range(1, steps + 1):
        g = (b @ a - target) / 50
        inverse, basis, plain = {}, {}, {}
        for key, other, own in (("a", b, (b.T @ g).T), ("b", a.T, g @ a.T)):
            basis[key], triangle = np.linalg.qr(other)
            inverse[key] = np.linalg.pinv(triangle)
            plain[key] = own @ inverse[key]
            if np.sqrt(np.mean(plain[key] ** 2)) > 1:
                plain[key] *= 0
        norm = np.sqrt(sum(np.sum(value**2) for value in plain.values()))
        move = {}
        for key in size:
            u = plain[key] / norm * clip if clip and norm > clip else plain[key]
            b1, b2 = (beta * (1 - beta ** (t - 1)) / (1 - beta**t) for beta in BETA)
            p = basis[key].T @ old[key]
            second[key] = (1 - b2) * (u.T @ u) / len(u) + b2 * p @ second[key] @ p.T
            values, vectors = np.linalg.eigh(second[key])
            u = u @ (vectors / (np.sqrt(np.maximum(values, 0)) + eps)) @ vectors.T
            first[key] = (1 - b1) * u + b1 * first[key] @ p.T
            old[key] = basis[key]
            move[key] = first[key] @ inverse[key].T
        a, b = a - 0.1 * (move["a"].T + decay * a), b - 0.1 * (move["b"] + decay * b)
        path.append(b @ a)
    return path


@pytest.mark.parametrize("options", [{}, {"clip": 0.05}, {"clip": 0.0}, {"weight_decay": 0.1}])
def test_the_steps_are_those_of_the_authors_formulas(options):
    a, b, target = start()
    given = {{"weight_decay": "decay"}.get(key, key): value for key, value in options.items()}
    for found, expected in zip(ours(a, b, target, 8, **options), theirs(a, b, target, 8, **given), strict=True):
        assert np.allclose(found, expected, rtol=1e-6, atol=1e-8)


def test_the_path_of_the_product_does_not_depend_on_how_it_is_divided():
    a, b, target = start(1)
    q = np.random.default_rng(2).standard_normal((R, R))
    plain, turned = ours(a, b, target, 12), ours(np.linalg.inv(q) @ a, b @ q, target, 12)
    assert not np.allclose(plain[0], b @ a, atol=1e-2)
    for one, other in zip(plain, turned, strict=True):
        assert np.allclose(one, other, atol=1e-6)


def test_a_gradient_above_the_bound_counts_as_zero_and_a_zero_b_leaves_a_where_it_is():
    a, b, target = start()
    assert np.allclose(ours(a, b, 1e4 * target, 1)[0], b @ a)
    first, second = torch.nn.Parameter(torch.tensor(a)), torch.nn.Parameter(torch.zeros(OUT, R, dtype=torch.float64))
    optimizer = Rite([(first, second)], lr=0.1, betas=BETA)
    ((second @ first - torch.tensor(target)).square().sum() / 100).backward()
    optimizer.step()
    assert np.array_equal(first.detach().numpy(), a)
    assert second.any()


def test_the_state_of_the_optimizer_can_be_stored():
    a, b, target = start()
    half = [torch.nn.Parameter(torch.tensor(value)) for value in (a, b)]
    optimizer = Rite([(half[0], half[1])], lr=0.1, betas=BETA)
    for number in range(6):
        if number == 3:
            stored = optimizer.state_dict()
            optimizer = Rite([(half[0], half[1])], lr=0.1, betas=BETA)
            optimizer.load_state_dict(stored)
        optimizer.zero_grad()
        ((half[1] @ half[0] - torch.tensor(target)).square().sum() / 100).backward()
        optimizer.step()
    assert np.array_equal((half[1] @ half[0]).detach().numpy(), ours(a, b, target, 6)[-1])


def test_a_run_learns_and_clips_as_asked(tiny_model, tiny_data, tmp_path):
    found = {}
    for clip in (None, 1e-9):
        output = tmp_path / str(clip)
        train(config_for(tiny_model, tiny_data, output, mode="lora-rite", rite_clip=clip, warmup_ratio=0.0))
        found[clip] = losses(output)
    assert found[None][-1] < found[None][0] - 0.01
    assert abs(found[1e-9][-1] - found[1e-9][0]) < abs(found[None][-1] - found[None][0])


def test_what_makes_no_sense_is_refused():
    common = {"model": "m", "dataset": "d", "output_dir": "o"}
    for settings, said in (
        ({"mode": "lora-rite", "rite_clip": -1.0}, "--rite-clip must be at least 0, not -1.0"),
        ({"mode": "lora", "rite_clip": 1.0}, "--rite-clip does not apply to mode lora"),
    ):
        with pytest.raises(UsageError, match=said):
            TrainConfig(**common, **settings)
