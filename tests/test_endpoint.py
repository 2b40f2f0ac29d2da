"""The judge behind an endpoint: ways of asking, faults between it and us, limits, resume, estimate, secrets."""

import json
import logging
import math
import random
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from contextlib import nullcontext
from email.utils import formatdate

import pytest
from faulty_server import Server, completion, odds, with_logprobs, with_text
from lab import ROOT

from constitution import endpoint
from constitution.endpoint import Endpoint, Estimate, Pace
from constitution.replies import SPOKEN
from truthward.errors import UserError
from truthward.tables import Judge

KEY = "sk-proj-4fT9xQ.w2Lz_7bN0"
FAULTS = ("silence", "429", "status 500", "status 503", "status 408", "cut", "truncated", "garbage", "empty", "null")


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    """A key, no proxy between, and short waits."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(endpoint, "BACKOFF", 0.01)


@pytest.fixture
def judge(tmp_path):
    """``judge(server, **settings)``: an endpoint there, with its cache in the test's folder."""

    def make(server, cache="replies.jsonl", **values):
        values = {"model": "m", "timeout": 10.0, "retries": 3, "concurrency": 4} | values
        return Endpoint(Judge(base_url=server.url, **values), tmp_path / cache)

    return make


def ask(count: int, text: str = "A or B") -> list[list[dict[str, str]]]:
    return [[{"role": "system", "content": "Be fair."}, {"role": "user", "content": f"{text}? {i}"}] for i in range(count)]


def opinions(requests) -> list[float]:
    return pytest.approx([odds({"messages": request}) for request in requests])


