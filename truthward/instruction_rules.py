"""Whether an answer does what was asked of its form: rules that need no judge, only the text.

The idea is that of Zhou et al. 2023 (IFEval, arXiv 2311.07911), strict and loose reading included; rules and
rows are this project's own. Every rule is a pure function of the answer and the rule's parameters. A row may
carry several; it is followed when all of them hold. Whether the answer is any good is not looked at, save
that a text without a word, or with one word over and over, follows nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
BULLET = re.compile(r"\s*[-*•]\s+\S")
NUMBERED = re.compile(r"\s*(\d+)[.)]\s+\S")
NUMBER = re.compile(r"[-+]?(?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d+)?")
ABBREVIATED = re.compile(r"\b(?:mr|mrs|ms|dr|st|vs|e\.g|i\.e)\.|\b[ap]\.m\.(?=\s+[a-z])", re.IGNORECASE)
SENTENCE_END = re.compile(r"[.!?…]+[\"”'’)*]*(?:\s+|$)|\n+")
QUOTES = "\"“”„'‘’«»"
DOUBLE_QUOTES = '"“”„«»'

ITEM_WORDS = 8  # a comma-separated part with more words is prose, not an item of a list
PART_WORDS = 4  # the same where nothing but the list was asked for
REPEATED_WORDS = 8  # so many words or more, and more than half of them the same, are no answer

# Words that most sentences of a language have some of, and greetings. A word may stand in more than one set.
_KNOWN = {
    "en": """
        the a an and or but of to in on at for with from by is are was were be been am it its this that
        these those i you he she we they my your his her our their me him us them not do does did have
        has had will would can could should what which who when where how there here as if so very hello
        hi yes no please thank thanks good
    """,
    "fr": """
        le la les l' un une des du de d' et ou mais est sont suis es sommes être était il elle on nous
        vous ils elles je j' tu me te se m' t' s' ne n' pas plus ce c' cette ces mon ma mes ton ta tes
        son sa ses notre votre leur dans sur avec pour par sans à a au aux en y que qu' qui où quand
        comment très bien ai avons avez ont fait bon bonne bonjour bonsoir salut merci oui non
    """,
    "es": """
        el la los las un una unos unas de del y e o pero es son soy eres está están estás estoy estamos
        hay él ella nosotros ellos yo tú usted me te se nos le les lo mi mis tu tus su sus no sí si al a
        en con por para sin sobre que qué quien cuando cuándo donde dónde como cómo muy más este esta
        ese esa hola gracias buenos buenas bueno buena tengo tiene somos llamo llama gusta quiero vive
    """,
    "de": """
        der die das den dem des ein eine einen einem einer und oder aber ist sind war bin bist sein es
        er sie wir ihr ich du mich dich sich mir dir uns mein meine meinen dein deine ihre unser nicht
        kein keine zu zum zur im in am an auf aus bei mit nach von vor für über um wie was wer wo wann
        warum sehr auch noch nur so hat habe haben wird kann gut gute guten guter hallo danke ja nein
        bitte
    """,
}
FUNCTION_WORDS = {code: frozenset(text.split()) for code, text in _KNOWN.items()}
LANGUAGES = ("fr", "es", "de")


def _words(text: str) -> list[str]:
    return WORD.findall(text)


def _lines(answer: str) -> list[str]:
    return [line for line in answer.splitlines() if line.strip()]


# ------------------------------------------------------------------------------------------ lists and lengths


def _parts(line: str) -> list[str]:
    """What a line lists after any colon: split at commas and a last "and". Long parts are prose, no list."""
    *first, last = re.split(r"[,;]", line.rpartition(":")[2])
    parts = [part for part in (*first, *re.split(r"\b(?:and|&)\b", last)) if _words(part)]
    return parts if all(len(_words(part)) <= ITEM_WORDS for part in parts) else []


def _listed(answer: str) -> int:
    """How many items are listed: marked lines if there are any, else lines, else parts of the one line."""
    lines = _lines(answer)
    for mark in (NUMBERED, BULLET):
        if any(map(mark.match, lines)):
            return sum(bool(mark.match(line)) for line in lines)
    items = [line for line in lines if not line.rstrip().endswith(":")]
    return len(items) if len(items) > 1 else len(_parts("".join(items)))


def _items(answer: str, count: int) -> bool:
    return _listed(answer) == count


def _min_items(answer: str, count: int) -> bool:
    return _listed(answer) >= count


def _max_words(answer: str, count: int) -> bool:
    return len(_words(answer)) <= count


def _min_words(answer: str, count: int) -> bool:
    return len(_words(answer)) >= count


def _sentences(answer: str, count: int) -> bool:
    """A line's end also ends a sentence; full stops of common abbreviations and within numbers do not."""
    whole = ABBREVIATED.sub("abbreviated", answer)
    return sum(any(map(str.isalpha, part)) for part in SENTENCE_END.split(whole)) == count


