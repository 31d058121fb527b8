"""The judge's client against a real endpoint on this machine: retries, refusals, limits, and where the key goes."""

import random
import threading
import time
from typing import Any

import pytest
from evaluation.scripted_judge import ScriptedJudge

from anima.errors import ConfigError
from anima.evaluation.judge import Endpoint, EndpointJudge, JudgeError, RateLimit, endpoint_key

KEY = "sk-very-secret-0123456789"


def endpoint(server: ScriptedJudge, **changes: Any) -> Endpoint:
    return Endpoint(**{"base_url": server.base_url, "model": "m", "api_key": KEY, "max_retries": 3, **changes})


def test_one_reply() -> None:
    with ScriptedJudge({}, reply="8 7\nfine") as server:
        reply = EndpointJudge(endpoint(server, max_tokens=77)).ask("be fair", "which?")
    assert (reply.text, reply.prompt_tokens, reply.completion_tokens, reply.finish_reason) == (
        "8 7\nfine",
        100,
        10,
        "stop",
    )
    (body,) = server.requests
    assert body["messages"] == [{"role": "system", "content": "be fair"}, {"role": "user", "content": "which?"}]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.0, 77)
    assert server.keys == [f"Bearer {KEY}"]


def test_other_spellings_of_limits() -> None:
    with ScriptedJudge({}, reply="x") as server:
        EndpointJudge(endpoint(server, temperature=None, max_tokens_name="max_completion_tokens")).ask("", "which?")
    (body,) = server.requests
    assert "temperature" not in body
    assert "max_tokens" not in body
    assert body["max_completion_tokens"] == 1024
    assert [message["role"] for message in body["messages"]] == ["user"]


def test_busy_and_failing_endpoints_are_tried_again_with_growing_pauses() -> None:
    random.seed(7)
    untouched = random.getstate()
    pauses: list[float] = []
    failures = [(429, {}), (500, {}), (429, {"Retry-After": "9"})]
    with ScriptedJudge({}, reply="2", failures=failures) as server:
        assert EndpointJudge(endpoint(server), sleep=pauses.append).ask("", "x").text == "2"
    assert 0.5 <= pauses[0] <= 1
    assert 1 <= pauses[1] <= 2
    assert pauses[2] == 9
    assert random.getstate() == untouched  # the tournament's draws do not depend on how busy the endpoint was


def test_after_the_last_retry_it_says_so_without_the_key() -> None:
    with ScriptedJudge({}, failures=[(503, {})] * 9) as server, pytest.raises(JudgeError) as caught:
        EndpointJudge(endpoint(server), sleep=lambda seconds: None).ask("", "x")
    assert len(server.keys) == 4
    assert "same command again" in str(caught.value)
    assert KEY not in str(caught.value)
    assert "(the key)" in str(caught.value)


@pytest.mark.parametrize("headers", [{}, {"Content-Type": "text/html"}])
def test_another_kind_of_server_or_an_error_under_status_200(headers: dict[str, str]) -> None:
    with ScriptedJudge({}, failures=[(200, headers)]) as server, pytest.raises(ConfigError) as caught:
        EndpointJudge(endpoint(server)).ask("", "x")
    assert "no chat completion" in str(caught.value)
    assert "--base_url" in str(caught.value)
    assert KEY not in str(caught.value)


def test_no_server_at_all() -> None:
    judge = EndpointJudge(
        Endpoint(base_url="http://127.0.0.1:9/v1", model="m", api_key=KEY, max_retries=1), sleep=lambda seconds: None
    )
    with pytest.raises(JudgeError, match="does not answer"):
        judge.ask("", "x")


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_refusal_is_not_tried_again(status: int) -> None:
    with ScriptedJudge({}, failures=[(status, {})] * 2) as server, pytest.raises(ConfigError) as caught:
        EndpointJudge(endpoint(server)).ask("", "x")
    assert len(server.keys) == 1
    assert KEY not in str(caught.value)
    assert KEY not in repr(endpoint(server))


def test_keys() -> None:
    assert endpoint_key("given", None, {"OPENAI_API_KEY": "environment"}) == "given"
    assert endpoint_key(None, None, {"OPENAI_API_KEY": "environment"}) == "environment"
    assert endpoint_key(None, "http://127.0.0.1:1/v1", {}) == "none"
    with pytest.raises(ConfigError, match="neither an endpoint nor a key"):
        endpoint_key(None, None, {})


def test_the_rate_limit_spaces_all_threads() -> None:
    now, slept = [0.0], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)

    limit = RateLimit(30, clock=lambda: now[0], sleep=sleep)
    for _ in range(3):
        limit.wait()
    assert slept == [2.0, 4.0]  # nobody slept really: the second and the third were given later turns
    now[0] = 100.0
    limit.wait()
    assert slept == [2.0, 4.0]
    RateLimit(None, sleep=lambda seconds: pytest.fail("no limit")).wait()


def test_threads_share_a_judge() -> None:
    with ScriptedJudge({}, reply="2", seconds=0.2) as server:
        judge = EndpointJudge(endpoint(server))
        threads = [threading.Thread(target=judge.ask, args=("", "x")) for _ in range(8)]
        begin = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(server.requests) == 8
    assert time.monotonic() - begin < 1.3  # one after another they would take 1.6
