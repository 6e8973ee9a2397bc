"""Thoughts in answers: kept with their marks, counted, and no part of a program."""

import pytest
from transformers import AddedToken, AutoTokenizer

from cora_cli import embedded
from cora_cli.evaluation.execution.problems import Problem
from cora_cli.evaluation.generate import Request, _answer
from cora_cli.evaluation.shortcomings import count_shortcomings
from cora_cli.evaluation.thoughts import thought_tokens, without_thoughts

HARMONY = ("<|start|>", "<|end|>", "<|channel|>", "<|message|>")
SAID = "<|channel|>final<|message|>"
ANSWERS = {
    "gpt-oss": (HARMONY, f"<|channel|>analysis<|message|>add both<|end|><|start|>assistant{SAID}3"),
    "Magistral": (("[THINK]", "[/THINK]"), "[THINK]add both[/THINK]3"),
    "Seed-OSS": (("<seed:think>", "</seed:think>"), "<seed:think>add both</seed:think>3"),
    "Gemma 4": (("<|channel>", "<channel|>"), "<|channel>thought\nadd both<channel|>3"),
    "Command A": (("<|START_THINKING|>", "<|END_THINKING|>"), "add both<|END_THINKING|>3"),
    "Qwen3": ((), "<think>\nadd both\n</think>\n\n3"),
}


@pytest.mark.parametrize(("special", "written"), ANSWERS.values(), ids=ANSWERS)
def test_thoughts_between_special_tokens_keep_their_marks_and_are_counted(special: tuple[str, ...], written: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded.model_directory())
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in special], special_tokens=True)
    lead = SAID if special == HARMONY else ""
    request = Request([1], "1+2?", "3", lead, keeps=thought_tokens(tokenizer))
    plain = _answer(tokenizer, tokenizer(f"{lead}3<|im_end|>", add_special_tokens=False)["input_ids"], request)
    answer = _answer(tokenizer, tokenizer(f"{written}<|im_end|>", add_special_tokens=False)["input_ids"], request)
    assert (plain, answer) == ("3", written)
    lines = [{"prediction": prediction, "reference": "3"} for prediction in (plain, answer)]
    assert count_shortcomings(lines) == {"thoughts": 1}
    assert Problem("", "", "").program(answer).strip() == "3"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("<think>a</think>\n<think>b</think>3", "3"),
        ("<think>a</think>\n<think>b", ""),
        ("<thought>\na\n</thought>\n3", "\n3"),
        ("◁think▷a◁/think▷3", "3"),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final <|constrain|>json<|message|>3", "3"),
        ('it may be "yes"</think>{"score": 3}', '{"score": 3}'),
        ("it's 'yes'</think>{'score': 3}", "{'score': 3}"),
        ("`</think>` ends them</think>3", "3"),
        ("```\nx = 1</think>```\nx = 3\n```", "```\nx = 3\n```"),
        ('return text.split("</think>\\n")[1]', None),
        ("```\nmark = '</think>'\n```", None),
        ("```\n# </think> ends them\n```", None),
        ("3 <think>b</think>", None),
    ],
)
def test_thoughts_end_with_the_first_mark_that_is_no_part_of_a_program(answer: str, said: str | None) -> None:
    assert without_thoughts(answer) == (answer if said is None else said)
