from pathlib import Path

import pytest

from cora_cli.data.split import load_records, load_test_records
from cora_cli.errors import CoraError
from cora_cli.evaluation.execution.problems import Problem, problem_columns, problem_of
from cora_cli.evaluation.execution.score import Executor
from tests.evaluation.execution.helpers import needs_sandbox

HERE = Path(__file__).parent


def problems(dataset: str) -> list[Problem]:
    records, _ = load_test_records(dataset)
    return [problem_of(problem_columns(record), record.where) for record in records]


@needs_sandbox
@pytest.mark.parametrize("name", ["humaneval.jsonl", "mbpp.jsonl"])
def test_the_reference_solutions_of_the_published_shapes_pass(name: str):
    found = problems(str(HERE / name))
    assert len(found) == 10
    executor = Executor()
    executor.calibrate(found)
    assert {executor.limit(problem) for problem in found} == {4}


@needs_sandbox
@pytest.mark.slow
def test_the_reference_solutions_of_builtin_code_pass():
    records, _ = load_records("builtin:code")
    assert len(records) == 2640
    Executor().calibrate([problem_of(problem_columns(record), record.where) for record in records])


@needs_sandbox
@pytest.mark.parametrize("inside", ["", "\x0c" * 9, "\u2028" * 9])
def test_what_the_solution_defines_after_the_prompt_is_asked_of_the_program_whatever_the_prompt_holds(inside: str):
    given = f'def f(x):\n    """{inside}"""\n'
    tests = "def check(g):\n    assert g(1) == more(1)\ncheck(f)"
    problem = Problem("data.jsonl, line 1", f"{given}    return more(x)\n\ndef more(x):\n    return x + 1\n", tests, given, "f")
    executor = Executor()
    executor.calibrate([problem])
    (outcomes,) = executor.run([problem], [["    return x + 1\n"]])
    assert (outcomes[0].fate, "more" in outcomes[0].detail) == ("exception", True)


@needs_sandbox
def test_a_reference_solution_that_fails_is_named():
    wrong = Problem("data.jsonl, line 3", "def f(): return 1", "assert f() == 2")
    with pytest.raises(
        CoraError, match=r"data.jsonl, line 3: the reference solution does not pass .*: wrong \(assert f\(\) == 2\)"
    ):
        Executor().calibrate([wrong])


@needs_sandbox
@pytest.mark.parametrize(
    ("tests", "reason"),
    [
        ("", "the tests use nothing of the program"),
        ("# f() == 1", "the tests use nothing of the program"),
        ("def test_f():\n    assert f() == 1", "the tests use nothing of the program"),
        ("async def check(g):\n    assert g() == 1\ncheck(f)", "the tests use nothing of the program"),
        (
            "import unittest\nclass T(unittest.TestCase):\n    def test_f(self):\n        self.assertEqual(f(), 1)",
            "use nothing",
        ),
        ("f() == 2", "the tests hold no assertion"),
        ("assert (f() == 2, 'wrong')", "the tests hold no assertion"),
    ],
)
@pytest.mark.filterwarnings("ignore:assertion is always true")
def test_tests_that_every_program_passes_are_named(tests: str, reason: str):
    with pytest.raises(CoraError, match=f"line 3: every program would pass, since .*{reason}"):
        Executor().calibrate([Problem("data.jsonl, line 3", "def f(): return 1", tests)])


@needs_sandbox
@pytest.mark.parametrize("check", ["def  check (g):\n    assert g() == 1", "def own(g):\n    assert g() == 1\ncheck = own"])
def test_a_check_is_called_however_it_is_defined(check: str):
    columns = {"prompt": "def f():\n", "completion": "    return 1", "entry_point": "f", "test": check}
    [[outcome]] = Executor().run([problem_of(columns, "here")], [["    return 2"]])
    assert outcome.fate == "wrong"


