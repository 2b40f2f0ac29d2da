"""Where an iteration's time goes, and how near to the machine's own matrix products each part comes."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from rl.rollout import Batch
from truthward import hardware
from truthward.shards import elements


class Work:
    """Seconds of each part of an iteration, and the share of the measured matrix-product speed that it reached.

    The work of a part is 2 operations a weight and token forward and as many for the gradient of the input (once more for
    that of the weights, where these are trained); attention and what is not a matrix product count as nothing.

    Args:
        shell: the causal LM that does the work.
        dtype: its compute type.
        full: whether its weights are trained.
        critic: whether values are estimated.
        scored: whether the preference model scores the answers.
    """

    def __init__(self, shell: Any, dtype: torch.dtype, *, full: bool, critic: bool, scored: bool) -> None:
        head = shell.get_output_embeddings()
        modules = (m for n, m in shell.named_modules() if ".lora_" not in n and m is not head)
        self.body = sum(elements(m.weight) for m in modules if isinstance(m, nn.Linear))
        self.head = elements(head.weight)
        self.full, self.critic, self.scored = full, critic, scored
        self.speed = hardware.measure_dtypes()[str(dtype).removeprefix("torch.")] * 1e9
        self.begin()

    def begin(self) -> None:
        """Start an iteration."""
        self.metrics: dict[str, float] = {}
        self._clock = time.perf_counter()

    def lap(self, part: str, operations: float) -> None:
        """End a part of it."""
        seconds, self._clock = time.perf_counter() - self._clock, time.perf_counter()
        self.metrics |= {f"seconds/{part}": seconds, f"gemm_share/{part}": operations / max(seconds, 1e-9) / self.speed}

    def rollout(self, batch: Batch) -> float:
        """Operations of sampling."""
        return 2 * (self.body * batch.tokens + self.head * batch.answer_tokens)

    def score(self, batch: Batch) -> float:
        """Operations of policy and reference, of values and preference scores."""
        passes = 2 + self.critic + self.scored
        return 2 * (passes * self.body * batch.tokens + 2 * self.head * batch.answer_tokens)

    def update(self, batch: Batch, passes: float) -> float:
        """Operations of so many passes over the rollout."""
        policy = (6 if self.full else 4) * (self.body * batch.tokens + self.head * batch.answer_tokens)
        return passes * (policy + 4 * self.critic * self.body * batch.tokens)