def lines(judge: Endpoint) -> list[dict]:
    return [json.loads(line) for line in judge.cache.read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------- ways of asking


def refuse(*keys):
    """A server that refuses requests with these keys, as OpenAI's do."""

    def answer(body):
        return (400, b'{"error": {"message": "unsupported"}}') if set(keys) & body.keys() else with_text(body)

    return answer


@pytest.mark.parametrize(
    ("answer", "way", "spent"),
    [
        (with_logprobs, "logprobs", 0),
        (with_text, "text", 1),
        (refuse("logprobs"), "text", 1),
        (refuse("max_tokens"), "reasoning", 2),
    ],
)
def test_the_first_request_shows_what_a_server_can_do(judge, answer, way, spent):
    requests = ask(6)
    with Server(answer) as server:
        result = judge(server).choices(requests)
    expected = [odds({"messages": request}) for request in requests]
    assert result == pytest.approx(expected if way == "logprobs" else [math.copysign(SPOKEN, e) for e in expected])
    assert len(server.asked) == len(requests) + spent
    settings = {"temperature": 0} if way != "reasoning" else {}
    asked_for = [body.items() >= (endpoint.WAYS[way] | settings).items() for body in server.asked]
    assert asked_for == [False] * spent + [True] * len(requests)


def test_the_way_is_kept_with_the_replies(judge):
    with Server(with_text) as server:
        judge(server).choices(ask(3))
        judge(server).choices(ask(6))
        judge(server, model="other").choices(ask(1))  # which may run on another server
    assert [body.get("logprobs") for body in server.asked] == [True] + [None] * 6 + [True, None]


def test_a_letter_that_a_server_holds_back_is_unscored_and_counted(judge):
    mute = ask(20)[7]
    with Server(lambda body: completion("?") if body["messages"] == mute else with_logprobs(body)) as server:
        asked = judge(server)
        result = asked.choices(ask(20))
        assert result[7] is None
        assert result.count(None) == asked.counts["unscored"] == 1
        assert judge(server).choices(ask(20)) == result
    assert len(server.asked) == 20  # a reply that has no letter is a reply


def test_too_many_without_a_letter_stop_the_run_before_all_are_paid(judge):
    with Server(lambda body: completion("Well"), delay=0.03) as server, pytest.raises(UserError) as caught:
        judge(server, concurrency=1).choices(ask(40))
    assert len(server.asked) <= 1 + 5 + 1  # a probe, the four that may be and one, one under way
    assert "5 neither letter in the reply" in caught.value.what
    assert caught.value.where == "judge.model"


@pytest.mark.parametrize(("mute", "stops"), [(1, False), (2, True)])
def test_one_is_never_too_many(judge, mute, stops):
    texts = [request[-1]["content"] for request in ask(3)[:mute]]
    answer = lambda body: completion("Well") if body["messages"][-1]["content"] in texts else with_text(body)  # noqa: E731
    with Server(answer) as server, pytest.raises(UserError) if stops else nullcontext():
        assert judge(server).choices(ask(3)).count(None) == mute


# ------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_leaves_no_trace(judge, fault):
    requests = ask(4)
    with Server(with_logprobs, lambda body, attempt: fault if attempt == 0 else None) as server:
        asked = judge(server, timeout=0.7 if fault == "silence" else 10.0)
        assert asked.choices(requests) == opinions(requests)
    assert len(server.asked) == 8
    assert sum(asked.counts.values()) == 4 + 4 + 4 * 8  # replies, faults, and 7 + 1 tokens
    assert asked.counts["replies"] == 4


def test_any_mixture_of_faults_gives_the_result_of_none(judge):
    requests = ask(40)
    quick = [fault for fault in FAULTS if fault != "silence"]

    def fault(body, attempt):
        return random.Random(f"{body['messages']} {attempt}").choice([None, *quick]) if attempt < 3 else None

    with Server(with_logprobs, fault) as server:
        assert judge(server, concurrency=8).choices(requests) == opinions(requests)
    assert len(server.asked) > 80
    assert len(server.answered) == 40


def test_a_request_that_never_gets_a_reply_is_unscored_counted_and_asked_again_next_time(judge, monkeypatch):
    monkeypatch.setattr(endpoint, "BACKOFF", 0.1)
    monkeypatch.setattr(endpoint, "LONGEST_BACKOFF", 0.2)
    bad = ask(20)[3]
    with Server(with_logprobs, lambda body, _: "truncated" if body["messages"] == bad else None) as server:
        asked = judge(server)
        result = asked.choices(ask(20))
        assert [i for i, value in enumerate(result) if value is None] == [3]
        assert asked.counts["malformed reply"] == 4  # one try and three more, after 0.05 to 0.1, then 0.1 to 0.2 seconds
        times = [t for t, body in zip(server.times, server.asked, strict=True) if body["messages"] == bad]
        gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
        assert all(low < gap < low * 2 + 0.3 for low, gap in zip((0.05, 0.1, 0.1), gaps, strict=True))
        server.fault = lambda body, attempt: None
        assert judge(server).choices(ask(20)) == opinions(ask(20))
    assert len(server.asked) == 19 + 4 + 1


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_holds_every_request(judge, form):
    wait = "0.4" if form == "seconds" else formatdate(time.time() + 3, usegmt=True)  # whole seconds, so over two
    least = 0.4 if form == "seconds" else 1.9
    told = ask(20)[1]
    with Server(with_logprobs, delay=0.02) as server:
        asked = judge(server)
        asked.choices(ask(1))
        server.fault = lambda body, attempt: f"429 {wait}" if attempt == 0 and body["messages"] == told else None
        asked.choices(ask(20))
    first, again = (t for t, body in zip(server.times, server.asked, strict=True) if body["messages"] == told)
    assert again - first >= least
    assert sum(t - first >= least for t in server.times) >= 2  # others too, but for those that were under way


@pytest.mark.parametrize(
    ("fault", "where", "fix"),
    [
        ("status 400", "judge.model", "mend judge.model"),
        ("status 401", "environment variable OPENAI_API_KEY", "put a key that may use m there"),
        ("status 403", "environment variable OPENAI_API_KEY", "put a key"),
        ("status 404", "judge.model", "see that m is served there"),
        ("quota", "judge.base_url", "raise the quota"),
        ("429 86400", "judge.base_url", "wait as long as it asks"),
    ],
)
@pytest.mark.parametrize("at", [0, 5])
def test_a_fault_of_the_settings_stops_the_run_at_once(judge, fault, where, fix, at):
    bad = ask(30)[at]
    with Server(with_logprobs, lambda body, _: fault if body["messages"] == bad else None, delay=0.03) as server:
        with pytest.raises(UserError, match=re.escape(where)) as caught:
            judge(server, concurrency=1).choices(ask(30))
        tries = sum(body["messages"] == bad for body in server.asked)
        assert tries == (3 if (fault, at) == ("status 400", 0) else 1)  # every way once; then it is the request
        assert len(server.asked) <= at + tries + 1
    assert caught.value.where == where
    assert fix in caught.value.fix


@pytest.mark.parametrize("start", [True, False])
def test_a_server_that_is_gone_is_said_to_be(judge, start):
    with Server(with_logprobs) as server:
        if start:
            judge(server).choices(ask(1))
    with pytest.raises(UserError, match="gives no reply in 4 tries; the last: no connection") as caught:
        judge(server).choices(ask(500))
    assert caught.value.where == "judge.base_url"


@pytest.mark.parametrize("key", [None, "", "  ", "two words", "naïve-key-0123"])
def test_a_key_that_is_missing_or_none_is_said_before_anything_is_sent(judge, monkeypatch, key):
    monkeypatch.delenv("OPENAI_API_KEY") if key is None else monkeypatch.setenv("OPENAI_API_KEY", key)
    with Server(with_logprobs) as server:
        with pytest.raises(UserError, match="environment variable OPENAI_API_KEY") as caught:
            judge(server).choices(ask(3))
        assert not key or not key.strip() or key not in str(caught.value)
        assert server.asked == []
        assert judge(server, key_env="").choices(ask(3)) == opinions(ask(3))
        (tmp := judge(server)).choices(ask(3))  # all known: no key is needed
        assert tmp.counts == {"unscored": 0}


@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "ftp://x/v1", "http:///v1", "https://me:pass@x/v1", "https://x/v1?key=abc", "http://a b"]
)
def test_an_address_must_be_plain(tmp_path, url):
    with pytest.raises(UserError, match="judge.base_url") as caught:
        Endpoint(Judge(base_url=url, model="m"), tmp_path / "cache")
    assert "pass@" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("most", [1, 3])
