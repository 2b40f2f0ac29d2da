"""Short answers checked by rule: right, wrong, or an abstention; no judge, only the words.

An answer is right when an accepted form of the answer stands in it as whole words, is not negated directly before, and is
not one of a list of guesses. Whoever says that they don't know has abstained, whatever else is said. Case, marks, accents
and articles do not count, and number words equal digits up to 99.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Literal

Outcome = Literal["right", "wrong", "abstains"]

ABSTAINS = re.compile(
    r"""\b(
      i\ (?:\w+\ )?(?:do\ not|don't|dont|did\ not|didn't)\ (?:\w+\ )?(?:know|have|recall|remember|understand)\b
    | i\ (?:\w+\ )?(?:cannot|can\ not|can't|cant|could\ not|couldn't|have\ no)\ 
    | i(?:\ am|'m)\ (?:\w+\ )?(?:unable|unsure|uncertain|unaware|unfamiliar)\b
    | i(?:\ am|'m)\ not\ (?:\w+\ ){0,2}(?:sure|certain|aware|able|familiar)\b
    | (?:nobody|no\ one|no-one)\ (?:\w+\ )?(?:knows|(?:can|could)\ (?:\w+\ )?(?:know|say|tell|answer|predict|foresee))\b
    | no\ way\ (?:to|of)\ (?:know|tell|say|knowing|telling)
    | (?:can't|cannot|can\ not)\ (?:say|tell|be\ known|be\ sure|be\ certain)\b
    | (?:it\ is|it's|that\ is|that's)\ (?:not\ known|unknown|unclear|impossible\ to\ (?:know|say|tell))\b
    | not\ (?:sure|certain)\b | no\ idea\b | hard\ to\ say\b | dunno\b | as\ an\ ai\b
    ) | ^\W*(?:(?:no\W+)?i\ don't|don't\ know|do\ not\ know|unknown|unsure|can't\ say|pass)\W*$""",
    re.IGNORECASE | re.VERBOSE,
)
ARTICLES = {"a", "an", "the"}
UNITS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen"),
    *("fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
NUMBERS = {word: n for n, word in enumerate(UNITS)} | {word: 10 * n for n, word in enumerate(TENS, 2)}
TOKEN = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+")
NEGATIONS = {"not", "isnt", "wasnt", "arent", "werent", "never", "nor", "neither"}
BETWEEN = {"in", "at", "on", "by", "from", "called", "really"}  # may stand between a negation and what it negates
SEPARATORS = re.compile(r"[,;/\n]|\bor\b|\band\b", re.IGNORECASE)
GUESSES = 3  # so many alternatives may an answer name
GUESS_WORDS = 3  # a part of more words is prose, not an alternative


def abstains(answer: str) -> bool:
    """Whether somebody says that they don't know, or says nothing."""
    plain = answer.replace("’", "'").replace("`", "'")
    return not _has_words(plain) or bool(ABSTAINS.search(plain))


def _has_words(text: str) -> bool:
    return any(map(str.isalnum, text))


def normalised(text: str) -> list[str]:
    """Words without case, marks, accents and articles; numbers as digits."""
    folded = unicodedata.normalize("NFKD", text.casefold())
    bare = "".join(c for c in folded if not unicodedata.combining(c) and c not in "'’`")
    words = TOKEN.findall(re.sub(r"(?<=\d),(?=\d{3}\b)", "", bare))
    last = len(words) - 1
    kept = [w for i, w in enumerate(words) if w not in ARTICLES or i == last]  # "answer A": a letter, no article
    numbers: list[str] = []
    for before, word in zip(["", *kept], kept, strict=False):
        if before in TENS and 1 <= NUMBERS.get(word, 0) <= 9:
            numbers[-1] = str(NUMBERS[before] + NUMBERS[word])
        else:
            numbers.append(str(NUMBERS[word]) if word in NUMBERS else word)
    return numbers


def says(words: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether some words stand among others one after another, somewhere without a negation directly before."""
    n = len(wanted)
    return any(words[i : i + n] == wanted and not _negated(words[:i]) for i in range(len(words) - n + 1))


def _negated(before: Sequence[str]) -> bool:
    nearest = before[:-1] if before and before[-1] in BETWEEN else before
    return bool(nearest) and nearest[-1] in NEGATIONS


def guesses(answer: str) -> int:
    """How many different alternatives an answer names: short parts between commas, semicolons, strokes, lines, or, and."""
    parts = {tuple(normalised(part)) for part in SEPARATORS.split(answer)}
    return sum(1 for part in parts if 0 < len(part) <= GUESS_WORDS)


def outcome(answer: str, accepted: Sequence[str], asked: str = "") -> Outcome:
    """What an answer is worth.

    Args:
        accepted: forms of the right answer.
        asked: texts of the prompt, one a line; where the answer repeats one word for word, that is no part of the answer.
    """
    own = answer
    for text in filter(None, asked.split("\n")):
        own = re.sub(re.escape(text), " ", own, flags=re.IGNORECASE)
    if abstains(own):
        return "abstains" if _has_words(own) or not _has_words(answer) else "wrong"
    answer = own
    words, named = normalised(answer), guesses(answer)
    right = [a for a in accepted if says(words, normalised(a))]
    return "right" if any(named <= GUESSES + guesses(a) - 1 or named <= GUESSES for a in right) else "wrong"
