"""What every set of the evals is made of: questions with given answers, and how their probabilities become scores.

Nothing is generated: each answer that a row offers is scored as log p(answer | what was asked), the tokens of a question
computed once for all its answers (see :mod:`truthward.branches`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from truthward import chat
from truthward.branches import Item
from truthward.generate import generate
from truthward.resampling import Statistic, mean_of

Values = dict[str, float | None]  # column -> an item's number; None where it does not apply, never 0
Sums = list[list[float]]  # log p(answer | asked) in nats, for each thing asked of a row and each of its answers


@dataclass(frozen=True)
class Asked:
    """Something that is put to the model, with the answers whose probability is wanted.

    Attributes:
        messages: a conversation that the assistant is to go on with; a plain text without a template where it is a string.
        answers: whole answers; continuations where ``messages`` is a string.
    """

    messages: list[dict[str, str]] | str
    answers: list[str]

    def item(self, tokenizer: Any) -> Item:
        """The same as tokens. A plain prompt and its continuation are tokenised together and then parted."""
        if not isinstance(self.messages, str):
            prompt = chat.prompt_ids(tokenizer, self.messages)
            return Item(prompt, [chat.answer_ids(tokenizer, a) for a in self.answers])
        prompt = chat.text_ids(tokenizer, self.messages)
        if not prompt:  # the first token has nothing before it, so it is given
            (only,) = (chat.text_ids(tokenizer, a) for a in self.answers)
            return Item(only[:1], [only[1:]])
        whole = [chat.text_ids(tokenizer, self.messages + a) for a in self.answers]
        return Item(prompt, [w[len(prompt) :] for w in whole])


@dataclass(frozen=True)
class Metric:
    """A number about a model.

    Attributes:
        label: what it is, in a few words.
        columns: of the items' values, what ``statistic`` needs.
        better: ``higher``, ``lower``, or empty where neither is.
        part: it is another metric of the set over some of its items: shown beside that one, and not gated by itself.
    """

    label: str
    columns: tuple[str, ...]
    better: Literal["higher", "lower", ""] = "higher"
    statistic: Statistic = mean_of
    part: bool = False


@dataclass(frozen=True)
class Exam:
    """A set of the evals.

    Attributes:
        ask: what is asked for a row of the bank.
        grade: from the row and the answers' log-probabilities to its values.
        metrics: by name, without the set's.
        verdict: the column whose change from one side of a half to the other is shown as a flip; empty for none.
        style: whether judges that see only the answers' style are scored beside the model.
        drawn_with: from an item's id to what a bootstrap draws as one: several answers to a row are no several rows.
        fixed_topics: intervals are about the bank's own topics, not about others (docs/decisions/0009).
    """

    ask: Callable[[Any], list[Asked]]
    grade: Callable[[Any, Sums], Values]
    metrics: dict[str, Metric]
    verdict: str = ""
    style: bool = True
    drawn_with: Callable[[str], str] = str
    fixed_topics: bool = False


@dataclass(frozen=True)
class Scored:
    """A row of a bank after a model has been asked.

    Attributes:
        values: what the set's grading made of it.
        picked: the answer that the model found the likeliest to the first thing asked.
    """

    set: str
    id: str
    topic: str
    values: Values
    picked: str


def metric(label: str, column: str, better: Literal["higher", "lower", ""] = "higher") -> Metric:
    """The mean of one column."""
    return Metric(label, (column,), better)


def likeliest(sums: Sequence[float]) -> int:
    """Index of the likeliest answer; -1 on a tie for the first place, which is nobody's win."""
    best = max(range(len(sums)), key=sums.__getitem__)
    return best if list(sums).count(sums[best]) == 1 else -1


def wins(right: float, wrong: Sequence[float]) -> float:
    """1 where the right answer beats every other one, 1/k where k answers share the first place with it, else 0."""
    if right < max(wrong):
        return 0.0
    return 1.0 / (1 + list(wrong).count(right))


def answer_freely(
    model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int, temperature: float = 0.0
) -> list[str]:
    """The most likely (greedy) answer to each prompt of a user; at a temperature, a sample that its place seeds."""
    completions = generate(
        model,
        [chat.prompt_ids(tokenizer, chat.user(prompt)) for prompt in prompts],
        list(range(len(prompts))),
        eos=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
    )
    return [chat.decode(tokenizer, c.ids) for c in completions]
