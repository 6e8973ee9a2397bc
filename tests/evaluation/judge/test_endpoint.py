"""Faults of an endpoint, the limits on requests and cost, and what is sent and kept."""

import dataclasses
import json
import re
import ssl
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from cora_cli.cli.judge import run
from cora_cli.errors import CoraError, UsageError
from cora_cli.evaluation.judge import endpoint
from cora_cli.evaluation.judge.config import JudgeConfig
from cora_cli.evaluation.judge.endpoint import retry_after
from cora_cli.evaluation.judge.judge import judge, price
from cora_cli.reading import read_jsonl
from tests.evaluation.judge.server import Server, judge_of, serving, write_answers

FAULTS = ["429", "500", "503", "hang up", "half", "not json", "garbage", "range", None, None, None]


@pytest.fixture
def answers(tmp_path) -> Path:
    return write_answers(tmp_path / "answers", 8)


def outcomes(out):
    return [line["outcome"] for line in read_jsonl(out.judgments)]


def test_faulty_replies_change_no_number(tmp_path, answers) -> None:
    with serving() as server:
        expected, _ = judge(judge_of(server, answers, tmp_path / "calm"))
    with serving(fault=lambda n: FAULTS[n * 7 % len(FAULTS)]) as server:
        # One fault of each kind can hit one request in a row; malformed replies get as many tries as it takes.
        found, out = judge(judge_of(server, answers, tmp_path / "faulty", retries=30, tries=20))
    assert found["rubrics"] == expected["rubrics"]
    seen = outcomes(out)
    assert seen.count("judged") == 112
    assert {"lost", "malformed"} <= set(seen)
    assert "failed" not in seen
    reasons = {line["reason"] for line in read_jsonl(out.judgments) if line["outcome"] == "lost"}
    assert any("429" in reason for reason in reasons)
    assert any("cut off" in reason for reason in reasons)
    assert any("no chat completion" in reason for reason in reasons)


def test_a_reply_in_another_encoding_is_called_so(tmp_path, answers) -> None:
    with serving(fault=lambda n: "latin-1" if n == 0 else None) as server:
        _, out = judge(judge_of(server, answers, tmp_path / "out", concurrency=1, rubric=("paper",)))
    lost = [line["reason"] for line in read_jsonl(out.judgments) if line["outcome"] == "lost"]
    assert lost == ["the reply is not UTF-8 text"]


def test_a_malformed_reply_is_asked_again_without_being_quoted(tmp_path, answers) -> None:
    with serving(fault=lambda n: "garbage" if n == 0 else None) as server:
        judge(judge_of(server, answers, tmp_path / "out", concurrency=1, rubric=("paper",)))
    first = server.requests[0].message
    (again,) = [request.message for request in server.requests if request.message.startswith(first + "\n\n")]
    assert again == f"{first}\n\nYour last reply could not be used: it was not one JSON object."


def test_a_failure_is_kept_as_a_failure_and_asked_again_next_time(tmp_path, answers) -> None:
    with serving(fault=lambda n: "500" if n < 3 else None) as server:
        config = judge_of(server, answers, tmp_path / "out", concurrency=1, retries=0, rubric=("paper",))
        record, out = judge(config)
        assert outcomes(out).count("failed") == 3
        assert sum(record["rubrics"]["paper"]["failed"].values()) == 3
        sent = len(server.requests)
        record, out = judge(config)
        assert len(server.requests) == sent + 3
        assert record["rubrics"]["paper"]["failed"] == {}


def test_a_judge_that_never_makes_sense_gives_failures(tmp_path, answers) -> None:
    with serving(fault=lambda n: "range") as server:
        record, out = judge(judge_of(server, answers, tmp_path / "out", tries=2, rubric=("paper",)))
    paper = record["rubrics"]["paper"]
    assert sum(paper["failed"].values()) == paper["asked"] == 48
    assert outcomes(out) == ["malformed"] * 48 + outcomes(out)[48:]
    assert outcomes(out).count("failed") == 48
    assert paper["criteria"]["fluency"]["scores"]["answers"] is None
    assert paper["disqualified"] == ["relevance", "accuracy"]


