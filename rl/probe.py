"""Held-out truthfulness while PPO runs: does what the reward pays for cost truth?

Every ``guard.probe_every`` iterations the policy is asked a few questions of ``reward.validation``, which nothing is trained
on and which is not the evals' bank, and compared question by question with the reference, which is the policy as it began.
"""

from __future__ import annotations

import random
from functools import cached_property
from statistics import fmean
from typing import Any

import torch

from truthward import chat
from truthward.branches import Item, plant
from truthward.guard.detectors import paired_change
from truthward.recipe import probed
from truthward.records import Question, read_rows
from truthward.tables import Recipe


class Probe:
    """Asks when it is due.

    Args:
        actor_critic: evaluates ``policy`` and ``reference``.
        device: its own.
    """

    def __init__(self, recipe: Recipe, actor_critic: Any, tokenizer: Any, device: Any) -> None:
        table = recipe.guard
        self.actor_critic, self.device = actor_critic, device
        self.every = table.probe_every if probed(recipe) else 0
        bank = read_rows(recipe.reward.validation, Question) if self.every else []
        drawn = random.Random(recipe.seed).sample(bank, min(table.probe_questions, len(bank)))
        self.true = [len(q.true) for q in drawn]
        prompts = [chat.prompt_ids(tokenizer, chat.user(q.question)) for q in drawn]
        answers = [[chat.answer_ids(tokenizer, a) for a in q.true + q.false] for q in drawn]
        self.items = [Item(*pair) for pair in zip(prompts, answers, strict=True)]

    def after(self, iteration: int) -> dict[str, float]:
        """Metrics after so many iterations, if it is time: mean MC2, its paired change since the start, and its error."""
        if not self.every or iteration % self.every or len(self.items) < 2:
            return {}
        now = self._ask("policy")
        change = paired_change(self._start, now)
        return {"probe/truth": fmean(now), "probe/change": change.mean, "probe/error": change.error}

    @cached_property
    def _start(self) -> list[float]:
        return self._ask("reference")

    @torch.no_grad()
    def _ask(self, task: str) -> list[float]:
        """MC2 of each question: the true answers' share of the probability of all (Lin et al. 2022, arXiv 2109.07958)."""
        shares = []
        for item, true in zip(self.items, self.true, strict=True):
            forest = plant([item]).to(self.device)
            logprobs = self.actor_critic(task, forest, temperature=1.0).logprobs
            sums = logprobs.new_zeros(len(item.answers)).index_add(0, forest.branch, logprobs)
            shares.append(sums.softmax(0)[:true].sum().item())
        return shares
