"""What a judge behind an endpoint said: read from the server's JSON, kept in a file, and turned into a log-odds."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from truthward.errors import UserError

SPOKEN = math.log(0.9 / 0.1)  # nats that a letter in plain text counts: as if it had been said with probability 0.9
FLOOR = -30.0  # log-probabilities below it are taken as it; some servers write -9999 for "not at all"


@dataclass(frozen=True)
class Reply:
    """The way a server was asked, its text, the first token's likeliest as (token, log p), and the tokens it counted."""

    way: str
    text: str
    top: list[tuple[str, float]]
    tokens_in: int = 0
    tokens_out: int = 0

    @property
    def choice(self) -> float | None:
        """log p(A) - log p(B) in nats; None where the reply has neither letter.

        From log-probabilities: each letter's sum over the tokens that are the letter but for space around it. A letter
        that is not among them gets their smallest, which is the most it can have, so the result errs towards 0. From
        text: the first A or B that stands alone, counted as :data:`SPOKEN`.
        """
        if self.way != "logprobs":
            found = re.search(r"\b[AB]\b", self.text)
            return None if found is None else SPOKEN if found[0] == "A" else -SPOKEN
        logprobs = {letter: [p for token, p in self.top if token.strip() == letter] for letter in "AB"}
        if not any(logprobs.values()):
            return None
        least = min(p for _, p in self.top)
        return _log_sum_exp(logprobs["A"] or [least]) - _log_sum_exp(logprobs["B"] or [least])


def parse(content: bytes, way: str) -> Reply:
    """A chat completion as the server sent it.

    Raises:
        ValueError, LookupError, TypeError, AttributeError: it is no JSON, or not of a completion's form.
    """
    body = json.loads(content)
    choice, usage = body["choices"][0], body.get("usage") or {}
    steps = (choice.get("logprobs") or {}).get("content") or []
    likeliest = steps[0].get("top_logprobs") or [] if steps else []
    return Reply(
        way=way,
        text=str(choice["message"].get("content") or ""),
        top=[(str(one["token"]), _number(one["logprob"])) for one in likeliest],
        tokens_in=int(usage.get("prompt_tokens") or 0),
        tokens_out=int(usage.get("completion_tokens") or 0),
    )


def append(cache: Path, key: str, model: str, reply: Reply) -> None:
    """Put a reply on disk: when this returns it outlasts any kill."""
    line = json.dumps({"key": key, "model": model, **asdict(reply)}, ensure_ascii=False) + "\n"
    cache.parent.mkdir(parents=True, exist_ok=True)
    with open(cache, "ab", buffering=0) as file:
        file.write(line.encode())
        os.fsync(file.fileno())


def read(cache: Path, model: str) -> dict[str, Reply]:
    """A model's replies by key; a last line that was cut off by a kill is dropped from the file.

    Raises:
        UserError: another line is damaged.
    """
    if not cache.exists():
        return {}
    whole = cache.read_bytes()
    whole = whole[: whole.rfind(b"\n") + 1]
    os.truncate(cache, len(whole))
    replies = {}
    for number, text in enumerate(whole.split(b"\n")[:-1], 1):
        try:
            line = json.loads(text)
            key, whose = line.pop("key"), line.pop("model")
            reply = Reply(**line | {"top": [(token, logprob) for token, logprob in line["top"]]})
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError("this line is damaged", where=f"{cache}:{number}", fix="delete it; it is asked again") from error
        if whose == model:
            replies[key] = reply
    return replies


def _number(value: Any) -> float:
    """A log-probability, held above :data:`FLOOR` (minus infinity is a value that servers give).

    Raises:
        ValueError, TypeError: it is no number.
    """
    number = float(value)
    if math.isnan(number):
        raise ValueError("not a number")
    return max(FLOOR, number)


def _log_sum_exp(values: list[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values))
