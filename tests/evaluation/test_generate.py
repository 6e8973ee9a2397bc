import errno
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from cora_cli import embedded, writing
from cora_cli.data.templates import Template
from cora_cli.errors import CoraError
from cora_cli.evaluation.decode import PooledDecoder
from cora_cli.evaluation.generate import BatchedGenerate, Engine, Request, _answer, end_tokens, generate, transformers_engine
from cora_cli.evaluation.sampling import Sampling
from cora_cli.reading import read_jsonl
from cora_cli.rundir import EvaluationDirectory

from .helpers import UNUSED, Answers, Numbers, requests_of


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def answers(model: Any) -> Answers:
    return Answers(model)


@pytest.fixture
def out(tmp_path: Path) -> EvaluationDirectory:
    return EvaluationDirectory(tmp_path)


def answer_all(
    model: Any,
    tokenizer: Numbers,
    requests: list[Request],
    batch_size: int,
    max_new_tokens: int,
    out: EvaluationDirectory,
    kind: str = "pool",
) -> dict[str, Any]:
    """`generate` with the pool, or with transformers' own loop."""
    prompts = [request.input_ids for request in requests]
    ends = end_tokens(model.generation_config.eos_token_id, [tokenizer.eos_token_id])
    if kind == "pool":
        engine: Engine = transformers_engine(model, tokenizer, ends, prompts, batch_size, max_new_tokens)
        assert isinstance(engine, PooledDecoder)
    else:
        engine = BatchedGenerate(model, ends, tokenizer.pad_token_id, batch_size, max_new_tokens)
    return generate(engine, tokenizer, ends, requests, out)


def predictions(out: EvaluationDirectory) -> list[dict[str, Any]]:
    return read_jsonl(out.predictions)


@settings(derandomize=True, deadline=None, max_examples=12)
@given(
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=7),
    batch_size=st.integers(1, 4),
    end_at=st.integers(0, 7),
    pad_is_end=st.booleans(),
    kind=st.sampled_from(["pool", "generate"]),
)
def test_batched_greedy_answers_are_those_of_one_prompt_at_a_time(
    model: Any, answers: Answers, lengths: list[int], batch_size: int, end_at: int, pad_is_end: bool, kind: str
) -> None:
    requests = requests_of(*lengths)
    alone = [answers.greedy(request.input_ids, 8) for request in requests]
    assume(all(clear for _, clear in alone))
    # The token at position `end_at` of one answer is the end token; other answers stop where they contain it too.
    end = alone[0][0][end_at]
    tokenizer = Numbers(eos_token_id=end, pad_token_id=end if pad_is_end else UNUSED)
    with tempfile.TemporaryDirectory() as directory:
        out = EvaluationDirectory(Path(directory))
        done = answer_all(model, tokenizer, requests, batch_size, 8, out, kind)
        found = predictions(out)
    for number, (line, (tokens, _)) in enumerate(zip(found, alone, strict=True)):
        stopped = end in tokens
        body = tokens[: tokens.index(end)] if stopped else tokens
        assert line == {
            "index": number,
            "prompt": f"prompt {number}",
            "reference": f"reference {number}",
            "prediction": " ".join(map(str, body)),
            "finish_reason": "stop" if stopped else "length",
            "new_tokens": len(body) + stopped,
        }
    assert found[0]["finish_reason"] == "stop"
    assert done["engine"] == kind
    assert done["new_tokens"] == sum(line["new_tokens"] for line in found)


