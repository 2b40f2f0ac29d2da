"""Policy, reference, value and reward as one module over one frozen base.

With ``tune = "lora"`` all four are LoRA adapters and heads, so one copy of the base is in memory; with ``tune = "full"``
the policy has weights of its own and the rest shares the base. The reference is the base with adapters off, or a frozen
copy of the adapter that the policy started from. DDP and DeepSpeed see one model.

Shapes: N answer tokens of a forest (:mod:`truthward.branches`), one after the other; K answers.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from truthward import models, ranks, zero
from truthward.branches import Forest
from truthward.head import head_logprobs, head_logprobs_plainly
from truthward.ledger import whole_directory
from truthward.products import quicken


class PolicyOutput(NamedTuple):
    """Log-probabilities of the answer tokens ``[N]``, and the entropies there if asked for ``[N]``; nats."""

    logprobs: Tensor
    entropy: Tensor


class ActorCritic(nn.Module):
    """Everything PPO evaluates.

    Args:
        base: the frozen chat model.
        reward: directory of a preference model (adapter and head) trained on this base; None where others score.
        start: directory of the adapter that policy and reference begin with; None: the base itself.
        critic: whether there is a value adapter and head.
        full: the policy gets a copy of every weight (in fp32) instead of an adapter.
        rank, alpha: of new adapters.
        temperature: of sampling; log-probabilities are scaled alike.
        recompute: whether the backward pass computes the layers again, rather than that all they made is kept.
    """

    def __init__(
        self,
        base: Any,
        reward: Path | None,
        start: Path | None,
        *,
        critic: bool,
        full: bool,
        rank: int,
        alpha: int,
        temperature: float,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.temperature, self.dtype, self.recompute = temperature, base.dtype, recompute
        self.policy: Any = _copy(base, start) if full else None
        self.model: Any = base.requires_grad_(False)
        self._adapters: dict[str, list[nn.Parameter]] = {}
        new = models.lora_config(rank, alpha)
        if not full:
            self._add("policy", start, new)
        if start:
            self._add("reference", start, new)
        if reward:
            self._add("reward", reward, new)
            self.reward_head = nn.Linear(base.config.hidden_size, 1, bias=False)
            self.reward_head.weight.data.copy_(models.load_head(reward)["weight"])
            self.reward_head.requires_grad_(False)
        if critic:  # it begins as the preference model (Huang et al. 2024, arXiv 2403.17031), and with values of 0
            self._add("value", reward, new)
            self.value_head = nn.Linear(base.config.hidden_size, 1)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
        quicken(self)
        self._settle()

    def forward(self, task: str, forest: Forest, *, temperature: float | None = None, entropy: bool = False) -> Any:
        """One of ``policy``, ``reference`` (a :class:`PolicyOutput`), ``value`` (``[N]``) or ``reward`` (``[K]``).

        Args:
            forest: prompts with their answers, on this module's device.
            temperature: of the log-probabilities, if not that of sampling.
            entropy: whether the entropies are wanted.
        """
        hidden = self._hidden(task, forest)
        if task == "reward":  # at the last token, where the preference model was trained to give it
            return _scalar(self.reward_head, hidden[forest.tip])
        before = hidden[forest.source]  # the state that predicts each answer token
        if task == "value":
            return _scalar(self.value_head, before)
        head, heat = self._of(task).get_output_embeddings(), self.temperature if temperature is None else temperature
        if (entropy and torch.is_grad_enabled()) or self._mixed(task):
            with self._precision(task):
                return PolicyOutput(*head_logprobs_plainly(head, before, forest.target, heat))
        return PolicyOutput(*head_logprobs(head, before, forest.target, heat, entropy=entropy))

    def trainable(self, part: str) -> dict[str, nn.Parameter]:
        """Name -> parameter of ``policy`` or ``value``, from a fixed list rather than from what requires a gradient now."""
        own = {"policy": ("policy.",), "value": ("value_head.",)}[part]
        return {n: p for n, p in self.named_parameters() if n.startswith(own) or f".{part}." in n}

    def policy_shell(self) -> Any:
        """The causal LM whose embeddings, norms and head the policy uses; its linear layers may be wrapped by adapters."""
        return self._of("policy")

    @torch.no_grad()
    def policy_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's trained matrices as plain weights in the base's type: (module name, weight), made one by one."""
        for name, module in self._of("policy").named_modules():
            if self.policy is not None and isinstance(module, nn.Linear | nn.Embedding):
                with zero.present(module.parameters()):
                    yield name, module.weight.detach().to(self.dtype)  # a copy may be frozen, the parameter must not
            elif "policy" in getattr(module, "lora_A", {}):
                with zero.present(module.parameters()):
                    weight = module.base_layer.weight
                    merged = (weight.float() + module.get_delta_weight("policy").float()).to(weight.dtype)
                yield name, merged

    def save_policy(self, folder: Path) -> None:
        """Write the policy: an adapter as peft does, or full weights. Called by every rank, as those below."""
        if self.policy is not None:
            models.save_to(folder, self.policy)
        else:
            self.save_adapter("policy", folder)

    def save_adapter(self, name: str, folder: Path, **head: Tensor) -> None:
        """Write one adapter as peft does, to be loaded under the name "default", and a head beside it if there is one."""
        named = [(n.replace(f".{name}.", "."), p) for n, p in self.model.named_parameters() if f".{name}." in n]
        state = {n: zero.whole(p) for n, p in named}

        def write() -> None:
            with whole_directory(folder) as scratch:
                self.model.peft_config[name].save_pretrained(str(scratch))
                models.leave_home_out(scratch)
                save_file(state, scratch / "adapter_model.safetensors")
                if head:
                    models.save_head(scratch, **head)

        ranks.lead(write)

    def save_critic(self, folder: Path) -> None:
        """Write the value adapter and its head."""
        self.save_adapter("value", folder, **{name: zero.whole(p) for name, p in self.value_head.named_parameters()})

    def _add(self, name: str, source: Path | None, new: LoraConfig) -> None:
        config = _config(source) if source else copy.copy(new)
        if self._adapters:
            self.model.add_adapter(name, config)
        else:
            self.model = get_peft_model(self.model, config, adapter_name=name)
        if source:
            _load(self.model, source, name)
        self._adapters[name] = [p for n, p in self.model.named_parameters() if f".{name}." in n]
        for p in self._adapters[name]:
            p.data = p.data.float()

    def _of(self, task: str) -> Any:
        """The causal LM that does a task."""
        if task == "policy" and self.policy is not None:
            return self.policy
        return self.model.get_base_model() if self._adapters else self.model

    def _hidden(self, task: str, forest: Forest) -> Tensor:
        with self._using(task), self._precision(task), models.recomputing(self._of(task), self.recompute):
            return self._of(task).get_decoder()(**forest.inputs(self.dtype), use_cache=False).last_hidden_state[0]

    def _precision(self, task: str) -> Any:
        return torch.autocast(self._of(task).device.type, self.dtype) if self._mixed(task) else contextlib.nullcontext()

    def _mixed(self, task: str) -> bool:
        """A policy with weights of its own keeps them in fp32 and computes in the base's type."""
        return task == "policy" and self.policy is not None and self.dtype != torch.float32

    @contextlib.contextmanager
    def _using(self, task: str) -> Iterator[None]:
        if not self._adapters or (task == "policy" and self.policy is not None):
            yield
            return
        if task in self._adapters:
            self.model.set_adapter(task)
            self._settle()
            yield
        else:
            with self.model.disable_adapter():
                yield
        self._settle()

    def _settle(self) -> None:
        """peft turns gradients off for every adapter but the active one; put them where they belong."""
        for name, parameters in self._adapters.items():
            for p in parameters:
                p.requires_grad_(name in ("policy", "value"))


def _scalar(head: nn.Linear, states: Tensor) -> Tensor:
    """A head's scores of states ``[..., H]``, in fp32; its weights are fp32 too, but where DeepSpeed trains in bf16."""
    return head(states.to(head.weight.dtype)).squeeze(-1).float()


def _copy(base: Any, start: Path | None) -> Any:
    """Every weight of the start, in fp32, to be trained."""
    model = copy.deepcopy(base).float()
    return (models.merge(model, start) if start else model).requires_grad_(True)


def _config(adapter: Path) -> LoraConfig:
    saved: Any = LoraConfig.from_pretrained(str(adapter))
    return models.lora_config(saved.r, saved.lora_alpha)


def _load(model: Any, adapter: Path, name: str) -> None:
    state = {n: t for n, t in load_file(adapter / "adapter_model.safetensors").items() if ".lora_" in n}
    result: Any = set_peft_model_state_dict(model, state, adapter_name=name)
    assert not result.unexpected_keys, result.unexpected_keys
