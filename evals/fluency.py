"""Whether what a model says is still language: rules on each answer of the sets that listen, greedy and sampled.

An answer is broken when it is empty, an echo, repetitive, in a loop, or holds a word that is none. None of the rules knows
what a good answer is; each names damage that preference training is known to do (repetition: Holtzman et al. 2020, arXiv
1904.09751) and is plain enough to be read off the text. ``base_nats`` says how likely the base finds the answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from evals.answers import Said, has_room
from evals.asking import Exam, Metric, Scored, Values, metric
from truthward.branches import Item
from truthward.guard.detectors import repeated_share
from truthward.resampling import ratio_of
from truthward.score import answer_sums

WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
QUOTED = re.compile(r'"[^"\n]*"|“[^”\n]*”')
ECHO, ECHO_SHARE, ECHO_NEW = 4, 0.75, 0.1  # words in a row of the question; the share of such words, and of new ones
REPEATED = 0.2  # share of 4-grams that stood in the answer before
LOOP = re.compile(r"\b(\w+(?: \w+){0,11}?)(?: \1){2,}\b")  # the same one to twelve words three times in a row
PLAIN = re.compile(r"(?<![\w'’-])[a-z]{3,}(?![\w'’-])")
LEADING = ("Ġ", "▁")  # how tokenizers write the blank before a word
OPENER = re.compile(
    r"^\W*(?:(?:it|that|this)(?:'s|’s| is) )?not (?:an?|the|quite|exactly|really|true)\b"
    r"|\b(?:common|popular|widespread) (?:misconception|myth|belief|mistake)",
    re.IGNORECASE,
)
OPENING = 60  # letters in which an opener is looked for
ENDINGS = (
    *("s", "es", "ed", "d", "ing", "er", "ers", "r", "rs", "est", "st", "ly", "ness", "ful", "less", "able", "y"),
    *("ion", "ions", "ist", "ists", "ive", "ation", "ment", "ments", "ity", "ism", "ish", "ous", "al", "like"),
)
BEGINNINGS = ("un", "re", "non", "in", "im", "mis", "dis", "over", "under", "out", "pre", "sub")
PART = 4  # letters from which two words make a compound, as in lacemaker

FLUENCY = Exam(
    ask=lambda row: [],
    grade=lambda row, sums: {},
    metrics={
        "broken": metric("broken answers (any of the next five)", "broken", "lower"),
        "empty": metric("empty answers", "empty", "lower"),
        "echo": metric("answers that restate the question", "echo", "lower"),
        "repeated": metric(f"answers of whose 4-grams more than {REPEATED:g} repeat", "repeated", "lower"),
        "loop": metric("answers with a phrase three times in a row", "loop", "lower"),
        "invented": metric("answers with a word that is none", "invented", "lower"),
        "opener": metric('answers that open with "not a ..." or a "common misconception"', "opener", "lower"),
        "words": metric("words an answer", "words", ""),
        "length": Metric("length beside the base's answers (ratio of mean words)", ("words", "base_words"), "", ratio_of),
        "unended": metric("answers cut off at the limit though they had room", "unended", "lower"),
        "base_nats": metric("nats a token of the answer under the base", "base_nats", "lower"),
    },
    verdict="sound",
    style=False,
    drawn_with=lambda name: name.rpartition("/")[0],
    fixed_topics=True,
)


def words_of(text: str) -> list[str]:
    return [word.casefold() for word in WORD.findall(text)]


# ------------------------------------------------------------------------------------------------------------- rules


def is_echo(answer: str, asked: str) -> bool:
    """Three quarters of the answer are runs of four or more of the question's words, and fewer than one word in ten is new.

    "Which ocean is the largest?" - "The Pacific Ocean is the largest." says a new word and is none; the question said again
    is one, once or twice. Quoted parts of the question do not count: they may be asked for.
    """
    said, question = words_of(answer), words_of(QUOTED.sub(" ", asked))
    runs = {tuple(question[i : i + ECHO]) for i in range(len(question) - ECHO + 1)}
    copied = {i + k for i in range(len(said) - ECHO + 1) if tuple(said[i : i + ECHO]) in runs for k in range(ECHO)}
    new = sum(word not in question for word in said)
    return bool(copied) and len(copied) >= ECHO_SHARE * len(said) and new < ECHO_NEW * len(said)


def repeats(answer: str) -> bool:
    """More than a fifth of its 4-grams of words stood in it before."""
    return repeated_share(words_of(answer)) > REPEATED


def loops(answer: str) -> bool:
    """A word or phrase three times in a row; numbers alone do not count, as they may be asked for."""
    return any(re.search(r"[^\W\d]", match[1]) for match in LOOP.finditer(" ".join(words_of(answer))))


def opens_by_denial(answer: str) -> bool:
    return bool(OPENER.search(answer[:OPENING]))


class Vocabulary:
    """Words that are known to be some: those of given texts, and those that the tokenizer holds whole.

    A tokenizer learns its words from the text that the base was trained on, so what it holds whole after a blank was there.

    Args:
        tokenizer: of the model.
        texts: of the banks and data.
    """

    def __init__(self, tokenizer: Any, texts: Iterable[str]) -> None:
        whole = {token[1:].casefold() for token in tokenizer.get_vocab() if token.startswith(LEADING)}
        self.known = {word for word in whole if word.isalpha()}
        self.known |= {word for text in texts for word in re.findall(r"[^\W\d_]+", text.casefold())}

    def invented(self, said: Said) -> list[str]:
        """Words of an answer that are neither known nor in its prompt, nor a simple inflection or compound of such.

        Only words of small letters are looked at: names may be new. A word that the limit cut off is left out.
        """
        here = set(re.findall(r"[^\W\d_]+", said.asked.casefold()))
        text = said.text if said.finished else said.text[: len(said.text) - len(re.search(r"\w*$", said.text)[0])]  # type: ignore[index]
        return [word for word in PLAIN.findall(text) if not self._is_word(word, here)]

    def _is_word(self, word: str, here: set[str]) -> bool:
        begun = [word.removeprefix(b) for b in BEGINNINGS if word.startswith(b) and len(word) - len(b) >= 3]
        forms = [form for whole in (word, *begun) for form in (whole, *stems(whole))]
        parts = [(word[:i], word[i:]) for i in range(PART, len(word) - PART + 1)]
        compounds = any(a in self.known and (b in self.known or b.removesuffix("s") in self.known) for a, b in parts)
        return compounds or any(form in self.known or form in here for form in forms)


def stems(word: str) -> list[str]:
    """What a word may be an inflection of: an ending less, its e, y, f or single consonant back (baked, tried, scarves)."""
    found = []
    for ending in ENDINGS:
        stem = word.removesuffix(ending)
        if stem == word or len(stem) < 3:
            continue
        found += [stem, stem + "e"]
        found += [stem[:-1] + "y"] if stem.endswith("i") else []
        found += [stem[:-1]] if stem[-1] == stem[-2] else []
        found += [stem[:-1] + "f", stem[:-1] + "fe"] if stem.endswith("v") else []
    return found


# ----------------------------------------------------------------------------------------------------------- scoring


def nats_a_token(model: Any, said: Sequence[Said], tokens_a_batch: int) -> list[float]:
    """Mean of -log p(token) of each answer under a model, its end token included where it ended by itself."""
    sums = answer_sums(model, [Item(s.prompt, [s.ids]) for s in said], tokens_a_batch=tokens_a_batch)
    return [-total / len(s.ids) for (total,), s in zip(sums, said, strict=True)]


def score_fluency(
    said: Sequence[Said], known: Vocabulary, nats: Sequence[float | None], base: Mapping[str, Values] | None
) -> list[Scored]:
    """An item an answer, ``set/id/way``, of topic ``set/topic``.

    Args:
        nats: of each answer under the base.
        base: the base's values by id, or None where this is the base.
    """
    scored = []
    for s, own in zip(said, nats, strict=True):
        name = f"{s.set}/{s.id}/{s.way}"
        words = float(len(words_of(s.text)))
        damage = {
            "empty": not words,
            "echo": is_echo(s.text, s.asked),
            "repeated": repeats(s.text),
            "loop": loops(s.text),
            "invented": not s.foreign and bool(known.invented(s)),
        }
        values: Values = {kind: float(there) for kind, there in damage.items()}
        values |= {"broken": float(any(damage.values())), "sound": float(not any(damage.values()))}
        values |= {"opener": float(opens_by_denial(s.text)), "words": words, "base_nats": own}
        values["base_words"] = words if base is None else base.get(name, {}).get("words")
        values["unended"] = float(not s.finished) if has_room(s) else None
        scored.append(Scored("fluency", name, f"{s.set}/{s.topic}", values, s.text))
    return scored