def test_no_more_requests_are_under_way_than_allowed(judge, most):
    with Server(with_logprobs, delay=0.02) as server:
        judge(server, concurrency=most).choices(ask(12))
    assert server.most_busy == most


def test_requests_are_spaced_by_the_rate_limit(judge):
    begun = time.monotonic()
    with Server(with_logprobs) as server:
        judge(server, requests_per_minute=600.0, concurrency=8).choices(ask(7))
    assert all(t - begun >= 0.1 * i for i, t in enumerate(server.times))


def test_a_turn_is_taken_by_one_and_a_hold_moves_all(monkeypatch):
    """20 a second: turns at 0, 0.05, (hold of 0.2 at 0.05) 0.25, 0.3."""
    clock, stop = [0.0], threading.Event()
    monkeypatch.setattr(endpoint.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(stop, "wait", lambda seconds: clock.__setitem__(0, clock[0] + max(0.0, seconds)))
    pace, turns = Pace(1200, stop), []
    for i in range(4):
        pace.turn()
        turns.append(clock[0])
        if i == 1:
            pace.hold(0.2)
    assert turns == pytest.approx([0, 0.05, 0.25, 0.3])


def test_the_order_is_that_of_the_requests_and_like_ones_are_asked_once(judge):
    requests = ask(12)
    slow_first = lambda body: time.sleep(0.01 * (12 - int(body["messages"][-1]["content"][-2:]))) or with_logprobs(body)  # noqa: E731
    with Server(slow_first) as server:
        assert judge(server, concurrency=12).choices(requests + requests[::-1]) == opinions(requests + requests[::-1])
    assert len(server.asked) == 12


# ------------------------------------------------------------------------------------------------------------- resume


def test_only_what_is_missing_is_asked_and_a_cut_line_is_dropped(judge):
    with Server(with_logprobs) as server:
        judge(server).choices(ask(5))
        known = judge(server)
        whole = known.cache.read_bytes()
        known.cache.write_bytes(whole[:-10])
        server.asked.clear()
        assert judge(server).choices(ask(8)) == opinions(ask(8))
        assert len(server.asked) == 4
        assert len({line["key"] for line in lines(known)}) == len(lines(known)) == 8
        assert judge(server, model="other").choices(ask(8)) == opinions(ask(8))  # another model's replies are its own
        assert len(server.asked) == 12


SCRIPT = """
import json, sys
from pathlib import Path
from constitution.endpoint import Endpoint
from truthward.tables import Judge
settings = Judge(base_url=sys.argv[1], model="m", concurrency=3)
print(json.dumps(Endpoint(settings, Path(sys.argv[2])).choices(json.load(sys.stdin))))
"""


def test_a_run_killed_in_the_middle_goes_on_and_asks_nothing_twice(tmp_path):
    """Beside the (at most three) requests that were under way at the kill, each is answered exactly once."""
    requests, cache = ask(40), tmp_path / "cache"
    with Server(with_logprobs, delay=0.02) as server:
        command = [sys.executable, "-c", SCRIPT, server.url, str(cache)]
        for rest in (15, 30):
            with subprocess.Popen(command, stdin=subprocess.PIPE, cwd=ROOT, text=True) as process:
                process.stdin.write(json.dumps(requests))
                process.stdin.close()
                while process.poll() is None and (not cache.exists() or cache.read_bytes().count(b"\n") < rest):
                    time.sleep(0.002)
                process.send_signal(signal.SIGKILL)
            assert process.returncode == -signal.SIGKILL
        settings = Judge(base_url=server.url, model="m", concurrency=3)
        assert Endpoint(settings, cache).choices(requests) == opinions(requests)
        assert 40 <= len(server.asked) <= 40 + 2 * 3
    assert len({json.loads(line)["key"] for line in cache.read_text().splitlines()}) == 40


def test_replies_under_way_when_a_run_stops_are_kept(judge):
    with Server(with_logprobs, delay=0.05) as server:
        judge(server).choices(ask(1))
        server.fault = lambda body, _: "status 401" if body["messages"] == ask(5)[1] else None
        server.answer = lambda body: time.sleep(0.05) or with_logprobs(body)
        with pytest.raises(UserError):
            judge(server, concurrency=8).choices(ask(5))
        assert len(lines(judge(server))) == 4  # all but the one that was refused


# ----------------------------------------------------------------------------------------------------------- estimate


def test_an_estimate_asks_little_and_pays_nothing_twice(judge):
    """23 requests, 3 of them probes: 20 * (ceil(8/4) + 4 + ceil(9/4) + 4) = 260 tokens in, 20 out, 20 * 0.05 / 4 s."""
    requests = [[{"role": "system", "content": "Be fair."}, {"role": "user", "content": f"{i:09}"}] for i in range(23)]
    with Server(with_logprobs, delay=0.05) as server:
        asked = judge(server, price_per_million_in=2.0, price_per_million_out=10.0)
        made = asked.estimate(requests)
        assert (made.requests, made.tokens_in, made.tokens_out) == (20, 260, 20)
        assert made.cost == pytest.approx(260 * 2e-6 + 20 * 10e-6)
        assert made.seconds >= 0.25
        assert len(server.asked) == 3
        begun = time.monotonic()
        assert asked.choices(requests) == opinions(requests)
        assert 1 / 4 < (time.monotonic() - begun) / made.seconds < 4
        assert len(server.asked) == 23
        assert asked.estimate(requests) == Estimate(0, 0, 0, 0.0, 0.0)


def test_the_rate_limit_bounds_the_estimate(judge):
    with Server(with_logprobs) as server:
        assert judge(server, requests_per_minute=600.0).estimate(ask(13)).seconds == pytest.approx(1.0)


def test_an_estimate_is_a_line_for_people():
    line = "1,200 requests, about 300,000 tokens in, at most 1,200 out, about 5 min, cost at most about 0.62"
    assert str(Estimate(1200, 300_000, 1200, 300.0, 0.618)) == line
    assert "about 42 s" in str(Estimate(1, 1, 1, 42.0, 0.0))


# ------------------------------------------------------------------------------------------------------------ secrets


@pytest.mark.parametrize("fault", ["echo 401", "echo 400", "echo 404", "echo 500", "reply"])
def test_the_key_is_nowhere(judge, tmp_path, caplog, capfd, fault):
    caplog.set_level(logging.DEBUG)
    answer = (lambda body: completion(f"A because {KEY} and {KEY[:-3]}")) if fault == "reply" else with_logprobs
    with Server(answer, lambda body, _: fault if fault != "reply" else None) as server:
        asked = judge(server)
        try:
            assert asked.choices(ask(2)) == [SPOKEN] * 2
            assert fault == "reply"
            shown = ""
        except UserError as error:
            assert "***" in str(error)
            shown = (
                "".join(traceback.format_exception(error)) + repr(error) + repr(error.__cause__) + repr(error.__context__)
            )
    assert server.keys == {KEY}
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    everything = shown + written + caplog.text + "".join(capfd.readouterr()) + repr(asked) + repr(asked.settings)
    for part in (KEY, KEY[:-3], "4fT9xQ", "w2Lz_7bN0"):
        assert part not in everything


def test_a_placeholder_is_no_secret(judge, monkeypatch):
    """Hiding the key ``A`` would take the letter out of every reply."""
    monkeypatch.setenv("OPENAI_API_KEY", "A")
    with Server(lambda body: completion("A")) as server:
        assert judge(server).choices(ask(3)) == [SPOKEN] * 3