def test_a_reply_that_is_cut_off_is_called_so_and_the_command_says_why_judgments_are_missing(tmp_path, answers, capfd) -> None:
    with serving(fault=lambda n: "cut") as server:
        _, out = judge(judge_of(server, answers, tmp_path / "out", tries=2, rubric=("paper",)))
    assert {line["reason"] for line in read_jsonl(out.judgments) if line["outcome"] == "malformed"} == {
        "it was cut off at the limit of its length"
    }
    assert (
        "48 of 48 judgments were not obtained, 48 of them for this reason: 2 malformed replies; the last: it was cut off at the limit of its "
        "length; a higher --max-tokens allows longer replies" in capfd.readouterr().err
    )


def test_the_command_fails_after_its_page_where_no_judgment_at_all_was_obtained(tmp_path, answers, capfd) -> None:
    settings = {"tries": 1, "rubric": ("preference",), "retest": False}
    with serving(fault=lambda n: "range") as server:
        config = judge_of(server, answers, tmp_path / "out", **settings)
        with pytest.raises(CoraError, match="no judgment was obtained, for the reason above; the same command asks again"):
            run(config)
        assert (tmp_path / "out" / "judge.json").is_file()
        assert "judgments were not obtained" in "".join(capfd.readouterr())
        server.fault = lambda n: "range" if n % 2 else None
        run(config)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("moved", "status 308: it leads to https://elsewhere.example/v1, and no redirect is followed"),
        ("error", """the body of the reply was no chat completion: '{"error": {"message": "no such model"}}'"""),
    ],
)
def test_an_endpoint_that_gives_no_completions_is_quoted(fault, words, tmp_path, answers) -> None:
    with serving(fault=lambda n: fault) as server, pytest.raises(CoraError) as failed:
        judge(judge_of(server, answers, tmp_path / "out", retries=0))
    assert words in str(failed.value)


@pytest.mark.parametrize("fault", ["slow headers", "slow body"])
def test_the_timeout_bounds_a_reply_that_comes_byte_by_byte(fault, tmp_path, answers) -> None:
    with serving(fault=lambda n: fault if n == 0 else "401") as server:
        settings = judge_of(server, answers, tmp_path / "out", concurrency=1, retries=0, timeout=0.5)
        with pytest.raises(CoraError, match="status 401"):
            judge(settings)
        assert len(server.requests) == 2
    (first,) = read_jsonl(tmp_path / "out" / "judgments.jsonl")
    assert (first["outcome"], first["reason"]) == ("failed", "the reply took longer than the 0.5 s of --timeout")


def test_a_reply_in_parts_is_read_without_its_thoughts(tmp_path, answers) -> None:
    with serving() as server:
        expected, _ = judge(judge_of(server, answers, tmp_path / "plain"))
    with serving(fault=lambda n: "parts") as server:
        found, _ = judge(judge_of(server, answers, tmp_path / "parts"))
    assert found["rubrics"] == expected["rubrics"]


def test_a_key_too_short_to_be_a_secret_changes_no_reply(tmp_path, answers, monkeypatch) -> None:
    with serving() as server:
        expected, _ = judge(judge_of(server, answers, tmp_path / "plain"))
    monkeypatch.setenv("CORA_JUDGE_KEY", "0")
    with serving() as server:
        found, _ = judge(judge_of(server, answers, tmp_path / "keyed", tries=1))
    assert found["rubrics"] == expected["rubrics"]
    assert {request.headers["Authorization"] for request in server.requests} == {"Bearer 0"}


def test_a_retry_after_holds_back_every_request(tmp_path, answers) -> None:
    with serving(fault=lambda n: "429 1" if n == 0 else None) as server:
        judge(judge_of(server, answers, tmp_path / "out", concurrency=1))
    assert server.requests[1].at - server.requests[0].at >= 1.0


