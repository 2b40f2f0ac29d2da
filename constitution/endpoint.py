"""A judge behind an OpenAI-compatible endpoint: which of two letters it chooses, as a log-odds.

Every reply goes to a cache file before it is used, so that what was paid for is never asked for again, whatever ends a
run. Faults of the network and the server are retried; faults of the settings stop the run at once with what to do. The
key is read from the environment at the first request and goes nowhere but into the client.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import re
import statistics
import threading
import time
from collections import Counter
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import openai

from constitution import replies
from constitution.judge import Request
from constitution.replies import Reply
from truthward.console import progress
from truthward.errors import UserError
from truthward.ledger import digest
from truthward.redaction import without_secrets
from truthward.tables import Judge

# What a server can be asked, best first; the first request shows which of them it does.
WAYS: dict[str, dict[str, Any]] = {
    "logprobs": {"logprobs": True, "top_logprobs": 20, "max_tokens": 1, "temperature": 0},
    "text": {"max_tokens": 16, "temperature": 0},
    "reasoning": {"max_completion_tokens": 2048},  # models that think first take neither max_tokens nor a temperature
}
UNSCORED = 0.1  # share of requests that may end without a score
SILENCE = 5  # requests in a row without any reply, after which the server counts as gone
BACKOFF, LONGEST_BACKOFF = 0.5, 30.0  # seconds before the first retry, doubled for each further one up to the second
LONGEST_WAIT = 600.0  # seconds of Retry-After that are obeyed; a server that asks for more is out of quota
SECRET = 8  # characters; a shorter key is a placeholder for a server that asks for none, and hiding it would maul replies
PROBES = 3  # requests that the estimate asks, one after the other, to see how fast the server is
CHARACTERS_A_TOKEN, TOKENS_A_MESSAGE = 4, 4  # of English under common BPE vocabularies; role and separators


@dataclass(frozen=True)
class Fault:
    """Why there is no reply."""

    what: str
    status: int = 0  # of HTTP
    said: str = ""  # by the server, without the key
    wait: float = 0.0  # seconds that the server asks to be left alone
    passing: bool = True  # worth another try


@dataclass(frozen=True)
class Estimate:
    """What is still to be asked and what it will take. Tokens out, and with them the cost, are upper bounds."""

    requests: int
    tokens_in: int
    tokens_out: int
    seconds: float
    cost: float

    def times(self, requests: int) -> Estimate:
        """The same for so many requests of the same kind."""
        share = requests / self.requests
        tokens_in, tokens_out = round(self.tokens_in * share), round(self.tokens_out * share)
        return Estimate(requests, tokens_in, tokens_out, self.seconds * share, self.cost * share)

    def __str__(self) -> str:
        minutes = f"{self.seconds / 60:.0f} min" if self.seconds >= 90 else f"{self.seconds:.0f} s"
        tokens = f"about {self.tokens_in:,} tokens in, at most {self.tokens_out:,} out"
        return f"{self.requests:,} requests, {tokens}, about {minutes}, cost at most about {self.cost:.2f}"


class Stopped(Exception):
    """Another request met a fault that ends the run."""


class Pace:
    """A token bucket that holds one token: requests are spaced evenly, and all of them wait when the server says so."""

    def __init__(self, a_minute: float, stop: threading.Event) -> None:
        self.interval = 60 / a_minute if a_minute else 0.0
        self._free, self._stop, self._lock = 0.0, stop, threading.Lock()

    def hold(self, seconds: float) -> None:
        """No request for so long, from now."""
        with self._lock:
            self._free = max(self._free, time.monotonic() + seconds)

    def turn(self) -> None:
        """Wait for the next free moment, and take it.

        Raises:
            Stopped: the run ended meanwhile.
        """
        wait = 0.0
        while True:
            self.rest(wait)
            with self._lock:
                wait = self._free - time.monotonic()
                if wait <= 0:
                    self._free = time.monotonic() + self.interval
                    return

    def rest(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise Stopped


class Endpoint:
    """A judge that is asked over the network.

    Args:
        settings: where it is and how fast it may be asked.
        cache: the file of its replies (JSONL), made at need; one process at a time.

    Raises:
        UserError: ``judge.base_url`` is no plain http(s) address, or the cache was damaged.
    """

    def __init__(self, settings: Judge, cache: Path) -> None:
        if not re.fullmatch(r"https?://[^/?#@\s]+(/[^?#@\s]*)?", settings.base_url):
            fix = "write http(s)://host/v1, without user, password or query; a key goes into the environment"
            raise UserError("this is not the plain address of a server", where="judge.base_url", fix=fix)
        self.settings, self.cache = settings, cache
        self.counts: Counter[str] = Counter()  # replies, tokens, requests without a score, and faults by name
        self._replies = replies.read(cache, settings.model)
        self._way = next((reply.way for reply in self._replies.values()), "")
        self._seconds: list[float] = []  # that replies took
        self._key = ""
        self._client: openai.OpenAI | None = None
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._pace = Pace(settings.requests_per_minute, self._stop)

    # ---------------------------------------------------------------------------------------------------- in public

    def choices(self, requests: list[Request], description: str = "asking the judge") -> list[float | None]:
        """log p(A) - log p(B) (nats) for each request to choose the letter A or B; None where there is no score.

        Requests that are alike are asked once. The order of the result is that of the requests.

        Args:
            requests: chats whose last message asks for the letter A or B.
            description: of the progress bar.

        Raises:
            UserError: the settings or the key are wrong, the server is gone, or more than :data:`UNSCORED` of the
                requests (and more than one) have no score. Replies so far are kept.
        """
        keys = [self._digest(request) for request in requests]
        wanted = dict(zip(keys, requests, strict=True))
        missing = {key: request for key, request in wanted.items() if key not in self._replies}
        why: Counter[str] = Counter()
        with contextlib.closing(self._answers(wanted, missing)) as answers, progress() as bar:
            task = bar.add_task(description, total=len(wanted))
            for key, fault in answers:
                bar.advance(task)
                if self._score(key) is None:
                    why[fault.what if fault else "neither letter in the reply"] += 1
                if sum(why.values()) > max(1, int(UNSCORED * len(wanted))):
                    raise self._too_many(why, len(wanted))
        self.counts["unscored"] += sum(why.values())
        return [self._score(key) for key in keys]

    def estimate(self, requests: list[Request]) -> Estimate:
        """What asking those of the requests that are not in the cache will take.

        The first :data:`PROBES` of them are asked here; their replies are kept, so that nothing is paid twice. Tokens in:
        by :data:`CHARACTERS_A_TOKEN` and :data:`TOKENS_A_MESSAGE`. Seconds: the median of the replies so far, shared by
        the requests under way at once, or what the rate limit allows, whichever is more.

        Raises:
            UserError: as :meth:`choices`.
        """
        missing = {key: request for request in requests if (key := self._digest(request)) not in self._replies}
        for key in list(missing)[:PROBES]:
            self._probe(missing.pop(key))
        lengths = [len(message["content"]) for request in missing.values() for message in request]
        tokens_in = sum(math.ceil(length / CHARACTERS_A_TOKEN) + TOKENS_A_MESSAGE for length in lengths)
        longest = max((n for name, n in WAYS.get(self._way, {}).items() if name.startswith("max_")), default=0)
        tokens_out = len(missing) * longest
        latency = statistics.median(self._seconds) if missing else 0.0
        seconds = len(missing) * max(latency / self.settings.concurrency, self._pace.interval)
        cost = (tokens_in * self.settings.price_per_million_in + tokens_out * self.settings.price_per_million_out) / 1e6
        return Estimate(len(missing), tokens_in, tokens_out, seconds, cost)

    # ------------------------------------------------------------------------------------------------------- asking

    def _answers(self, wanted: dict[str, Request], missing: dict[str, Request]) -> Generator[tuple[str, Fault | None]]:
        """Each key, with its fault where there is no reply: known ones first, the others as they come."""
        yield from ((key, None) for key in wanted if key not in missing)
        left = dict(missing)
        if left and not self._way:
            first = next(iter(left))
            self._probe(left.pop(first))
            yield first, None
        silent = 0
        pool = ThreadPoolExecutor(self.settings.concurrency)
        try:
            futures = {pool.submit(self._ask, request): key for key, request in left.items()}
            for future in as_completed(futures):
                fault = future.result()
                silent = silent + 1 if fault else 0
                if fault and (not fault.passing or silent == SILENCE):
                    raise self._refusal(fault, missing[futures[future]])
                yield futures[future], fault
        finally:
            self._stop.set()  # the waiting ones end here; those under way first get their reply, which is paid for
            pool.shutdown()
            self._stop.clear()

    def _probe(self, request: Request) -> None:
        """Ask a request alone; the first also settles the way: the best that the server takes and answers in full."""
        fault = Fault("")
        for way in [self._way] if self._way else WAYS:
            answer = self._try(request, way)
            if isinstance(answer, Fault):
                fault = answer
                if fault.status not in (400, 422):
                    break
            elif answer.top or way != "logprobs":
                self._way = way
                self._keep(request, answer)
                return
        raise self._refusal(fault, request)

    def _ask(self, request: Request) -> Fault | None:
        """Ask, and keep the reply; the fault if there is none."""
        answer = self._try(request, self._way)
        if isinstance(answer, Fault):
            return answer
        self._keep(request, answer)
        return None

    def _try(self, request: Request, way: str) -> Reply | Fault:
        """Ask until there is a reply, or no hope, or no try left."""
        attempt = 0
        while True:
            self._pace.turn()
            answer = self._attempt(request, way)
            if isinstance(answer, Reply):
                return answer
            with self._lock:
                self.counts[answer.what] += 1
            if not answer.passing or attempt == self.settings.retries:
                return answer
            self._pace.hold(answer.wait)
            self._pace.rest(random.uniform(0.5, 1) * min(LONGEST_BACKOFF, BACKOFF * 2**attempt))
            attempt += 1

    def _attempt(self, request: Request, way: str) -> Reply | Fault:
        create: Any = self._connect().chat.completions.with_raw_response.create
        begun = time.monotonic()
        try:
            raw = create(model=self.settings.model, messages=request, **WAYS[way])
            reply = replies.parse(raw.content, way)
        except openai.APITimeoutError:
            return Fault("time-out")
        except openai.APIConnectionError:
            return Fault("no connection")
        except openai.APIStatusError as error:
            return self._status_fault(error)
        except (ValueError, LookupError, TypeError, AttributeError):
            return Fault("malformed reply")
        with self._lock:
            self._seconds.append(time.monotonic() - begun)
        return reply

    def _connect(self) -> openai.OpenAI:
        """The client, made at the first request.

        Raises:
            UserError: the environment has no key, or one that no header can carry.
        """
        name = self.settings.key_env
        with self._lock:
            if self._client is None:
                key = os.environ.get(name, "").strip() if name else "none"
                if not re.fullmatch(r"[!-~]+", key):  # the client's own complaint would show the key
                    what = "has characters that no key has" if key else "is not set"
                    fix = f'export {name}=<key>, or set judge.key_env = "" for a server that asks for none'
                    raise UserError(f"the judge's key {what}", where=f"environment variable {name}", fix=fix)
                self._key = key if len(key) >= SECRET else ""
                url, timeout = self.settings.base_url, self.settings.timeout
                self._client = openai.OpenAI(api_key=key, base_url=url, timeout=timeout, max_retries=0)
            return self._client

    def _status_fault(self, error: openai.APIStatusError) -> Fault:
        status, wait = error.status_code, _retry_after(error.response.headers)
        passing = status in (408, 409, 429) or status >= 500
        if error.code == "insufficient_quota" or wait > LONGEST_WAIT:  # waiting will not help
            passing = False
        body = error.body
        said = str(body["message"] if isinstance(body, dict) and "message" in body else error.message)
        said = without_secrets(self._without_key(said))
        return Fault(f"HTTP {status}", status, " ".join(said.split())[:300], wait, passing)

    def _without_key(self, text: str) -> str:
        """A server may repeat the key, whole or in part."""
        if not self._key:
            return text
        return re.sub(r"[\w-]{6,}", lambda word: "***" if word[0] in self._key else word[0], text.replace(self._key, "***"))

    # ------------------------------------------------------------------------------------------------------ keeping

    def _digest(self, request: Request) -> str:
        return digest([self.settings.model, request])

    def _score(self, key: str) -> float | None:
        reply = self._replies.get(key)
        return reply.choice if reply else None

    def _keep(self, request: Request, reply: Reply) -> None:
        """Put a reply on disk, then into use."""
        key, reply = self._digest(request), replace(reply, text=without_secrets(self._without_key(reply.text)))
        with self._lock:
            replies.append(self.cache, key, self.settings.model, reply)
            self._replies[key] = reply
            self.counts += Counter({"replies": 1, "tokens in": reply.tokens_in, "tokens out": reply.tokens_out})

    # ---------------------------------------------------------------------------------------------------- complaints

    def _refusal(self, fault: Fault, request: Request) -> UserError:
        """What a fault that ends the run means for the one who wrote the settings."""
        s, kept = self.settings, f"replies so far are kept in {self.cache}; run again to go on"
        said = fault.what + (f" ({fault.said})" if fault.said else "")
        if fault.passing:
            what = f"{s.base_url} gives no reply in {s.retries + 1} tries; the last: {said}"
            return UserError(what, where="judge.base_url", fix=f"see that the server runs and can be reached; {kept}")
        what = f"{s.base_url} answers {said}"
        if fault.status in (401, 403):
            where = f"environment variable {s.key_env}" if s.key_env else "judge.key_env"
            return UserError(what, where=where, fix=f"put a key that may use {s.model} there; {kept}")
        if fault.status == 404:
            fix = f"see that {s.model} is served there, and that judge.base_url ends as its maker says (mostly /v1)"
            return UserError(what, where="judge.model", fix=fix)
        if fault.status == 429 or fault.status >= 500:
            return UserError(what, where="judge.base_url", fix=f"raise the quota, or wait as long as it asks; {kept}")
        begins = " ".join(request[-1]["content"].split())[:60]
        return UserError(what, where="judge.model", fix=f"mend judge.model, or the request that begins {begins!r}; {kept}")

    def _too_many(self, why: Counter[str], total: int) -> UserError:
        reasons = ", ".join(f"{count} {reason}" for reason, count in why.most_common())
        what = f"too many of {total} requests have no score: {reasons}"
        fix = f"take a judge that answers with A or B; look at its replies in {self.cache}"
        return UserError(what, where="judge.model", fix=fix)


def _retry_after(headers: Any) -> float:
    """Seconds that a server asks to wait, given as a number or as a date; 0 where it says nothing that can be read."""
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0
