"""Models whose files hold quantised weights train, are evaluated and written as what they are, or are refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3Config, LlamaConfig

from cora_cli.adapters.merge import merge_adapter
from cora_cli.errors import CoraError
from cora_cli.models.checkpoint import Checkpoint
from cora_cli.models.loading import load_model
from cora_cli.models.quantized import ask_for_plain, cannot_be_converted, check_compressed, check_left_out
from cora_cli.models.references import resolve_model
from cora_cli.training.run import train
from tests.conftest import make_model
from tests.training.families import build
from tests.training.helpers import config_for

BLOCK = 32


def write_fp8(directory: Path, base: Path) -> Path:
    """A copy of `base` as DeepSeek's files are: layers in float8 with one scale for a block of numbers. Returns the same in float32."""
    plain = directory.with_name(f"{directory.name}-plain")
    for copy in (directory, plain):
        shutil.copytree(base, copy)
    quantised, numbers = {}, {}
    for name, weight in load_file(base / "model.safetensors").items():
        quantised[name] = numbers[name] = weight
        if name.endswith("proj.weight"):
            out, inputs = weight.shape
            blocks = weight.reshape(out // BLOCK, BLOCK, inputs // BLOCK, BLOCK)
            scales = blocks.abs().amax((1, 3)) / 448
            rounded = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
            quantised |= {name: rounded.reshape(out, inputs), name.replace("weight", "weight_scale_inv"): scales}
            numbers[name] = (rounded.float() * scales[:, None, :, None]).reshape(out, inputs)
    for copy, tensors in ((directory, quantised), (plain, numbers)):
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    state(directory, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]})
    return plain


def state(directory: Path, quantization: dict[str, Any]) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": quantization}))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "wide", seed=0, intermediate=128)