def test_retry_after_is_a_number_or_a_date() -> None:
    assert [retry_after(value) for value in (None, "7", " 0.5 ", "soon", "-3")] == [None, 7.0, 0.5, None, None]
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert retry_after("Wed, 21 Oct 2065 07:28:00 GMT") > 1e8


def test_a_very_long_retry_after_ends_the_command(tmp_path, answers) -> None:
    with serving(fault=lambda n: "429 86400") as server, pytest.raises(CoraError, match="asks to wait for 86400 s"):
        judge(judge_of(server, answers, tmp_path / "out", concurrency=1))
    assert len(server.requests) == 1


@pytest.mark.parametrize("concurrency", [1, 4])
def test_no_more_requests_are_in_flight_than_allowed(tmp_path, answers, concurrency) -> None:
    with serving(seconds=0.01) as server:
        judge(judge_of(server, answers, tmp_path / "out", concurrency=concurrency, rubric=("preference",)))
    assert 1 <= server.most_at_once <= concurrency


def test_a_request_that_is_refused_for_every_message_ends_the_command(tmp_path, answers) -> None:
    with serving(fault=lambda n: "422") as server:
        with pytest.raises(CoraError, match=r"refuses the request \(status 422"):
            judge(judge_of(server, answers, tmp_path / "out", concurrency=1))
        assert len(server.requests) == 10


def test_few_messages_that_are_all_refused_end_the_command(tmp_path, answers) -> None:
    with serving(fault=lambda n: "400") as server, pytest.raises(CoraError, match=r"refuses the request \(status 400"):
        judge(judge_of(server, answers, tmp_path / "out", concurrency=1, rubric=("paper",), retest=False, limit=2))


@pytest.mark.parametrize("status", ["401", "403", "404", "302"])
def test_a_refusal_ends_the_command_with_its_reason_and_keeps_what_was_judged(tmp_path, answers, status) -> None:
    with serving(fault=lambda n: status if n >= 5 else None) as server:
        config = judge_of(server, answers, tmp_path / "out", concurrency=1)
        with pytest.raises(CoraError, match=rf"refuses the request \(status {status}"):
            judge(config)
        assert len(server.requests) == 6
        assert price(config).answered == 5
    assert not (tmp_path / "out" / "judge.json").exists()


def test_a_message_that_is_refused_for_what_it_says_is_a_failure_and_the_others_are_judged(tmp_path, answers) -> None:
    """Also in the next call, which asks for nothing else."""
    refused = {0, 2}
    with serving(fault=lambda n: "filtered" if n in refused else None) as server:
        config = judge_of(server, answers, tmp_path / "out", concurrency=1, tries=1, rubric=("paper",))
        for requests in (0, 2):
            record, out = judge(config)
            failed = [line for line in read_jsonl(out.judgments) if line["outcome"] not in ("judged", "malformed")]
            assert len(failed) == 2 + requests
            assert json.dumps(failed).count("content_filter") == 2 + requests
            assert sum(record["rubrics"]["paper"]["failed"].values()) == 2
            refused |= {len(server.requests), len(server.requests) + 1}


def test_an_address_of_the_wrong_scheme_or_authority_is_refused_at_once_with_what_would_work(
    tmp_path, answers, monkeypatch
) -> None:
    with serving() as server:
        encrypted = judge_of(server, answers, tmp_path / "out", retries=0)
        encrypted = dataclasses.replace(encrypted, endpoint=server.url.replace("http:", "https:"))
        with pytest.raises(CoraError, match="begins with http, not https"):
            judge(encrypted)
    unknown = ssl.SSLCertVerificationError()
    unknown.verify_message = "unable to get local issuer certificate"

    def fail(*_: object, **__: object) -> None:
        raise urllib.error.URLError(unknown)

    monkeypatch.setattr(urllib.request.OpenerDirector, "open", fail)
    with pytest.raises(CoraError, match=r"not valid: unable to get local issuer .* environment variable SSL_CERT_FILE"):
        judge(encrypted)