def test_longest_prompts_go_first_and_predictions_come_in_the_order_of_the_requests(
    model: Any, out: EvaluationDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    waves: list[list[int]] = []
    real = PooledDecoder.answer

    def spied(self: PooledDecoder, wave: Any, finished: Any) -> Any:
        waves.append([len(prompt) for prompt in wave])
        return real(self, wave, finished)

    monkeypatch.setattr(PooledDecoder, "answer", spied)
    done = answer_all(model, Numbers(), requests_of(4, 9, 2, 9, 6), 1, 3, out)
    assert waves == [[9, 9, 6, 4], [2]]
    assert [line["prompt"] for line in predictions(out)] == [f"prompt {number}" for number in range(5)]
    assert done["new_tokens"] == 15
    assert not out.partial_predictions.exists()


def leaking() -> GenerationConfig:
    return GenerationConfig(
        do_sample=True,
        temperature=5.0,
        repetition_penalty=5.0,
        max_length=3,
        eos_token_id=7,
        no_repeat_ngram_size=1,
        num_beams=2,
    )


@pytest.mark.parametrize("kind", ["pool", "generate"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_models_own_generation_settings_change_nothing(
    tiny_model: Path, answers: Answers, tmp_path: Path, wrapped: bool, kind: str
) -> None:
    requests = requests_of(5, 3, 8)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    model.generation_config = leaking()
    if wrapped:  # a fresh LoRA adapter, whose B is zero
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
        model.generation_config = leaking()
    answer_all(model, Numbers(), requests, 3, 12, EvaluationDirectory(tmp_path), kind)
    expected = [" ".join(map(str, answers.greedy(request.input_ids, 12)[0])) for request in requests]
    assert [line["prediction"] for line in predictions(EvaluationDirectory(tmp_path))] == expected


def test_a_model_that_the_pool_does_not_support_uses_transformers_with_a_notice(
    tiny_model: Path, answers: Answers, out: EvaluationDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = requests_of(5, 3)
    eager = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="eager").eval()
    engine = transformers_engine(eager, Numbers(), [UNUSED], [request.input_ids for request in requests], 2, 6)
    assert (
        "the faster pooled decoder does not support this model, because its attention accepts no custom mask"
        in capsys.readouterr().err
    )
    assert generate(engine, Numbers(), [UNUSED], requests, out)["engine"] == "generate"
    expected = [" ".join(map(str, answers.greedy(request.input_ids, 6)[0])) for request in requests]
    assert [line["prediction"] for line in predictions(out)] == expected


# Interrupted and continued

LENGTHS = (4, 9, 2, 7, 6, 3, 5, 8, 4, 4)
"""With a batch of one: waves of four, four and two."""


@pytest.fixture
def whole(model: Any, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """`predictions.jsonl` of these requests, uninterrupted."""
    out = EvaluationDirectory(tmp_path_factory.mktemp("whole"))
    answer_all(model, Numbers(), requests_of(*LENGTHS), 1, 5, out)
    return out.predictions.read_bytes()


def interrupt(model: Any, out: EvaluationDirectory, waves: int) -> None:
    real, left = PooledDecoder.answer, waves

    def answer(*arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PooledDecoder, "answer", answer)
        with pytest.raises(KeyboardInterrupt):
            answer_all(model, Numbers(), requests_of(*LENGTHS), 1, 5, out)


def test_an_interrupted_generation_continues_to_the_same_bytes(model: Any, out: EvaluationDirectory, whole: bytes) -> None:
    interrupt(model, out, 2)
    assert not out.predictions.exists()
    assert len(read_jsonl(out.partial_predictions)) == 8
    done = answer_all(model, Numbers(), requests_of(*LENGTHS), 1, 5, out)
    assert out.predictions.read_bytes() == whole
    assert done["new_tokens"] == 2 * 5


@pytest.mark.parametrize("cut", [1, 30, -1])
def test_a_wave_with_a_partial_line_is_answered_again_completely(
    model: Any, out: EvaluationDirectory, whole: bytes, cut: int
) -> None:
    interrupt(model, out, 2)
    lines = out.partial_predictions.read_bytes().splitlines(keepends=True)
    out.partial_predictions.write_bytes(b"".join(lines[:-1]) + lines[-1][:cut])
    # Stopped again, so that lines are appended after the damage.
    interrupt(model, out, 1)
    assert all(json.loads(line)["index"] in range(10) for line in out.partial_predictions.read_text().splitlines())
    done = answer_all(model, Numbers(), requests_of(*LENGTHS), 1, 5, out)
    assert out.predictions.read_bytes() == whole
    assert done["new_tokens"] == 2 * 5


def test_a_full_disk_is_reported_and_keeps_finished_waves(
    model: Any, out: EvaluationDirectory, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(model, out, 1)

    def full(path: Path) -> Any:
        raise writing.disk_error(OSError(errno.ENOSPC, "No space left on device"), path)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "open_to_append", full)
        with pytest.raises(CoraError, match=r"disk is full.*predictions\.partial\.jsonl"):
            answer_all(model, Numbers(), requests_of(*LENGTHS), 1, 5, out)
    assert len(read_jsonl(out.partial_predictions)) == 4
    answer_all(model, Numbers(), requests_of(*LENGTHS), 1, 5, out)
    assert out.predictions.read_bytes() == whole


def test_the_models_own_end_of_turn_token_ends_an_answer_too(
    model: Any, answers: Answers, out: EvaluationDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    [request] = requests_of(5)
    tokens, _ = answers.greedy(request.input_ids, 8)
    monkeypatch.setattr(model, "generation_config", GenerationConfig(eos_token_id=[tokens[3], UNUSED]))
    answer_all(model, Numbers(), [request], 1, 8, out)
    [line] = predictions(out)
    assert line["finish_reason"] == "stop"
    assert line["prediction"] == " ".join(map(str, tokens[: tokens.index(tokens[3])]))
    assert model.generation_config.eos_token_id == [tokens[3], UNUSED]


def test_a_lead_with_special_tokens_is_no_part_of_the_prediction():
    chat_tokenizer = AutoTokenizer.from_pretrained(embedded.model_directory())
    lead = "<|im_start|>final\n"
    ids = chat_tokenizer(f"{lead}good day", add_special_tokens=False)["input_ids"]
    request = Request([1], "", "", lead)
    assert _answer(chat_tokenizer, ids, request) == "good day"
    assert _answer(chat_tokenizer, ids[1:], request) == "good day"  # the lead is there without its special token
    assert _answer(chat_tokenizer, ids, Request([1], "", "")) == "final\ngood day"


def test_special_tokens_that_references_have_stay_in_a_prediction():
    chat_tokenizer = AutoTokenizer.from_pretrained(embedded.model_directory())
    ids = chat_tokenizer("<|im_start|>a<file_sep>b", add_special_tokens=False)["input_ids"]
    kept = frozenset(chat_tokenizer.convert_tokens_to_ids(["<file_sep>"]))
    assert _answer(chat_tokenizer, ids, Request([1], "", "x<file_sep>y", keeps=kept)) == "a<file_sep>b"
    assert _answer(chat_tokenizer, ids, Request([1], "", "xy")) == "ab"


def test_special_tokens_are_listed_once_and_not_for_each_answer(monkeypatch):
    chat_tokenizer = AutoTokenizer.from_pretrained(embedded.model_directory())
    ids = chat_tokenizer("a<file_sep>b", add_special_tokens=False)["input_ids"]
    added, listed = chat_tokenizer.added_tokens_decoder, []
    monkeypatch.setattr(type(chat_tokenizer), "added_tokens_decoder", property(lambda _: listed.append(1) or added))
    for _ in range(3):
        assert _answer(chat_tokenizer, ids, Request([1], "", "", keeps=frozenset(ids))) == "a<file_sep>b"
    assert len(listed) == 1


def test_an_answer_that_continues_a_function_keeps_its_indentation():
    # As the tokenizers of Llama 2: spaces are ▁, and decoding leaves out the first space of a text.
    vocabulary = {token: place for place, token in enumerate(["<unk>", "▁", "\n", *"abdefnrtu():", "▁▁▁▁"])}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    prompt, answer = (tokenizer.convert_tokens_to_ids(list(text)) for text in ("def▁f():\n", "return▁b"))
    ids = [vocabulary["▁▁▁▁"], *answer]
    assert _answer(tokenizer, ids, Request(prompt, "def f():\n", "", continues=True)) == "    return b"
    assert _answer(tokenizer, ids, Request(prompt, "def f():\n", "")) == "   return b"


@pytest.mark.parametrize("own", ["x", [2, "x"], True])
def test_an_end_token_that_is_no_id_is_refused(own):
    with pytest.raises(CoraError, match="eos_token_id that is no token id"):
        end_tokens(own, {1})


@pytest.mark.parametrize("own", [-1, [2, -1], [2, 2**40]])
def test_an_end_token_that_no_tokenizer_can_hold_ends_nothing(own):
    tokenizer = AutoTokenizer.from_pretrained(embedded.model_directory())
    ends = end_tokens(own, {2})
    assert ends == [2]
    assert Template("plain", "prompt", tokenizer).without_end("an answer", ends) == "an answer"


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_a_model_with_an_adapter_of_its_input_answers_as_its_forward_pass_does(kind, tiny_model: Path):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    base.generation_config = GenerationConfig(max_new_tokens=1, eos_token_id=UNUSED)
    tuned = get_peft_model(base, kind(num_virtual_tokens=3, task_type="CAUSAL_LM")).eval()
    prompts, answers = [[5, 9, 40, 77], [8, 3], [100, 7, 21]], []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            for _ in range(4):
                ids = torch.cat([ids, tuned(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        answers.append(ids[0, len(prompt) :].tolist())
    own = base.generation_config
    engine = transformers_engine(tuned, Numbers(), [UNUSED], prompts, 2, 4)
    assert engine.answer(prompts, lambda: None) == answers
    assert base.generation_config is own


def test_an_activated_lora_answers_as_its_forward_pass_does(tiny_model: Path):
    """It changes the tokens from its invocation, here 100 and 7, on; the prompts that compare the ways of decoding need not hold one."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    config = LoraConfig(
        r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[100, 7]
    )
    tuned = get_peft_model(base, config).eval()
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    prompts = [[5, 9, 40, 77, 12, 13, 14, 15], [8, 3], [21, 30, 100, 7, 12], [5, 100, 7], [9, 9, 9, 100, 7, 8, 3]]

    def alone(prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            for _ in range(4):
                ids = torch.cat([ids, tuned(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        return ids[0, len(prompt) :].tolist()

    answers = [alone(prompt) for prompt in prompts]
    engine = transformers_engine(tuned, Numbers(), [UNUSED], prompts, 5, 4)
    assert engine.answer(prompts, lambda: None) == answers
    with tuned.disable_adapter():
        assert [alone(prompt) == answer for prompt, answer in zip(prompts, answers, strict=True)] == [True, True, *3 * [False]]


@pytest.mark.parametrize("sampling", [None, Sampling(0.8, 0)])
def test_logits_that_are_no_numbers_give_no_token_at_any_step(sampling, tiny_model: Path):
    damaged = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    damaged.model.norm.weight.data.fill_(torch.nan)
    engine = BatchedGenerate(damaged, [2], 2, 4, 3, sampling)
    with pytest.raises(CoraError, match=r"the model's output is not finite \(NaN or infinity\), so it has no answers"):
        engine.answer([[5, 6, 7]], lambda: None, ["0 0"])


def test_a_temperature_near_zero_gives_the_most_likely_token():
    logits = torch.tensor([[1.0, 3.0, 2.0], [-4.0, -5.0, -torch.inf]])
    assert Sampling(5e-324, 0).choose(logits, ["0 0", "1 0"], [0, 0]) == [1, 0]


def test_a_model_with_which_transformers_cannot_answer_is_refused_with_its_reason():
    small = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    config = AutoConfig.for_model(
        "qwen3_5_text", **small, **linear, num_attention_heads=4, num_key_value_heads=2, layer_types=["linear_attention"]
    )
    only_linear = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(
        CoraError,
        match=r"^Qwen3_5ForCausalLM cannot answer prompts: transformers' generate ends in ValueError .*LinearAttention",
    ):
        transformers_engine(only_linear, Numbers(), [2], [[3, 4, 5]], 1, 2)


def test_prompts_whose_keys_stand_for_many_tokens_are_answered_as_alone(capfd):
    # 128 tokens have one key together, so padding among them would change it; the longest prompt of a batch has none.
    config = AutoConfig.for_model(
        "deepseek_v4",
        **{"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8},
        **{"num_attention_heads": 4, "num_key_value_heads": 1, "q_lora_rank": 16, "index_head_dim": 8, "index_n_heads": 4},
        **{"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "sliding_window": 8},
        layer_types=["heavily_compressed_attention"],
        initializer_range=0.3,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    prompts = [torch.randint(3, 99, (length,)).tolist() for length in (180, 150, 20)]
    engine = transformers_engine(model, Numbers(), [UNUSED], prompts, 3, 4)
    assert "prompts of one length, since padding changes its logits" in capfd.readouterr().err
    together = engine.answer(prompts, lambda: None)
    assert together == [engine.answer([prompt], lambda: None)[0] for prompt in prompts]
