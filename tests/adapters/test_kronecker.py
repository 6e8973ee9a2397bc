"""The Gaussian of a Laplace approximation against dense linear algebra in float64, and its prior precision against a search."""

import pytest
import torch
from transformers import LlamaForCausalLM

from cora_cli.adapters.install import install_adapter
from cora_cli.adapters.kronecker import Kronecker, best_precision
from cora_cli.methods.parts.layers import lora_layers
from cora_cli.training.laplace import CurvatureSums
from tests.methods.helpers import plan_of

OUT, IN, COUNT = 3, 7, 20


def random_sums(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    g, x = (torch.randn(COUNT, width, generator=generator, dtype=torch.float64) for width in (OUT, IN))
    return g.T @ g, x.T @ x


def covariance(curvature: Kronecker, precision: float, shape: tuple[int, int]) -> torch.Tensor:
    """Of a drawn matrix, flattened: M·Mᵀ, where M maps the noise to the draw."""
    units = torch.eye(shape[0] * shape[1], dtype=torch.float64).view(-1, *shape)
    columns = torch.stack([curvature.draw(unit, precision).flatten() for unit in units], dim=1)
    return columns @ columns.T


@pytest.mark.parametrize("precision", [1e-3, 1.0, 1e3])
def test_the_covariance_is_the_inverse_of_curvature_and_prior(precision: float):
    g, x = random_sums()
    curvature = Kronecker.of_sums(g, x, COUNT, most=100)
    found = covariance(curvature, precision, (OUT, IN))
    exact = torch.linalg.inv(torch.kron(g / COUNT, x) + precision * torch.eye(OUT * IN, dtype=torch.float64))
    assert torch.allclose(found, exact, rtol=1e-8, atol=1e-12)


def test_it_is_positive_semidefinite_and_at_most_the_prior_with_few_directions_too():
    g, x = random_sums()
    complete = covariance(Kronecker.of_sums(g, x, COUNT, most=100), 0.5, (OUT, IN))
    few = covariance(Kronecker.of_sums(g, x, COUNT, most=2), 0.5, (OUT, IN))
    for found in (complete, few):
        values = torch.linalg.eigvalsh(found)
        assert values.min() > 0
        assert values.max() <= 1 / 0.5 + 1e-9
    assert torch.linalg.eigvalsh(few - complete).min() > -1e-9
    # 2 of 3 output and 2 of 7 input directions: the other 21 − 4 have the variance of the prior.
    assert (torch.linalg.eigvalsh(few) > 2 - 1e-9).sum() == 17


def test_draws_vanish_as_the_precision_grows():
    curvature = Kronecker.of_sums(*random_sums(), COUNT, most=100)
    noise = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert curvature.draw(noise, 1e16).abs().max() < 1e-7


def test_the_prior_precision_maximises_the_marginal_likelihood():
    curvatures = [Kronecker.of_sums(*random_sums(seed), COUNT, most=100) for seed in range(3)]
    norm_squared, size = 5.0, 3 * OUT * IN
    values = torch.cat([one.eigenvalues.flatten() for one in curvatures])

    def evidence(precision: torch.Tensor) -> torch.Tensor:
        return (size * precision.log() - precision * norm_squared - (values + precision).log().sum()) / 2

    grid = torch.logspace(-6, 6, 4001, dtype=torch.float64)
    best = grid[torch.stack([evidence(precision) for precision in grid]).argmax()]
    assert best_precision(curvatures, norm_squared) == pytest.approx(best.item(), rel=0.01)


def test_it_is_exact_for_a_linear_model_with_gaussian_noise(tiny_model):
    """The Hessian of Σ‖y − sB·A·x‖² / (2σ²) with respect to B is s²/σ² I ⊗ A Σxxᵀ Aᵀ, with respect to A s²/σ² BᵀB ⊗ Σxxᵀ."""
    plan = plan_of("lora", rank=4, alpha=8.0, rslora=False, target_modules=("layers.0.self_attn.k_proj",), dropout=0.0, seed=0)
    model = install_adapter(LlamaForCausalLM.from_pretrained(tiny_model), plan, None).double()
    [(name, layer)] = lora_layers(model)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.nn.init.normal_(b)
    sigma, x = 0.7, torch.randn(50, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sums = CurvatureSums(model)
    with sums.watching():
        y = layer(x)
        for output in range(32):  # the columns of I/σ instead of sampled noise
            torch.autograd.grad(y[:, output].sum() / sigma, (a, b), retain_graph=True)
    assert sums.counts == {(name, "A"): 50, (name, "B"): 50}
    found = sums.curvatures(1.0, most=100)
    for factor, outer, inner in (
        ("A", b.T @ b, x.T @ x),
        ("B", torch.eye(32, dtype=torch.float64), a @ (x.T @ x) @ a.T),
    ):
        curvature = found[name, factor]
        for ours, exact in (
            (curvature.outputs @ curvature.output_values.diag() @ curvature.outputs.T, outer * (plan.scaling / sigma) ** 2),
            (curvature.inputs @ curvature.input_values.diag() @ curvature.inputs.T, inner),
        ):
            assert torch.allclose(ours, exact, rtol=1e-4, atol=1e-4 * exact.abs().max().item())


def test_each_layer_counts_its_own_positions(tiny_model):
    """Blocks may share a layer, an expert sees some of the tokens, and nothing calls a decoder's attention to an encoder."""
    plan = plan_of("lora", rank=4, alpha=8.0, rslora=False, target_modules=("k_proj", "q_proj"), dropout=0.0, seed=0)
    model = install_adapter(LlamaForCausalLM.from_pretrained(tiny_model), plan, None)
    (once, first), (twice, second), (never, _), *_ = lora_layers(model)
    sums = CurvatureSums(model)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    with sums.watching():
        (first(x).sum() + second(x).sum() + second(x[:2]).sum()).backward()
    assert [sums.counts[name, factor] for name in (once, twice, never) for factor in "AB"] == [5, 5, 7, 7, 0, 0]
    assert not sums.curvatures(1.0, most=100)[never, "B"].eigenvalues.any()
