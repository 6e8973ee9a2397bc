"""λmax against dense matrices in float64: of planted matrices, and of the loss of a tiny model in a handful of trained parameters."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from cora_cli.data.encode import Example
from cora_cli.rundir import RunDirectory
from cora_cli.training.arguments import training_arguments
from cora_cli.training.assemble import assemble
from cora_cli.training.curvature import Hessian, largest_eigenvalue
from cora_cli.training.prepare import prepare
from cora_cli.training.probe import largest_curvature, loss_hessian

from .helpers import config_for

LAYER = "model.layers.1.self_attn.v_proj"


def planted(values):
    """A symmetric matrix with these eigenvalues."""
    generator = torch.Generator().manual_seed(4)
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))
    return (q * torch.tensor(values, dtype=torch.float64)) @ q.T


def start(size):
    return torch.randn(size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def test_the_largest_eigenvalue_is_found_even_where_a_negative_one_is_larger_in_magnitude():
    matrix = planted([-9.0, 3.0, 2.9, *torch.linspace(-1, 1, 27).tolist()])
    found = largest_eigenvalue(lambda v: matrix @ v, start(30), 30, 1e-4)
    assert found.value == pytest.approx(3.0, abs=1e-5)
    assert found.products < 30


@pytest.mark.parametrize("most", [1, 2, 4, 8])
def test_an_eigenvalue_lies_within_the_error_and_the_value_is_no_larger_than_the_largest(most):
    values = torch.linspace(0.1, 5, 60).tolist()
    matrix = planted(values)
    found = largest_eigenvalue(lambda v: matrix @ v, start(60), most, 1e-12)
    assert found.products == most
    assert min(abs(found.value - value) for value in values) <= found.error
    assert found.value <= 5 + 1e-9


def test_a_matrix_of_one_direction_takes_two_products():
    matrix = planted([7.0, *[0.0] * 9])
    found = largest_eigenvalue(lambda v: matrix @ v, start(10), 20, 1e-6)
    assert found.value == pytest.approx(7.0)
    assert found.products <= 3


@pytest.fixture(scope="module", autouse=True)
def double_norms():
    """Norms that compute in the precision of the model; those of transformers are float32 inside."""

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaRMSNorm, "forward", forward)
        yield


@pytest.fixture(scope="module")
def tiny(tiny_model, tiny_data, tmp_path_factory):
    """LoRA-FA of rank 1 on one layer in float64, on two short examples in one packed row: 32 trained parameters."""
    place = tmp_path_factory.mktemp("tiny")
    config = config_for(tiny_model, tiny_data, place / "run", mode="lora-fa", rank=1, target_modules=(LAYER,))
    prepared, run = prepare(config), RunDirectory(place / "run")
    model, batching, _ = assemble(
        config, prepared, training_arguments(config, prepared.hardware, len(prepared.train.examples), run), run
    )
    assert batching.form.kind == "packed"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.3)
    examples = [Example(one.input_ids[: one.prompt_length + 6], one.prompt_length) for one in prepared.train.examples[:2]]
    return model.double().eval(), examples, prepared, batching.form


@pytest.fixture(scope="module")
def dense(tiny, tiny_model):
    """The Hessian (32, 32) by double backward through the model of transformers, one example at a time."""
    model, examples, prepared, _ = tiny
    a, b = (
        model.get_parameter(f"base_model.model.{LAYER}.{factor}.default.weight").detach() for factor in ("lora_A", "lora_B")
    )
    plain = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float64, attn_implementation="sdpa").eval()
    weight = plain.get_submodule(LAYER).weight.detach()
    tokens = sum(len(example.input_ids) - example.prompt_length for example in examples)

    def loss(b):
        total = 0.0
        for example in examples:
            ids, count = torch.tensor([example.input_ids]), len(example.input_ids) - example.prompt_length
            changed = {f"{LAYER}.weight": weight + prepared.plan.scaling * b @ a}
            logits = torch.func.functional_call(plain, changed, kwargs={"input_ids": ids, "logits_to_keep": count + 1}).logits
            total = total + torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, -count:], reduction="sum")
        return total / tokens

    with sdpa_kernel(SDPBackend.MATH):  # the only one with a second derivative
        return torch.autograd.functional.hessian(loss, b).reshape(32, 32)


def test_products_through_packed_rows_are_those_of_the_dense_hessian_and_symmetric(tiny, dense):
    model, examples, prepared, form = tiny
    before = [parameter.detach().clone() for parameter in model.parameters()]
    hessian = loss_hessian(model, examples, prepared, form)
    found = torch.stack([hessian.product(unit) for unit in torch.eye(32, dtype=torch.float64)])
    scale = dense.abs().max()
    assert torch.allclose(found, dense, atol=1e-4 * scale)
    assert torch.allclose(found, found.T, atol=1e-4 * scale)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), before, strict=True))


def test_the_largest_eigenvalue_of_the_loss_is_that_of_the_dense_hessian(tiny, dense):
    model, examples, prepared, form = tiny
    wanted = float(torch.linalg.eigvalsh(dense)[-1])
    found = largest_curvature(model, examples, prepared, form, most=32, tolerance=1e-3)
    assert found["largest_eigenvalue"] == pytest.approx(wanted, rel=1e-3)
    assert found["products"] < 32
    assert found["parameters"] == 32
    # As a run computes it, in float32.
    model.float()
    single = largest_curvature(model, examples, prepared, form, most=32, tolerance=1e-2)
    model.double()
    assert single["largest_eigenvalue"] == pytest.approx(wanted, rel=2e-2)


def test_the_step_follows_the_curvature():
    """A loss that is quadratic only nearby, and almost flat here: the step that suits its slope leaves the region."""
    parameter = torch.nn.Parameter(torch.tensor([1e-8, 0.0], dtype=torch.float64))
    steep = torch.tensor([1e4, 1.0], dtype=torch.float64)

    def gradient():
        return torch.autograd.grad((1 - torch.cos(parameter * steep.sqrt())).sum(), parameter)[0]

    hessian = Hessian([parameter], gradient)
    exact = steep * torch.cos(parameter.detach() * steep.sqrt())
    for unit, value in zip(torch.eye(2, dtype=torch.float64), exact, strict=True):
        assert float(hessian.product(unit) @ unit) == pytest.approx(float(value), rel=1e-3)