def test_the_published_columns_become_records():
    records, schema = load_records(str(HERE / "humaneval.jsonl"))
    assert schema == "prompt"
    assert records[3]["completion"].startswith("    middle = ")
    records, schema = load_records(str(HERE / "mbpp.jsonl"))
    assert schema == "alpaca"
    assert records[1]["output"].startswith("import math")
    assert records[1]["instruction"] == (
        "Write a python function to tell whether a number is not prime. Your code should pass these tests:\n\n"
        "assert is_not_prime(2) == False\nassert is_not_prime(35) == True"
    )


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"instruction": "x", "output": "y"}, "line 1 carries no tests"),
        (
            {"prompt": "def f():", "completion": "", "test": "x", "entry_point": "f()"},
            "entry_point must be the name of a function",
        ),
        ({"output": "x", "assertions": "assert f"}, "assertions must be a list of texts"),
        ({"output": "x", "test_list": [1]}, "test_list must be a list of texts"),
    ],
)
def test_malformed_tests_are_refused(columns: dict, message: str):
    with pytest.raises(CoraError, match=message):
        problem_of(problem_columns(columns), "line 1")


PROMPT = 'import math\n\n\ndef half(x):\n    return x / 2\n\n\ndef area(r):\n    """The area of a circle."""\n'
CIRCLE = Problem("here", PROMPT + "    return math.pi * r * r\n", "", PROMPT, "area")


@pytest.mark.parametrize(
    ("answer", "program"),
    [
        ("    return 1\n", PROMPT + "    return 1\n"),
        ("    return 1\n\ndef other():\n    pass", PROMPT + "    return 1\n"),
        ("    return 1\nprint(area(2))", PROMPT + "    return 1"),
        ("def area(r):\n    return 1", PROMPT[: PROMPT.index("def area")] + "def area(r):\n    return 1"),
        (
            "Here it is:\n```python\ndef area(r):\n    return 1\n```\nIt works.",
            PROMPT[: PROMPT.index("def area")] + "def area(r):\n    return 1",
        ),
        ("```\n    return 1\n```", PROMPT + "    return 1"),
    ],
)
def test_the_program_in_an_answer_to_a_function_s_beginning(answer: str, program: str):
    assert CIRCLE.program(answer) == program


@pytest.mark.parametrize(
    ("answer", "program"),
    [
        ("def f(): pass", "def f(): pass"),
        ("Sure!\n```python\ndef f(): pass\n```\nUse it so:\n```\nf()\n```", "def f(): pass"),
        ("```py\ndef f(): pass", "def f(): pass"),
        ("First:\n```bash\npip install x\n```\nThen:\n```python\ndef f(): pass\n```", "def f(): pass"),
        ("```text\nan example\n```\n\n~~~ Python 3\ndef f(): pass\n~~~", "def f(): pass"),
        ("````{.python .numberLines}\ndef f(): pass\n````", "def f(): pass"),
        ('```python title="f.py"\ndef f(): pass\n```', "def f(): pass"),
        ("1. Write:\n   ```python\n   def f():\n       pass\n   ```", "def f():\n    pass"),
        (
            '```python\ndef f():\n    """\n    ```\n    f()\n    ```\n    """\n```',
            'def f():\n    """\n    ```\n    f()\n    ```\n    """',
        ),
        ("```python\ndef f(): pass\n      ```\nIt works.", "def f(): pass"),
        ("<think>\n```python\ndef f(): 1\n```\n</think>\n\n```python\ndef f(): pass\n```", "def f(): pass"),
        ("It passes.\n</think>\ndef f(): pass", "\ndef f(): pass"),
        (
            "```python\ndef f(t): return re.sub('<think>.*?</think>', '', t)\n```",
            "def f(t): return re.sub('<think>.*?</think>', '', t)",
        ),
        ("def f(t): return t.split('[/THINK]')[-1]", "def f(t): return t.split('[/THINK]')[-1]"),
        ("Try:\n```\ndef g(): pass\n```\nNo.\n</think>\n```python\ndef f(): pass\n```", "def f(): pass"),
        ("<think>\nPerhaps\n```python\ndef f(): pass\n```", ""),
        ("```python\n```\nSorry.", ""),
    ],
)
def test_the_program_in_an_answer(answer: str, program: str):
    assert Problem("here", "", "").program(answer) == program