def _comma_list(answer: str, count: int) -> bool:
    """The whole answer is a list on one line, of short parts."""
    parts = [_words(part) for part in answer.split(",")]
    filled = [part for part in parts if part]
    one_line = len(_lines(answer)) == 1
    return one_line and len(filled) >= count and all(len(part) <= PART_WORDS for part in filled)


# ------------------------------------------------------------------------------------------ letters and words


def _upper_case(answer: str) -> bool:
    return answer.isupper()


def _lower_case(answer: str) -> bool:
    return answer.islower()


def _use_word(answer: str, word: str) -> bool:
    """As a whole word, in either case: "lemons" is not "lemon"."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", answer, re.IGNORECASE) is not None


def _avoid_word(answer: str, word: str) -> bool:
    return not _use_word(answer, word)


def _language(answer: str, code: str) -> bool:
    """More of the language's function words than English ones, and no language with more still.

    Phrases only: a noun by itself has no function word, so rows that ask for one word name that word instead.
    """
    found = re.findall(r"[^\W\d_]+'?", answer.lower().replace("’", "'"))
    hits = {name: sum(word in known for word in found) for name, known in FUNCTION_WORDS.items()}
    return hits[code] > hits["en"] and hits[code] == max(hits.values())


# ----------------------------------------------------------------------------------------------------- format


def _json(answer: str) -> bool:
    try:
        return isinstance(json.loads(answer), dict)
    except ValueError:
        return False


def _numbered(answer: str) -> bool:
    found = [int(match[1]) for match in map(NUMBERED.match, answer.splitlines()) if match]
    return found[:2] == [1, 2]


def _bullets(answer: str) -> bool:
    return sum(bool(BULLET.match(line)) for line in answer.splitlines()) >= 2


def _quoted(answer: str) -> bool:
    text = answer.strip()
    return len(text) > 2 and text[0] in DOUBLE_QUOTES and text[-1] in DOUBLE_QUOTES


# ---------------------------------------------------------------------------------- beginning, end and choice


def _question(answer: str) -> bool:
    return answer.rstrip().rstrip(QUOTES).endswith("?")


def _plain(text: str) -> str:
    return text.strip().strip(QUOTES).rstrip(".!?" + QUOTES).lower().replace("’", "'")


def _starts_with(answer: str, text: str) -> bool:
    """Whole words, in either case; quotation marks before them do not count."""
    return re.match(rf"{re.escape(_plain(text))}(?!\w)", _plain(answer)) is not None


def _ends_with(answer: str, text: str) -> bool:
    """Whole words, in either case; full stops and quotation marks after them do not count."""
    return re.search(rf"(?<!\w){re.escape(_plain(text))}$", _plain(answer)) is not None


def _one_of(answer: str, options: Sequence[str]) -> bool:
    """The answer is one of the options and nothing else; marks and case do not count."""
    said = [word.lower() for word in _words(answer)]
    return any(said == [word.lower() for word in _words(option)] for option in options)


def _number(answer: str) -> bool:
    return NUMBER.fullmatch(answer.strip().removesuffix(".")) is not None


# ----------------------------------------------------------------------------------------------- all together

RULES: dict[str, Callable[..., bool]] = {
    "items": _items,
    "min_items": _min_items,
    "max_words": _max_words,
    "min_words": _min_words,
    "sentences": _sentences,
    "upper_case": _upper_case,
    "lower_case": _lower_case,
    "use_word": _use_word,
    "avoid_word": _avoid_word,
    "question": _question,
    "language": _language,
    "json": _json,
    "numbered": _numbered,
    "bullets": _bullets,
    "comma_list": _comma_list,
    "quoted": _quoted,
    "starts_with": _starts_with,
    "ends_with": _ends_with,
    "one_of": _one_of,
    "number": _number,
}

# The one parameter that a rule takes; rules not named here take none.
PARAMETER = {
    **dict.fromkeys(("items", "min_items", "max_words", "min_words", "sentences", "comma_list"), "count"),
    **dict.fromkeys(("use_word", "avoid_word"), "word"),
    **dict.fromkeys(("starts_with", "ends_with"), "text"),
    "language": "code",
    "one_of": "options",
}


def _filled(value: object) -> bool:
    return isinstance(value, str) and bool(_words(value))


def _some(value: object) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(map(_filled, value))


# What each parameter may be, in words and as a test.
VALUES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "count": ("a whole number above 0", lambda value: type(value) is int and value > 0),
    "word": ("a word", _filled),
    "text": ("some words", _filled),
    "code": (f"one of {', '.join(LANGUAGES)}", lambda value: value in LANGUAGES),
    "options": ("a list of answers", _some),
}


def parameters_of(rule: Mapping[str, Any]) -> dict[str, Any]:
    """What a row's rule passes to its function. If anything is wrong with it, a ``ValueError`` says what."""
    name = rule.get("rule")
    if not isinstance(name, str) or name not in RULES:
        raise ValueError(f"unknown rule {name!r}; the rules are {', '.join(RULES)}")
    wanted = [PARAMETER[name]] if name in PARAMETER else []
    given = {key: value for key, value in rule.items() if key != "rule"}
    if list(given) != wanted:
        raise ValueError(f"rule {name!r} takes {wanted or 'nothing'}, not {list(given) or 'nothing'}")
    for key, value in given.items():
        what, allowed = VALUES[key]
        if not allowed(value):
            raise ValueError(f"rule {name!r}: {key!r} has to be {what}, not {value!r}")
    return given


