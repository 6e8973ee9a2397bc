"""The packed answers of a page, and the page in a browser."""

import base64
import gzip
import json
import random

import pytest

from cora_cli.render.answers import Answer, AnswerSet, Prompt, pack
from cora_cli.render.document import Heading, Text
from cora_cli.render.html import page
from cora_cli.render.table import Cell, Table

HOSTILE = (
    "</script><script>window.pwned = 1</script>",
    "<img src=x onerror='window.pwned = 1'>",
    "nul \0 here",
    "turned \u202egnirts",
    "\u05e9\u05dc\u05d5\u05dd, mixed",
    "",
)


def answer_set(prompts: int = 12) -> AnswerSet:
    """Two runs whose answers differ most at the last prompt; the first prompts and answers are hostile."""
    rows = []
    for number in range(prompts):
        text = HOSTILE[number] if number < len(HOSTILE) else f"answer {number}"
        notes = ("program: failed (</script>)",) if number == 7 else ()
        answers = (Answer(text, (0.5, None), notes), Answer("answer of the other", (0.5 + number / 100, 30.0)))
        rows.append(Prompt(f"{text} prompt {number}", f"the answer {number}", answers))
    return AnswerSet("group", ("one </script>", "two"), ("rouge1", "sacrebleu"), frozenset(), tuple(rows))


def unpacked(text: str):
    return json.loads(gzip.decompress(base64.b64decode(text)))


def test_what_is_packed_comes_back_whatever_the_texts_hold():
    answers = answer_set()
    data = unpacked(pack(answers))
    assert data["runs"] == list(answers.runs)
    assert data["total"] == len(answers.prompts)
    assert [[one[0], one[1]] for one in data["prompts"]] == [[one.prompt, one.reference] for one in answers.prompts]
    assert data["prompts"][7][2] == [
        ["answer 7", [0.5, None], ["program: failed (</script>)"]],
        ["answer of the other", [0.57, 30.0], []],
    ]
    assert pack(answers) == pack(answers)


def test_only_the_first_prompts_are_packed_where_all_would_be_too_large_and_the_total_says_so():
    dice = random.Random(0)
    rows = tuple(Prompt(str(n), "", (Answer(dice.randbytes(400).hex(), (None,)),)) for n in range(60))
    answers = AnswerSet("g", ("one",), ("rouge1",), frozenset(), rows)
    packed = pack(answers, 10_000)
    data = unpacked(packed)
    assert len(packed) <= 10_000
    assert data["total"] == 60
    assert 0 < len(data["prompts"]) < 60
    assert [one[0] for one in data["prompts"]] == [str(n) for n in range(len(data["prompts"]))]


def html() -> str:
    rows = [[Cell(name), Cell(f"{value:,}")] for name, value in (("b", 9), ("a", 1000), ("c", 20))]
    table = Table("Scores", ("method", "trained"), tuple(map(tuple, rows)), ())
    return page([[Heading(1, "A report"), Heading(2, "One"), Text("text"), Heading(2, "Two"), table]], "t", "1", [answer_set()])


def test_no_text_of_an_answer_stands_in_the_page_itself():
    text = html()
    assert not any(hostile and hostile in text for hostile in HOSTILE)
    assert text.count("</script>") == 3  # the data and two scripts
    assert '<a href="#part-4">Answers</a>' in text


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        try:
            found = playwright.chromium.launch()
        except sync_api.Error:
            import shutil

            path = shutil.which("chromium") or shutil.which("google-chrome")
            if path is None:
                pytest.skip("there is no browser")
            found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1200, "dark")])
def test_a_person_can_look_at_the_answers(width, scheme, browser, tmp_path):
    (tmp_path / "report.html").write_text(html())
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True)
    window = context.new_page()
    window.set_default_timeout(60_000)
    faults: list[str] = []
    window.on("pageerror", lambda error: faults.append(str(error)))
    window.on("console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None)
    address = (tmp_path / "report.html").as_uri()

    def title() -> str:
        return window.locator(".shown h3 a").inner_text()

    for number, text in enumerate(HOSTILE, start=1):
        window.goto("about:blank")
        window.goto(f"{address}#answers-1-{number}")
        window.wait_for_selector(".answers[data-ready]")
        assert title() == f"Prompt {number}"
        shown = window.locator(".side pre").first.inner_text()
        assert shown == (text.replace("\0", "\u27e8U+0000\u27e9").replace("\u202e", "\u27e8U+202E\u27e9") or "(empty answer)")
    assert window.evaluate("document.documentElement.scrollWidth") <= width
    window.keyboard.press("j")
    assert title() == "Prompt 7"
    assert window.url.endswith("#answers-1-7")
    window.keyboard.press("k")
    window.locator("select:has(option[value=pair])").select_option("pair")
    window.locator(".prompts button").first.click()
    assert title() == "Prompt 12"
    window.locator("select:has(option[value=worse])").select_option("worse")
    for place, run in enumerate(("0", "1"), start=3):  # the run, and the one that it is compared with
        window.locator(".controls select").nth(place).select_option(run)
    changes = [
        float(text.partition(" (")[0].replace("\u2212", "-")) for text in window.locator(".prompts small").all_inner_texts()
    ]
    assert changes == sorted(changes)
    assert changes[0] < 0
    assert title() == f"Prompt {window.locator('.prompts b').first.inner_text().strip()}"
    assert window.locator(".side h4").all_inner_texts() == ["one </script>", "two"]
    window.get_by_role("button", name="next").click()
    assert title() == f"Prompt {window.locator('.prompts b').nth(1).inner_text().strip()}"
    window.locator("select:has(option[value=noted])").select_option("noted")
    assert title() == "Prompt 8"
    assert "program: failed (</script>)" in window.locator(".shown").inner_text()
    window.locator("select:has(option[value=noted])").select_option("all")
    window.locator("input[type=search]").fill("prompt 11")
    assert title() == "Prompt 12"
    assert window.locator("mark").all_inner_texts()[-2:] == ["answer of", "other"]
    window.locator(".table th button").nth(1).click()
    assert window.locator(".table tbody th").all_inner_texts() == ["b", "c", "a"]
    assert window.evaluate("window.pwned") is None
    assert faults == []
    context.close()