def test_an_endpoint_that_is_down_is_given_up(tmp_path, answers, monkeypatch) -> None:
    monkeypatch.setattr(endpoint, "FAILURES_IN_A_ROW", 3)
    with serving() as server:
        config = judge_of(server, answers, tmp_path / "out", retries=1, concurrency=2)
    with pytest.raises(CoraError, match="gave no reply to 3 calls in a row"):
        judge(config)


def through(proxy, monkeypatch, name="http_proxy"):
    for usual in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(usual, raising=False)
    monkeypatch.setenv(name, proxy)


@pytest.mark.parametrize(
    "proxy", ["http://", "http://proxy:port", "socks5://127.0.0.1:9", "http://a b", "http://[::1", "://", " "]
)
def test_a_proxy_that_can_be_none_is_refused_by_the_name_of_its_variable(proxy, tmp_path, answers, monkeypatch) -> None:
    through(proxy, monkeypatch)
    settings = judge_of(Server(url="http://judge.invalid/v1"), answers, tmp_path / "out")
    with pytest.raises(CoraError, match=r"variable http_proxy is not the address .* put judge.invalid into no_proxy"):
        judge(settings)
    monkeypatch.setenv("no_proxy", "judge.invalid")
    endpoint.Endpoint(settings)


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY"])
def test_a_proxy_that_is_not_there_is_named_by_its_variable_without_its_password(name, tmp_path, answers, monkeypatch) -> None:
    through("http://me:secret@127.0.0.1:9", monkeypatch, name)
    with pytest.raises(CoraError, match=f"no connection: .* through the proxy that {name} names") as failed:
        judge(judge_of(Server(url="http://judge.invalid/v1"), answers, tmp_path / "out", retries=0))
    assert "secret" not in str(failed.value)


def test_the_key_is_sent_and_written_nowhere(tmp_path, answers, monkeypatch, capfd) -> None:
    monkeypatch.setenv("CORA_JUDGE_KEY", "sk-very-secret")

    def say(message):
        return '{"fluency": 1, "relevance": 2, "accuracy": 3, "reason": "sk-very-secret"}'

    with serving(say=say, fault=lambda n: "500" if n == 1 else None) as server:
        judge(judge_of(server, answers, tmp_path / "out", rubric=("paper",)))
    assert {request.headers["Authorization"] for request in server.requests} == {"Bearer sk-very-secret"}
    for path in (tmp_path / "out").rglob("*"):
        assert b"secret" not in path.read_bytes()
    assert "secret" not in "".join(capfd.readouterr())


def test_without_a_key_none_is_sent_and_other_variables_are_not_read(tmp_path, answers, monkeypatch) -> None:
    monkeypatch.delenv("CORA_JUDGE_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other")
    with serving() as server:
        judge(judge_of(server, answers, tmp_path / "out", rubric=("preference",), retest=False))
    assert not any("Authorization" in request.headers for request in server.requests)


def test_parameters_are_merged_into_the_request(tmp_path, answers) -> None:
    with serving() as server:
        own = '{"temperature": null, "max_tokens": null, "max_completion_tokens": 50}'
        judge(judge_of(server, answers, tmp_path / "out", parameters=own, rubric=("preference",)))
    body = server.requests[0].body
    assert {key: value for key, value in body.items() if key != "messages"} == {
        "model": "planted",
        "stream": False,
        "max_completion_tokens": 50,
    }


def test_the_judge_sees_nothing_that_tells_whose_answer_it_is(tmp_path, answers) -> None:
    base = write_answers(tmp_path / "elsewhere", 8, seed=1)
    with serving() as server:
        judge(judge_of(server, answers, tmp_path / "out", base=str(base)))
    text = json.dumps([request.body for request in server.requests])
    assert not re.search(r"elsewhere|shuffled|base\b|retest|predictions", text)
    # Requests are mixed: the first ones are not all of one kind.
    assert len({request.message.split("\n")[0] for request in server.requests[:20]}) == 2


