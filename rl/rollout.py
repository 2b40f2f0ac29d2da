"""Rollouts: sampling answers from the current policy.

Sampling runs on plain weights, base + alpha/rank * B A, kept beside the base and refreshed after every update: a LoRA
forward would add two small products to each of seven layers for every token. Layers without an adapter are shared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from truthward.generate import Completion, generate
from truthward.tensors import pad


@dataclass(frozen=True)
class Batch:
    """Sampled answers. ``prompt | answer``: left-padded prompts, right-padded answers.

    Attributes:
        ids, mask: ``[B, T]``.
        answer_mask: tokens of the answer, the end token included ``[B, C]``.
        sampler_logprobs: as sampled, 0 at padding ``[B, C]``.
        finished: the answer ended by itself ``[B]``.
    """

    ids: Tensor
    mask: Tensor
    answer_mask: Tensor
    sampler_logprobs: Tensor
    finished: Tensor

    @property
    def answer(self) -> int:
        return self.answer_mask.shape[1]


class Sampler:
    """A chat model that holds the policy merged into plain weights."""

    def __init__(self, peft_model: Any, tokenizer: Any, *, max_new_tokens: int, temperature: float) -> None:
        base = peft_model.get_base_model()
        self.peft_model, self.tokenizer = peft_model, tokenizer
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        with torch.device("meta"):
            self.model = type(base)(base.config)
        shared = {n.replace(".base_layer", ""): t for n, t in base.state_dict().items() if ".lora_" not in n}
        self.adapted = {n: m for n, m in base.named_modules() if hasattr(m, "base_layer") and "policy" in m.lora_A}
        own = {f"{n}.weight": torch.empty_like(m.base_layer.weight) for n, m in self.adapted.items()}
        self.model.load_state_dict({**shared, **own}, assign=True)
        self.model.tie_weights()
        self.model.model.rotary_emb = base.model.rotary_emb  # its frequencies are not in the state
        self.model.eval().requires_grad_(False)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the policy's current weights."""
        for name, module in self.adapted.items():
            weight = module.base_layer.weight
            target = self.model.get_submodule(name).weight
            target.copy_((weight.float() + module.get_delta_weight("policy").float()).to(weight.dtype))

    def sample(self, prompts: list[list[int]], seeds: list[int], tick: Callable[[int], None] = lambda n: None) -> Batch:
        """One answer for each prompt."""
        completions = generate(
            self.model,
            prompts,
            seeds,
            eos=self.tokenizer.eos_token_id,
            pad_id=self.tokenizer.pad_token_id,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            tick=tick,
        )
        return collate(prompts, completions, self.tokenizer.pad_token_id)


def collate(prompts: list[list[int]], completions: list[Completion], pad_id: int) -> Batch:
    """Stack prompts and answers. Masks go by length, never by token id, so a pad that equals the end token is harmless."""
    prompt_ids, prompt_mask = pad(prompts, pad_id, side="left")
    answer_ids, answer_mask = pad([c.ids for c in completions], pad_id)
    logprobs = torch.zeros(answer_ids.shape)
    for i, completion in enumerate(completions):
        logprobs[i, : len(completion.ids)] = torch.tensor(completion.logprobs)
    return Batch(
        torch.cat([prompt_ids, answer_ids], 1),
        torch.cat([prompt_mask, answer_mask], 1),
        answer_mask,
        logprobs,
        torch.tensor([c.finished for c in completions]),
    )


def draw_seed(*parts: int | str) -> int:
    """A seed that depends on all parts, e.g. (recipe seed, iteration, prompt id)."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:7], "big")
