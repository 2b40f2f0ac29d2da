"""What a model says in its own words: one pass of sampling for all sets that hear answers, greedy and sampled together.

Both answers to a prompt share its computation, and all prompts share one full batch. A sampled answer's random numbers
depend on the recipe's seed and the row's id alone, so that models are compared on the same draws.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from truthward import chat
from truthward.banks import Instruction, ShortFact
from truthward.console import progress
from truthward.generate import generate

Way = Literal["greedy", "sampled"]
LIMITS = {"short": 24, "instructions": 64, "open": 48}  # longest answer in tokens, by set
GREEDY_ONLY = ("open",)  # what a judge reads costs a pass of the judge each
# A short question is put in one of these ways, chosen by its id: no model can do well by answering one of them alone.
PHRASINGS = (
    '{q} Answer in one to three words, or say "I don\'t know".',
    "{q}",
    "{q} Reply with the answer only.",
    "Quick question: {q} A short answer, please.",
    "{q} Keep it very short.",
    "Do you know this? {q} If not, say so.",
    "I have a quiz question for you. {q}",
    '{q} If you are not sure, say "I don\'t know".',
)
BRIEF = (0, 2, 3, 4)  # those that ask for a short answer: it has room to end by itself


@dataclass(frozen=True)
class Said:
    """An answer to a row of a set.

    Attributes:
        prompt: what the user said, as tokens; ``asked``: as text.
        ids: the answer's tokens, its end token included when it ended by itself.
        finished: it did.
        foreign: another language than English was asked for.
    """

    set: str
    id: str
    topic: str
    way: Way
    asked: str
    text: str
    prompt: list[int]
    ids: list[int]
    finished: bool
    foreign: bool = False


def answer_all(
    model: Any, tokenizer: Any, rows: Mapping[str, list[Any]], *, temperature: float, seed: int, batch_size: int = 32
) -> list[Said]:
    """The greedy answer to every row of some sets, and a sampled one beside it where ``temperature`` is above 0."""
    ways: list[tuple[str, Any, Way]] = [
        (name, row, way)
        for name, some in rows.items()
        for row in some
        for way in (("greedy", "sampled") if temperature and name not in GREEDY_ONLY else ("greedy",))
    ]
    asked = [put(name, row) for name, row, _ in ways]
    prompts = [chat.prompt_ids(tokenizer, chat.user(text)) for text in asked]
    with progress() as bar:
        task = bar.add_task("answers", total=len(ways))
        completions = generate(
            model,
            prompts,
            [draw_of(seed, f"{name}/{row.id}") for name, row, _ in ways],
            eos=tokenizer.eos_token_id,
            pad_id=tokenizer.pad_token_id,
            max_new_tokens=[LIMITS[name] for name, _, _ in ways],
            temperature=[temperature if way == "sampled" else 0.0 for _, _, way in ways],
            batch_size=batch_size,
            tick=lambda n: bar.advance(task, n),
        )
    return [
        Said(name, row.id, row.topic, way, text, chat.decode(tokenizer, c.ids), prompt, c.ids, c.finished, is_foreign(row))
        for (name, row, way), text, prompt, c in zip(ways, asked, prompts, completions, strict=True)
    ]


def is_foreign(row: Any) -> bool:
    """Whether a row asks for another language than English."""
    return isinstance(row, Instruction) and any(rule["rule"] == "language" for rule in row.rules)


def put(name: str, row: Any) -> str:
    """How a row's question is put to the model."""
    if name == "short":
        return phrased(row)
    return row.prompt if isinstance(row, Instruction) else row.question


def phrased(row: ShortFact) -> str:
    """A short question in the phrasing that belongs to its id, the same for every model and every run."""
    return PHRASINGS[phrasing_of(row.id)].replace("{q}", row.question)


def phrasing_of(name: str) -> int:
    return draw_of(0, name) % len(PHRASINGS)


def draw_of(seed: int, name: str) -> int:
    """A seed that depends on the recipe's and a name, and on nothing else of a run."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7])


def has_room(said: Said) -> bool:
    """Whether an answer can well end before the limit: short ones where brevity is asked for, and instructions."""
    return said.set == "instructions" or (said.set == "short" and phrasing_of(said.id) in BRIEF)
