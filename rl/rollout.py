"""Rollouts: sampling answers from the current policy.

Sampling runs on plain weights, base + alpha/rank * B A, kept beside the base and refreshed after every update: a LoRA
forward would add two small products to each of seven layers for every token. Layers without an adapter are shared.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from truthward import ranks, zero
from truthward.branches import Forest, Item, plant
from truthward.decoder import Decoder, plain_copy, supports
from truthward.errors import UserError
from truthward.generate import Completion, generate
from truthward.tensors import pad

TREE_TOKENS = 512  # attention in a tree grows with its square; a prompt with more answers is computed again
ROWS = 64  # sampled together: a step over 64 rows takes 1.4 times as long as one over 32, and 2.6 times one over 8


@dataclass(frozen=True)
class Batch:
    """Sampled answers.

    Attributes:
        prompts, answers: token ids, B of each; an answer that ended holds its end token.
        mask: which answer tokens there are ``[B, C]``.
        sampler_logprobs: as sampled, 0 at padding ``[B, C]``.
        finished: the answer ended by itself ``[B]``.
    """

    prompts: list[list[int]]
    answers: list[list[int]]
    mask: Tensor
    sampler_logprobs: Tensor
    finished: Tensor

    @property
    def answer_tokens(self) -> int:
        return int(self.mask.sum())

    @property
    def tokens(self) -> int:
        """Of answers and prompts, a prompt counted once for neighbours that share it."""
        pairs = zip(self.prompts, [[], *self.prompts], strict=False)
        return self.answer_tokens + sum(len(prompt) for prompt, before in pairs if prompt != before)

    def forest(self, rows: list[int]) -> Forest:
        """Some answers laid out for a forward pass without padding; neighbours with the same prompt share it.

        The forest's tokens are in the order of ``mask[rows]``.
        """
        items: list[Item] = []
        for row in rows:
            answer, last = self.answers[row], items[-1] if items else Item([], [])
            if last.prompt == self.prompts[row] and last.length + len(answer) <= TREE_TOKENS:
                last.answers.append(answer)
            else:
                items.append(Item(self.prompts[row], [answer]))
        return plant(items)


class Engine(Protocol):
    """Who samples: from this process or from a server. Every rank calls each method, ``sample`` with prompts of its own."""

    def refresh(self) -> None:
        """Take over the policy's current weights."""

    def release(self) -> None:
        """Give up what sampling alone needs."""

    def sample(self, prompts: list[list[int]], seeds: list[int], tick: Callable[[int], None] = ...) -> Batch:
        """One answer for each prompt."""


class Sampler:
    """Samples from the policy's merged weights, as they were at the last :meth:`refresh`.

    Args:
        actor_critic: gives the policy's ``policy_shell()`` and ``policy_weights()``.
        tokenizer: of the chat model.
        max_new_tokens, temperature: as for :func:`truthward.generate.generate`.
        precision: "exact" computes what the trainer computes; "bfloat16" and "int8" are faster and sample from a
            distribution of their own, whose log-probabilities the batch holds.
    """

    def __init__(
        self, actor_critic: Any, tokenizer: Any, *, max_new_tokens: int, temperature: float, precision: str
    ) -> None:
        self.actor_critic, self.tokenizer, self.precision = actor_critic, tokenizer, precision
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.model: Any = None
        self._held = contextlib.ExitStack()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the policy's current weights.

        Raises:
            UserError: this machine or this architecture can't be sampled in the precision asked for.
        """
        self.release()  # the old copy goes before the new one comes
        shell, weights = self.actor_critic.policy_shell(), self.actor_critic.policy_weights()
        self._held.enter_context(zero.present(shell.parameters()))  # what the copy shares with the policy
        if supports(shell):
            self.model = Decoder.pack(shell, weights, self.precision)
        elif self.precision == "exact":
            self.model = plain_copy(shell, weights)
        else:
            name = type(shell).__name__
            raise UserError(f"{name} is sampled by its own forward", where="precision", fix='use "exact"')

    def release(self) -> None:
        """Give up the weights and their memory until the next refresh."""
        self.model = None
        self._held.close()

    def sample(self, prompts: list[list[int]], seeds: list[int], tick: Callable[[int], None] = lambda n: None) -> Batch:
        """One answer for each prompt."""
        if self.model is None:
            self.refresh()
        completions = generate(
            self.model,
            prompts,
            seeds,
            eos=self.tokenizer.eos_token_id,
            pad_id=self.tokenizer.pad_token_id,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            batch_size=ROWS,
            tick=tick,
        )
        return collate(prompts, completions)


def collate(prompts: list[list[int]], completions: list[Completion]) -> Batch:
    """Stack answers. Masks go by length, never by token id, so a pad that equals the end token is harmless."""
    _, mask = pad([c.ids for c in completions], 0)
    logprobs = torch.zeros(mask.shape)
    logprobs[mask] = torch.tensor([p for c in completions for p in c.logprobs])
    return Batch(prompts, [c.ids for c in completions], mask, logprobs, torch.tensor([c.finished for c in completions]))


def joined(parts: list[Batch]) -> Batch:
    """The answers of several batches, one after the other."""
    width = max(part.mask.shape[1] for part in parts)

    def stacked(tensors: list[Tensor]) -> Tensor:
        return torch.cat([functional.pad(t, (0, width - t.shape[1])) for t in tensors])

    return Batch(
        [prompt for part in parts for prompt in part.prompts],
        [answer for part in parts for answer in part.answers],
        stacked([part.mask for part in parts]),
        stacked([part.sampler_logprobs for part in parts]),
        torch.cat([part.finished for part in parts]),
    )


def my_share(count: int) -> slice:
    """Which of ``count`` rows, a multiple of the ranks, this rank takes: those that stand together."""
    each = count // ranks.count()
    return slice(ranks.rank() * each, (ranks.rank() + 1) * each)


def prompt_order(prompts: int, iteration: int, count: int, seed: int) -> list[int]:
    """Which prompts an iteration takes: a seeded shuffle of all, then the next shuffle; nothing is skipped."""
    rows: list[int] = []
    for position in range(iteration * count, (iteration + 1) * count):
        epoch, offset = divmod(position, prompts)
        generator = torch.Generator().manual_seed(draw_seed(seed, "prompts", epoch))
        rows.append(int(torch.randperm(prompts, generator=generator)[offset]))
    return rows


def draw_seed(*parts: int | str) -> int:
    """A seed that depends on all parts, e.g. (recipe seed, iteration, prompt id)."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:7], "big")