def degenerate(answer: str) -> bool:
    """No letter or digit at all, or at least eight words of which more than half are the same one."""
    words = [word.lower() for word in _words(answer)]
    most = max(map(words.count, words), default=0)
    return not words or (len(words) >= REPEATED_WORDS and 2 * most > len(words))


def _holds(answer: str, rule: Mapping[str, Any]) -> bool:
    parameters = parameters_of(rule)
    return RULES[rule["rule"]](answer, **parameters)


def follows(answer: str, rules: Sequence[Mapping[str, Any]]) -> bool:
    """Strictly: every rule holds of the answer as it is."""
    return not degenerate(answer) and all(_holds(answer, rule) for rule in rules)


def _readings(answer: str) -> list[str]:
    """The answer as it is, and without its first line, last line, asterisks, quotes around it, or several."""
    lines = answer.strip().split("\n")
    trimmed = ["\n".join(some).strip() for some in (lines, lines[1:], lines[:-1], lines[1:-1])]
    unmarked = [text.replace("*", "") for text in trimmed]
    unquoted = [text.strip().strip(QUOTES) for text in trimmed + unmarked]
    return [answer, *trimmed, *unmarked, *unquoted]


def follows_loosely(answer: str, rules: Sequence[Mapping[str, Any]]) -> bool:
    """Every rule holds of one and the same reading of the answer; markup and polite lines are forgiven."""
    return not degenerate(answer) and any(follows(reading, rules) for reading in _readings(answer))
