"""Rules on rows: what leaks from one split to another, what is there twice, contradicts itself or says nothing."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from truthward.banks import BANKS
from truthward.check.facts import Facts
from truthward.check.findings import Found, as_finding, error, rule, warning
from truthward.errors import UserError
from truthward.recipe import banked
from truthward.records import Pair, Preference, Prompt, Question
from truthward.tables import BANK_OF

NEAR = 0.7  # share of common words from which two questions count as the same
BROKEN = re.compile("\ufffd|Ã[\x80-\xbf©¨¤¶¼]|â€")  # bytes that were read in a wrong encoding


class Twin(NamedTuple):
    """Two texts that are nearly the same, and whether they are the same but for case and marks."""

    a: int
    b: int
    exact: bool


def words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[\w']+", text.casefold()))


def twins(a: list[str], b: list[str]) -> list[Twin]:
    """Pairs of texts whose words have a Jaccard index over ``NEAR``.

    Two such sets share a word among their rarest, so that only those are compared (prefix filter: Chaudhuri et al. 2006;
    Bayardo et al. 2007): the time grows with the number of rows, not with the product.
    """
    sets_a, sets_b = [words(text) for text in a], [words(text) for text in b]
    common = Counter(word for s in (*sets_a, *sets_b) for word in s)

    def rare(s: frozenset[str]) -> list[str]:
        ordered = sorted(s, key=lambda word: (common[word], word))
        return ordered[: len(s) - math.ceil(NEAR * len(s)) + 1]

    having: dict[str, list[int]] = {}
    for k, s in enumerate(sets_b):
        for word in rare(s):
            having.setdefault(word, []).append(k)
    found = []
    for i, s in enumerate(sets_a):
        for k in sorted({k for word in rare(s) for k in having.get(word, ())}):
            t = sets_b[k]
            if len(s & t) > NEAR * len(s | t):
                found.append(Twin(i, k, plain(a[i]) == plain(b[k])))
    return found


def plain(text: str) -> str:
    return " ".join(re.findall(r"[\w']+", text.casefold()))


# ------------------------------------------------------------------------------------------------------------- leakage


def training_texts(facts: Facts) -> list[tuple[str, str]]:
    """What models are trained or sampled on: (key or path, text), each once."""
    texts = []
    for key, path in facts.demonstrated():
        texts += [(key, m.content) for d in facts.demonstrations(path) for m in d.messages if m.role == "user"]
    for stage in ("reward", "dpo"):
        for source, rows in facts.preferences(stage).items():
            texts += [(source, row.prompt) for row in rows if source != "constitution"]
    for _, table in facts.uses("distill"):
        for path in table.prompts:
            texts += [(path, text) for text in _asked(facts, path)]
    for _, table in facts.uses("sft", "dpo"):
        texts += [(table.replay, p.prompt) for p in facts.rows(table.replay, Prompt)] if table.replay else []
    for _, table in facts.uses("constitution"):
        texts += [(path, p.prompt) for path in table.prompts for p in facts.rows(path, Prompt)]
    for _, table in facts.uses("ppo"):
        texts += [(table.prompts, p.prompt) for p in facts.rows(table.prompts, Prompt)]
    return list(dict.fromkeys(texts))


def _asked(facts: Facts, path: str) -> list[str]:
    if Path(path).is_dir():
        return [q.question for q in facts.rows(path, Question)]
    return [p.prompt for p in facts.rows(path, Prompt)]


def leaked(facts: Facts) -> list[tuple[str, str, str]]:
    """Training texts that are near-duplicates of what the evals ask: (training text, test text, source)."""
    train = training_texts(facts)
    tests = [text for rows in facts.banks.values() for row in rows for text in row.asked]
    tests += [row.prompt for row in facts.rows(facts.recipe.evals.first_questions, Prompt)]
    return [(train[t.a][1], tests[t.b], train[t.a][0]) for t in twins([text for _, text in train], tests)]


@rule("leak-exact", "leak-near")
def leaks(facts: Facts) -> Found:
    """Test questions in the training data."""
    by_source: dict[str, list[tuple[str, str]]] = {}
    for train, test, source in leaked(facts):
        by_source.setdefault(source, []).append((train, test))
    for source, pairs in by_source.items():
        exact = [pair for pair in pairs if plain(pair[0]) == plain(pair[1])]
        train, test = (exact or pairs)[0]
        text = f"{len(pairs)} rows of the training data are near-duplicates of test questions, e.g. {train!r} and {test!r}"
        name = "leak-exact" if exact else "leak-near"
        fix = f"take them out of {source}, or out of what the evals ask"
        yield error(name, source, text, why="scores would measure memory", fix=fix)


@rule("leak-validation", "leak-splits", "leak-judge")
def held_out(facts: Facts) -> Found:
    """Rows that are to be held out from training or from tuning, and are not."""
    train = [text for _, text in training_texts(facts)]
    for _, table in facts.uses("reward"):
        held = [q.question for q in facts.rows(table.validation, Question)]
        if found := twins(held, train):
            text = (
                f"{len({t.a for t in found})} of {len(held)} questions are in the training data, e.g. {held[found[0].a]!r}"
            )
            why = "the preference model's accuracy would be that of rows it was trained on"
            yield error("leak-validation", "reward.validation", text, why=why, fix="hold out whole topics")
        labelled = [p.prompt for p in facts.rows(table.principle_bank, Pair)]
        ranked = [p.prompt for rows in facts.preferences("reward").values() for p in rows]
        found = twins(list(dict.fromkeys(labelled)), list(dict.fromkeys(ranked)))
        if len(found) > 0.05 * len(set(labelled)):
            text = f"{len(found)} of its prompts are in reward.preferences"
            why = "the accuracy by principle would be that of rows it was trained on"
            yield warning("leak-judge", "reward.principle_bank", text, why=why, fix="take them out of one of the two")
    for path, other, found, asked in _splits(facts):
        text = f"{len(found)} of its questions are in {other} too, e.g. {asked[found[0].a]!r}"
        yield warning("leak-splits", path, text, why="what was tuned on one is tested on it", fix="take them out of one")


def _splits(facts: Facts) -> Iterable[tuple[str, str, list[Twin], list[str]]]:
    """Banks with the other half of theirs, where a question is in both, or many nearly are."""
    recipe = facts.recipe
    others = {recipe.evals.truth: (recipe.reward.validation, "truth")}
    for name in banked(recipe.evals.sets):
        bank = BANK_OF.get(name, name)
        if bank != "truth":
            half = "dev" if recipe.evals.split == "test" else "test"
            root = Path(recipe.evals.banks) / bank
            others[str(root / recipe.evals.split)] = (str(root / half), bank)
    for path, (other, bank) in others.items():
        if Path(other).exists():
            asked, also = ([r.asked[0] for r in facts.rows(p, BANKS[bank])] for p in (path, other))  # type: ignore[attr-defined]
            found = twins(asked, also)
            if any(t.exact for t in found) or len(found) > 0.05 * min(len(asked), len(also)):
                yield path, other, found, asked


# -------------------------------------------------------------------------------------------------------------- sanity


@rule("data-unreadable")
def unreadable(facts: Facts) -> Found:
    """Rows and paths that cannot be read: all of them, not only the first."""
    facts.read_all()
    _ = facts.planned
    told: dict[str, UserError] = {}
    for fault in facts.faults:
        told.setdefault(fault.where, fault)
    for fault in told.values():
        yield as_finding("data-unreadable", fault)


@rule("rows-twice", "ids-twice", "answer-blank")
def demonstrations(facts: Facts) -> Found:
    """Demonstrations that are there twice, or hold no words."""
    ids: list[str] = []
    for key, path in facts.demonstrated():
        rows = facts.demonstrations(path)
        blank = [d.id for d in rows if not d.messages[-1].content.strip()]
        if blank:
            text = f"{len(blank)} answers are blank, e.g. that of {blank[0]}"
            why = "the model would learn to end before it has said a word"
            yield error("answer-blank", path, text, why=why, fix="write an answer, or take the row out")
        yield from _twice(path, [tuple((m.role, m.content) for m in d.messages) for d in rows])
        ids += [d.id for d in rows] if key == "sft.data" else []
    if repeated := [name for name, n in Counter(ids).items() if n > 1]:
        text = f"{len(repeated)} ids stand on more than one row, e.g. {repeated[0]}"
        fix = "give each row its own"
        yield warning("ids-twice", "sft.data", text, why="a message about a row could not be traced to it", fix=fix)


def _twice(where: str, rows: list[Any]) -> Found:
    extra = len(rows) - len(set(rows))
    if extra:
        text = f"{extra} of {len(rows)} rows stand there twice"
        why = "they count double, and a random split of them leaks"
        yield warning("rows-twice", where, text, why=why, fix="take the second ones out")


@rule("pair-equal", "pair-blank", "pair-contradicts", "pairs-twice", "labels-flat", "length-bias")
def preferences(facts: Facts) -> Found:
    """Pairs that say nothing, or two things at once."""
    sources = {source: rows for stage in ("reward", "dpo") for source, rows in facts.preferences(stage).items()}
    for source, rows in ((s, r) for s, r in sources.items() if r):
        trimmed = [(p.prompt, p.chosen.strip(), p.rejected.strip()) for p in rows]
        if same := [row for row in trimmed if row[1] == row[2]]:
            text = f"{len(same)} pairs have the same answer twice, e.g. to {same[0][0]!r}"
            yield error("pair-equal", source, text, why="their gradient is noise that looks like data", fix="take them out")
        if blank := [row for row in trimmed if not (row[1] and row[2])]:
            text = f"{len(blank)} pairs have an answer without words, e.g. to {blank[0][0]!r}"
            yield error(
                "pair-blank", source, text, why="silence would be what is preferred, or avoided", fix="take them out"
            )
        known = set(trimmed)
        if against := [row for row in trimmed if row[1] != row[2] and (row[0], row[2], row[1]) in known]:
            text = f"{len(against)} pairs stand there in both orders, e.g. to {against[0][0]!r}"
            fix = "keep one order, or one row with probability near 0.5"
            yield error("pair-contradicts", source, text, why="each undoes the other", fix=fix)
        if len(known) < len(trimmed) and not Path(source).is_dir() and source != "constitution":
            text = f"{len(trimmed) - len(known)} of {len(trimmed)} pairs stand there twice"
            yield warning("pairs-twice", source, text, why="they count double", fix="take the second ones out")
        yield from _labels(source, rows)


def _labels(source: str, rows: list[Preference]) -> Found:
    sure = sum(p.probability > 0.55 for p in rows)
    if not sure:
        text = f"none of {len(rows)} pairs is labelled over 0.55"
        yield warning("labels-flat", source, text, why="soft labels at 0.5 teach nothing", fix="use a judge that can tell")
    sizes = [(len(p.chosen), len(p.rejected)) for p in rows if len(p.chosen) != len(p.rejected)]
    longer = sum(a > b for a, b in sizes) / max(1, len(sizes))
    if len(sizes) >= 50 and not 0.3 <= longer <= 0.7:
        which = "longer" if longer > 0.5 else "shorter"
        text = f"the {which} answer is the chosen one in {max(longer, 1 - longer):.0%} of {len(sizes)} pairs"
        why = "length is the easiest thing to learn, and what PPO would then climb (Singhal et al. 2023, arXiv 2310.03716)"
        yield warning("length-bias", source, text, why=why, fix="balance the lengths, or add pairs of equal length")


@rule("text-broken")
def encodings(facts: Facts) -> Found:
    """Text that was read in a wrong encoding somewhere on its way."""
    texts: dict[str, list[str]] = {}
    for _, path in facts.demonstrated():
        texts.setdefault(path, []).extend(m.content for d in facts.demonstrations(path) for m in d.messages)
    for stage in ("reward", "dpo"):
        for source, rows in facts.preferences(stage).items():
            texts.setdefault(source, []).extend(t for p in rows for t in (p.prompt, p.chosen, p.rejected))
    for source, text in training_texts(facts):
        texts.setdefault(source, []).append(text)
    for source, some in texts.items():
        if broken := [t for t in dict.fromkeys(some) if BROKEN.search(t)]:
            text = f"{len(broken)} texts were read in a wrong encoding, e.g. {broken[0][:60]!r}"
            yield warning("text-broken", source, text, why="the model would write so", fix="write the file anew as UTF-8")