def write_bitsandbytes(directory: Path, base: Path, **how: Any) -> Path:
    from transformers import AutoTokenizer, BitsAndBytesConfig

    loaded = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=BitsAndBytesConfig(**how), device_map={"": "cpu"}, dtype=torch.float32
    )
    loaded.save_pretrained(directory)
    AutoTokenizer.from_pretrained(base).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_result_on_float8_weights_is_written_as_the_numbers_that_were_trained(
    mode: Any, wide: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = write_fp8(tmp_path / "fp8", wide)
    written = []
    for base in (tmp_path / "fp8", plain):
        run = tmp_path / f"run-{base.name}"
        train(config_for(base, tiny_data, run, mode=mode, max_steps=2))
        if mode == "lora":
            merge_adapter(resolve_model(str(run)), tmp_path / f"merged-{base.name}")
        written.append(load_file((tmp_path / f"merged-{base.name}" if mode == "lora" else run / "model") / "model.safetensors"))
    found, wanted = written
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[name], wanted[name], atol=1e-6) for name in wanted)
    assert "fp8 is stored quantised; its weights are used, and written, as plain numbers" in capsys.readouterr().err


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_all_weights_of_a_float8_model_are_loaded_in_the_precision_that_was_asked_for(
    precision: torch.dtype, wide: Path, tmp_path: Path
) -> None:
    other = torch.bfloat16 if precision == torch.float32 else torch.float32
    AutoModelForCausalLM.from_pretrained(wide, dtype=other).save_pretrained(tmp_path / "base")
    write_fp8(tmp_path / "fp8", tmp_path / "base")
    loaded = load_model(resolve_model(str(tmp_path / "fp8")), precision, torch.device("cpu"), None)
    assert {weight.dtype for weight in loaded.parameters()} == {precision}
    assert loaded(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.parametrize("lacking", ["all", "one"])
def test_a_float8_weight_without_the_scale_that_transformers_reads_is_refused(lacking: str, wide: Path, tmp_path: Path) -> None:
    """AutoFP8 and others write `weight_scale` in place of `weight_scale_inv`, for vLLM."""
    write_fp8(tmp_path / "fp8", wide)
    file = tmp_path / "fp8" / "model.safetensors"
    lost = "_scale_inv" if lacking == "all" else "1.mlp.down_proj.weight_scale_inv"
    renamed = {name.replace(lost, lost.removesuffix("_inv")): tensor for name, tensor in load_file(file).items()}
    save_file(renamed, file, metadata={"format": "pt"})
    with pytest.raises(
        CoraError, match=r"its files hold \S+proj\.weight in float8 without \S+\.weight_scale_inv, or another scale"
    ):
        load_model(resolve_model(str(tmp_path / "fp8")), torch.float32, torch.device("cpu"), None)


@pytest.mark.parametrize("named", ["scale", "qscale_weight"])
def test_the_other_names_of_scales_that_transformers_reads_are_taken(named: str, wide: Path, tmp_path: Path) -> None:
    plain = write_fp8(tmp_path / "fp8", wide)
    file = tmp_path / "fp8" / "model.safetensors"
    renamed = {name.replace("weight_scale_inv", named): tensor for name, tensor in load_file(file).items()}
    save_file(renamed, file, metadata={"format": "pt"})
    one, other = (
        load_model(resolve_model(str(path)), torch.float32, torch.device("cpu"), None) for path in (file.parent, plain)
    )
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(one(input_ids=ids).logits, other(input_ids=ids).logits)


def test_blocks_of_float8_of_which_the_last_is_not_complete_are_refused(wide: Path, tmp_path: Path) -> None:
    """As programs that round the number of blocks up write them; transformers takes the blocks for equal ones."""
    write_fp8(tmp_path / "fp8", wide)  # 64 or 128 rows in blocks of 32
    state(tmp_path / "fp8", {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [48, 32]})
    file = tmp_path / "fp8" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[f"{name}_scale_inv"] = torch.ones(2, tensors[name].shape[1] // 32)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        CoraError, match=r"proj\.weight has 64 rows or columns in 2 blocks of 48, the last of them not complete"
    ):
        load_model(resolve_model(str(tmp_path / "fp8")), torch.float32, torch.device("cpu"), None)


@pytest.mark.parametrize("bits", [4, 8])
def test_plain_weights_under_a_configuration_of_bitsandbytes_are_refused(bits: int, wide: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    shutil.copytree(wide, tmp_path / "model")
    state(tmp_path / "model", {"quant_method": "bitsandbytes", f"load_in_{bits}bit": True})
    with pytest.raises(CoraError, match=r"its files hold model\.layers\.0\.self_attn\.q_proj\.weight without scales; remove"):
        load_model(resolve_model(str(tmp_path / "model")), torch.float32, torch.device("cpu"), None)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_layer_that_files_and_list_hold_differently_is_named_with_the_list(bits: int, wide: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    layer, head, how = "model.layers.1.mlp.down_proj", "lm_head", {f"load_in_{bits}bit": True}
    for name, files, stated, said in (
        ("left", [layer, head], [head], rf"hold {layer}\.weight without scales; list {layer} in llm_int8_skip_modules"),
        (
            "held",
            [head],
            [head, layer],
            rf"llm_int8_skip_modules .* \(lm_head, {layer}\) leaves {layer} out, but its files hold",
        ),
    ):
        write_bitsandbytes(tmp_path / name, wide, llm_int8_skip_modules=files, **how)
        state(tmp_path / name, {"quant_method": "bitsandbytes", **how, "llm_int8_skip_modules": stated})
        with pytest.raises(CoraError, match=said):
            load_model(resolve_model(str(tmp_path / name)), torch.float32, torch.device("cpu"), None)


def test_a_model_stored_in_four_bits_trains_in_the_precision_of_the_run(wide: Path, tiny_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    how = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    model = write_bitsandbytes(tmp_path / "stored", wide, load_in_4bit=True, **how)
    settings: dict[str, Any] = {"max_steps": 2, "dtype": "fp32"}
    stored = train(config_for(model, tiny_data, tmp_path / "run", **settings))
    loaded = train(config_for(wide, tiny_data, tmp_path / "other", load_in_4bit=True, **settings))
    for when in ("before", "after"):
        assert stored["heldout"][when]["loss"] == pytest.approx(loaded["heldout"][when]["loss"], abs=1e-5)
    assert stored["versions"]["bitsandbytes"] == loaded["versions"]["bitsandbytes"]
    with pytest.raises(CoraError, match="quantised, and merged ones would be rounded again"):
        merge_adapter(resolve_model(str(tmp_path / "run")), tmp_path / "merged")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mode": "full"}, r"held quantised \(bitsandbytes, 8 bits\), and mode full needs the weights themselves"),
        ({"mode": "pissa"}, "and mode pissa needs the weights themselves"),
        ({"mode": "fb", "b_init": "gradient"}, "and mode fb needs the weights themselves"),
        ({"mode": "dora"}, "PEFT cannot adapt .* in mode dora, as its weights are held quantised"),
        (
            {"mode": "lora", "load_in_4bit": True},
            r"--load-in-4bit does not go with .* stored quantised already \(bitsandbytes, 8 bits\)",
        ),
    ],
)
def test_what_needs_plain_weights_is_refused_on_a_model_stored_in_eight_bits(
    settings: dict[str, Any], said: str, wide: Path, tiny_data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    model = write_bitsandbytes(tmp_path / "stored", wide, load_in_8bit=True)
    with pytest.raises(CoraError, match=said):
        train(config_for(model, tiny_data, tmp_path / "run", max_steps=2, **settings))


def test_weights_of_compressed_tensors_are_asked_for_as_plain_numbers_also_in_a_nested_configuration() -> None:
    stated = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    configs = [LlamaConfig(quantization_config=dict(stated)), Gemma3Config(text_config={"quantization_config": dict(stated)})]
    for config in configs:
        ask_for_plain(config)
    assert configs[0].quantization_config["dequantize"] is configs[1].text_config.quantization_config["dequantize"] is True
    other = LlamaConfig(quantization_config={"quant_method": "gptq", "bits": 4})
    ask_for_plain(other)
    assert "dequantize" not in other.quantization_config


def test_fused_experts_in_float8_are_refused_where_transformers_leaves_out_their_scales(tmp_path: Path) -> None:
    base = tmp_path / "model"
    AutoModelForCausalLM.from_config(build("qwen3_moe")).save_pretrained(base, save_original_format=False)
    tensors = load_file(base / "model.safetensors")
    fused = [name for name in tensors if name.endswith("experts.down_proj")]
    assert fused
    for name in fused:
        tensors |= {name: tensors[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(len(tensors[name]), 1, 1)}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    state(base, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]})
    with pytest.raises(
        CoraError, match=r"experts\.down_proj as float8_e4m3fn with .*down_proj_scale_inv, which transformers did not apply"
    ):
        load_model(resolve_model(str(base)), torch.float32, torch.device("cpu"), None)


def test_single_experts_that_bitsandbytes_holds_are_refused_by_name(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    state(model, {"quant_method": "bitsandbytes", "load_in_4bit": True})
    expert = "model.layers.0.mlp.experts.0.up_proj"
    loaded = torch.nn.ModuleDict({"model": torch.nn.Linear(2, 2)})
    with pytest.raises(CoraError, match=rf"hold {expert}.weight quantised by bitsandbytes, of a single expert"):
        check_left_out(loaded, resolve_model(str(model)), {f"{expert}.weight": "U8"})
    check_left_out(loaded, resolve_model(str(model)), {f"{expert}.weight": "BF16", "model.weight": "U8"})


def of_group(bits: int, *targets: str, **others: Any) -> dict[str, Any]:
    return {
        "targets": list(targets),
        "weights": {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 32},
        **others,
    }


@pytest.mark.parametrize(
    ("groups", "extra", "said"),
    [
        ({"a": of_group(4, "re:.*mlp"), "b": of_group(8, "re:.*attn")}, None, r"in several ways \(a, b\)"),
        (
            {"a": of_group(4, "Linear", format="pack-quantized"), "b": of_group(4, "re:.*attn", format="other")},
            None,
            r"\(a, b\)",
        ),
        ({"a": of_group(4, "re:.*experts.*up"), "b": of_group(8, "re:.*experts.*down")}, None, r"\(a, b\)"),
        (
            {"a": of_group(4, "Linear")},
            "model.layers.0.mlp.experts.0.up_proj.weight_global_scale",
            "weight_global_scale, which",
        ),
        ({"a": of_group(4, "Linear")}, "model.layers.0.mlp.experts.0.up_proj.weight_zero_point", "weight_zero_point, which"),
        ({"a": of_group(4, "Linear")}, "model.layers.0.mlp.up_proj.weight_packed", r"as I32 without .*up_proj\.weight_scale"),
        (
            {"a": of_group(8, "Linear")},
            "model.layers.0.self_attn.other.weight",
            r"as float8_e4m3fn without .*other\.weight_scale",
        ),
    ],
)
def test_weights_of_compressed_tensors_of_which_transformers_makes_others_are_refused(
    groups: dict[str, Any], extra: str | None, said: str, tiny_model: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    state(model, {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups})
    if extra is not None:
        save_file(
            {
                **load_file(model / "model.safetensors"),
                extra: torch.ones(2, 2).to(torch.int32 if "packed" in extra else torch.float8_e4m3fn),
            },
            model / "model.safetensors",
        )
    with pytest.raises(CoraError, match=said):
        load_model(resolve_model(str(model)), torch.float32, torch.device("cpu"), None)


@pytest.mark.parametrize(
    "groups",
    [
        {"a": of_group(4, "re:.*mlp"), "b": of_group(4, "re:.*attn", input_activations={})},
        {"a": of_group(8, "Linear"), "b": of_group(4, "re:.*experts")},
    ],
    ids=["one way", "experts in their own way"],
)
def test_weights_of_compressed_tensors_are_left_to_transformers_where_it_knows_the_way(
    groups: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    state(model, {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups})
    found = resolve_model(str(model))
    check_compressed(found, Checkpoint(found))


def test_the_report_that_transformers_logs_of_failed_conversions_is_not_referred_to() -> None:
    said = "We encountered some issues during automatic conversion of the weights. For details look at the `CONVERSION` entries of the above report!"
    assert "if they are quantised, use a copy" in str(cannot_be_converted(RuntimeError(said)))
    assert cannot_be_converted(RuntimeError("other")) is None


@pytest.mark.parametrize(
    ("entry", "said"), [({}, ""), ({"quant_method": "fp8"}, "has a quantization_config, but its files hold plain weights")]
)
def test_a_quantization_that_the_files_do_not_have_changes_nothing(
    entry: dict[str, Any], said: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    state(model, entry)
    loaded, plain = (
        load_model(resolve_model(str(one)), torch.float32, torch.device("cpu"), None) for one in (model, tiny_model)
    )
    assert all(map(torch.equal, loaded.state_dict().values(), plain.state_dict().values()))
    told = " ".join(capsys.readouterr().err.split())
    assert said in told
    assert "is stored quantised" not in told


class Quantised(torch.Tensor):
    """Numbers of 32 bits on the outside, like torchao's tensors, of which few functions know."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, arguments: Any = (), settings: Any = None) -> Any:
        if function is torch.aminmax:
            raise NotImplementedError("no such operation on quantised numbers")
        return super().__torch_function__(function, types, arguments, settings or {})


@pytest.fixture
def quantised(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of which transformers holds one layer in such numbers."""
    original = AutoModelForCausalLM.from_pretrained

    def load(*args: Any, config: Any, **settings: Any) -> Any:
        del config.quantization_config  # whose package need not be installed
        model, report = original(*args, config=config, **settings | {"dtype": torch.float32})
        layer = model.model.layers[0].self_attn.q_proj
        layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Quantised), requires_grad=False)
        model.is_quantized = True
        return model, report

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    copy = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    state(copy, {"quant_method": "torchao", "quant_type": "float8_weight_only"})
    return copy


def test_tensors_that_are_quantised_inside_are_not_searched_for_infinities(quantised: Path) -> None:
    loaded = load_model(resolve_model(str(quantised)), torch.float32, torch.device("cpu"), None)
    assert isinstance(loaded.model.layers[0].self_attn.q_proj.weight, Quantised)


def test_weights_that_multiply_in_another_precision_only_are_refused_with_its_flag(quantised: Path) -> None:
    with pytest.raises(CoraError, match=r"multiply in float32 only, not in bfloat16; use --dtype fp32"):
        load_model(resolve_model(str(quantised)), torch.bfloat16, torch.device("cpu"), None)
