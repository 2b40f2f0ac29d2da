"""Replay: a model's own answers to ordinary prompts, which training keeps likely so that the voice is not lost.

Preference training on short factual sentences moves everything else that a model says, most of all what nobody measures.
Rehearsal of what was learned before is the oldest remedy (Robins 1995); with samples of the language model itself it is Sun
et al. 2020 (LAMOL, arXiv 1909.03329). SFT learns on the answers as on demonstrations; DPO is held to the whole distribution
over words at each of their tokens, by a KL penalty, as the reference of Ziegler et al. 2019 (arXiv 1909.08593) is there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from truthward import chat, models, ranks, zero
from truthward.branches import Item, plant
from truthward.console import progress
from truthward.fingerprint import digest
from truthward.generate import generate
from truthward.head import Anchor
from truthward.ledger import Run
from truthward.records import Prompt, Row, draw, read_rows, write_rows
from truthward.tables import Recipe, Voice

TOKENS = 2048  # in one forward pass of the parent


class Reply(Row):
    """The parent's answer to a prompt, as text and as the tokens it drew; no end token where the limit came first."""

    prompt_id: str
    prompt: str
    answer: str
    answer_ids: list[int]
    seed: int
    model: str


class Replay(NamedTuple):
    """Replies as prompts with one answer, the parent's states at their tokens ``[M, H]`` in that order, and its head."""

    items: list[Item]
    states: list[Tensor]
    weight_VH: Tensor
    bias_V: Tensor | None

    def anchor(self, numbers: list[int]) -> Anchor:
        """What the parent says at the tokens of some of the replies, one after the other."""
        return Anchor(torch.cat([self.states[n] for n in numbers]), self.weight_VH, self.bias_V)


def replies(recipe: Recipe, table: Voice, this: Run, dtype: torch.dtype) -> list[Reply]:
    """The parent's answers for a stage, sampled once and kept in its run; called by every rank.

    Args:
        table: the stage's own, with ``replay`` set.
        this: the stage's run.
    """
    path = this.path / "replay.jsonl"

    def sample() -> None:
        if not path.exists():
            write_rows(path, _sampled(recipe, table, this.parent("model"), dtype))

    ranks.lead(sample)
    return read_rows(path, Reply)


def _sampled(recipe: Recipe, table: Voice, parent: Run, dtype: torch.dtype) -> list[Reply]:
    model, tokenizer = models.load(parent, dtype), models.load_tokenizer(parent)
    prompts = draw(read_rows(table.replay, Prompt), table.replay_prompts, recipe.seed)
    seeds = [int(digest([recipe.seed, prompt.prompt, "replay"])[:12], 16) for prompt in prompts]
    with progress() as bar:
        task = bar.add_task("replayed answers", total=len(prompts))
        spoken = generate(
            model,
            [chat.prompt_ids(tokenizer, chat.user(prompt.prompt)) for prompt in prompts],
            seeds,
            eos=tokenizer.eos_token_id,
            pad_id=tokenizer.pad_token_id,
            max_new_tokens=table.replay_tokens,
            temperature=table.replay_temperature,
            tick=lambda n: bar.advance(task, n),
        )
    return [
        Reply(
            prompt_id=prompt.id,
            prompt=prompt.prompt,
            answer=chat.decode(tokenizer, completion.ids),
            answer_ids=completion.ids,
            seed=seed,
            model=parent.manifest["fingerprint"],
        )
        for prompt, completion, seed in zip(prompts, spoken, seeds, strict=True)
    ]


@torch.no_grad()
def anchored(rows: list[Reply], model: Any, tokenizer: Any, *, head_is_trained: bool) -> Replay:
    """Replies with what the parent says at each of their tokens; called by every rank.

    Its states are kept, 576 numbers a token at 135M, rather than distributions over 49,152 words.

    Args:
        model: the parent, before anything of it is trained.
        head_is_trained: its head will change with the policy's, so that a copy is kept.
    """
    items = [Item(chat.prompt_ids(tokenizer, chat.user(row.prompt)), [row.answer_ids]) for row in rows]
    states: list[Tensor] = []
    with zero.used_whole(model):
        for some in _batches(items):
            forest = plant(some).to(next(model.parameters()).device)
            outputs = model.get_decoder()(**forest.inputs(model.dtype), use_cache=False)
            states += outputs.last_hidden_state[0, forest.source].split([len(item.answers[0]) for item in some])
    head = model.get_output_embeddings()
    weight, bias = zero.kept_whole(head.weight), zero.kept_whole(head.bias)
    assert weight is not None
    if head_is_trained:
        weight, bias = weight.clone(), None if bias is None else bias.clone()
    return Replay(items, states, weight, bias)


def _batches(items: list[Item]) -> list[list[Item]]:
    batches: list[list[Item]] = [[]]
    for item in items:
        if batches[-1] and sum(i.length for i in batches[-1]) + item.length > TOKENS:
            batches.append([])
        batches[-1].append(item)
    return batches


def share_out(count: int, rows: int, share: float) -> list[list[int]]:
    """Numbers of the replies that stand beside each row: ``share`` a row on average, each reply in turn.

    Over any stretch of rows the counts differ by at most one from ``share`` times its length.
    """
    taken: list[list[int]] = []
    share = share if count else 0.0
    for row in range(rows):
        first, last = int(row * share), int((row + 1) * share)
        taken.append([number % count for number in range(first, last)])
    return taken


def demonstrations(rows: list[Reply], tokenizer: Any) -> list[tuple[list[int], list[bool]]]:
    """Replies as :func:`truthward.chat.encode` gives demonstrations: tokens, and which of them are the answer's."""
    made = []
    for row in rows:
        prompt = chat.prompt_ids(tokenizer, chat.user(row.prompt))
        made.append((prompt + row.answer_ids, [False] * len(prompt) + [True] * len(row.answer_ids)))
    return made