def test_the_cost_stays_below_its_limit_and_a_higher_one_continues(tmp_path, answers) -> None:
    prices = {"price_in": 1000.0, "price_out": 1000.0, "max_tokens": 20, "retest": False}
    with serving() as server:
        config = judge_of(server, answers, tmp_path / "out", max_cost=3.0, **prices)
        with pytest.raises(CoraError, match=r"could exceed --max-cost 3 .* a higher --max-cost continues"):
            judge(config)
        sent = len(server.requests)
        # Each answered request cost 110 tokens at 1000 per million.
        assert 0 < sent * 0.11 <= 3.0
        record, _ = judge(judge_of(server, answers, tmp_path / "out", max_cost=1000.0, **prices))
        assert len(server.requests) == len({request.message for request in server.requests})
    assert record["cost"] == pytest.approx(len(server.requests) * 0.11)
    assert record["tokens"] == {"in": 100 * len(server.requests), "out": 10 * len(server.requests)}


def test_lost_replies_count_as_paid(tmp_path, answers) -> None:
    with serving(fault=lambda n: "half" if n < 4 else None) as server:
        prices = {"price_in": 1.0, "price_out": 1.0, "max_tokens": 20}
        record, out = judge(judge_of(server, answers, tmp_path / "out", concurrency=1, **prices))
    lost = [line for line in read_jsonl(out.judgments) if line["outcome"] == "lost"]
    assert len(lost) == 4
    assert {(line["tokens_out"], line["estimated"]) for line in lost} == {(20, True)}
    assert record["tokens"]["out"] == 4 * 20 + 10 * outcomes(out).count("judged")


def test_a_dry_run_sends_and_writes_nothing(tmp_path, answers) -> None:
    with serving() as server:
        config = judge_of(server, answers, tmp_path / "out", price_in=10.0, price_out=30.0, max_tokens=50)
        found = price(config)
        assert server.requests == []
        assert not (tmp_path / "out").exists()
        judge(config)
        assert found.requests == len(server.requests)
        assert found.cost == pytest.approx((found.tokens_in * 10 + found.tokens_out * 30) / 1e6)
        assert price(config).requests == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"endpoint": "ftp://x"}, "--endpoint must be an address"),
        ({"endpoint": "http://user:secret@x/v1"}, "without user, password or query, not 'x/v1'"),
        ({"endpoint": "https://x/v1?key=secret"}, "not 'https://x/v1'"),
        ({"endpoint": "http://x/v1", "judge": None}, "--judge names the model"),
        ({"endpoint": None, "judge": None}, "give one judge"),
        ({"judge_model": "m"}, "give one judge"),
        ({"endpoint": None, "judge": None, "judge_model": "m", "max_cost": 1.0}, "no effect on a local judge"),
        ({"endpoint": None, "judge": None, "judge_model": "m", "retries": 1}, "--retries has no effect on a local judge"),
        ({"batch_size": 2}, "--batch-size has no effect on a judge at an endpoint"),
        ({"max_cost": 1.0}, "--max-cost needs --price-in"),
        ({"concurrency": 0}, "--concurrency must be at least 1"),
        ({"limit": 1}, "--limit must be at least 2"),
        ({"timeout": 0.0}, "--timeout must be above 0"),
        ({"parameters": "[1]"}, "--parameters must be a JSON object"),
        ({"parameters": "{"}, "--parameters must be a JSON object"),
        ({"parameters": '{"model": "x"}'}, "cannot set model"),
        ({"parameters": '{"seed": NaN}'}, '--parameters must hold finite numbers, not {"seed": NaN}'),
        ({"parameters": '{"seed": 1e999}'}, "--parameters must hold finite numbers"),
        ({"runs": ("a", "b")}, "give either run directories or --from"),
        ({"runs": ("a", "b"), "from_predictions": None}, "several runs need --output-dir"),
        ({"with_base": True}, "--with-base needs run directories"),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(settings, words) -> None:
    with pytest.raises(UsageError, match=re.escape(words)) as refused:
        JudgeConfig(**{"from_predictions": "p.jsonl", "endpoint": "http://x/v1", "judge": "j", **settings})
    assert "secret" not in str(refused.value)
