"""Policy, reference, value and reward as LoRA adapters and heads over one frozen base.

One module, so that one copy of the base is in memory and DDP or DeepSpeed see one model. The reference is the base with
adapters off, or a frozen copy of the adapter that the policy started from.

Shapes: B rows, T positions (prompt left-padded, answer right-padded), C answer positions, H hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from truthward import models
from truthward.tensors import positions, token_entropy, token_logprobs

TRAINED = ("policy", "value")


class PolicyOutput(NamedTuple):
    """Log-probabilities and entropies of the answer tokens ``[B, C]``, at the sampling temperature, nats."""

    logprobs: Tensor
    entropy: Tensor


class ActorCritic(nn.Module):
    """Everything PPO evaluates, over one base.

    Args:
        base: the frozen chat model.
        reward: directory of the preference model (adapter and head) trained on the same base.
        start: directory of the adapter that policy and reference begin with; None: the base itself.
        rank, alpha: of the policy's LoRA when there is no ``start``.
        temperature: of sampling; log-probabilities are scaled alike.
    """

    def __init__(self, base: Any, reward: Path, start: Path | None, *, rank: int, alpha: int, temperature: float) -> None:
        super().__init__()
        config = _config(start) if start else models.lora_config(rank, alpha)
        self.model: Any = get_peft_model(base, config, adapter_name="policy")
        self.temperature = temperature
        self.reference = "reference" if start else None
        if start:
            self.model.add_adapter("reference", _config(start))
            for name in ("policy", "reference"):
                _load(self.model, start, name)
        for name in ("reward", "value"):  # the critic begins as the preference model (Huang et al. 2024)
            self.model.add_adapter(name, _config(reward))
            _load(self.model, reward, name)
        hidden = base.config.hidden_size
        self.reward_head = nn.Linear(hidden, 1, bias=False)
        self.reward_head.weight.data.copy_(models.load_head(reward)["weight"])
        self.reward_head.requires_grad_(False)
        self.value_head = nn.Linear(hidden, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self._adapters = {
            name: [p for n, p in self.model.named_parameters() if f".{name}." in n]
            for name in ("policy", "value", "reward", "reference")
        }
        for parameters in self._adapters.values():
            for p in parameters:
                p.data = p.data.float()
        self._settle()

    def forward(self, task: str, ids: Tensor, mask: Tensor, answer: int) -> Any:
        """One of ``policy``, ``reference`` (a :class:`PolicyOutput`), ``value`` (``[B, C]``) or ``reward`` (``[B]``).

        Args:
            ids, mask: ``[B, T]``; the last ``answer`` columns are the answer's.
            answer: C.
        """
        adapter = self.reference if task == "reference" else task
        hidden = self._hidden(adapter, ids, mask)
        before = torch.arange(ids.shape[1] - answer - 1, ids.shape[1] - 1, device=ids.device)  # predicts each answer token
        if task == "value":
            return self.value_head(hidden[:, before].float()).squeeze(-1)
        if task == "reward":
            last = ids.shape[1] - 1 - mask.flip(1).long().argmax(1)
            return self.reward_head(hidden[torch.arange(len(ids)), last].float()).squeeze(-1)
        logits = self.model.get_base_model().get_output_embeddings()(hidden[:, before])
        with torch.no_grad():
            entropy = token_entropy(logits, self.temperature) if task == "policy" else torch.zeros(0)
        return PolicyOutput(token_logprobs(logits, ids[:, -answer:], self.temperature), entropy)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of what PPO trains, from a fixed list rather than from what requires a gradient now."""
        return {
            n: p for n, p in self.named_parameters() if n.startswith("value_head") or any(f".{t}." in n for t in TRAINED)
        }

    def save_adapter(self, name: str, folder: Path) -> None:
        """Write one adapter as peft does, to be loaded under the name "default"."""
        self.model.peft_config[name].save_pretrained(str(folder))
        state = {n.replace(f".{name}.", "."): p for n, p in self.model.state_dict().items() if f".{name}." in n}
        save_file({n: p.detach().contiguous().cpu() for n, p in state.items()}, folder / "adapter_model.safetensors")

    def _hidden(self, adapter: str | None, ids: Tensor, mask: Tensor) -> Tensor:
        with self._using(adapter):
            decoder = self.model.get_base_model().get_decoder()
            return decoder(
                input_ids=ids, attention_mask=mask.long(), position_ids=positions(mask), use_cache=False
            ).last_hidden_state

    @contextlib.contextmanager
    def _using(self, adapter: str | None) -> Iterator[None]:
        if adapter is None:
            with self.model.disable_adapter():
                yield
        else:
            self.model.set_adapter(adapter)
            self._settle()
            yield
        self._settle()

    def _settle(self) -> None:
        """peft turns gradients off for every adapter but the active one; put them where they belong."""
        for name, parameters in self._adapters.items():
            for p in parameters:
                p.requires_grad_(name in TRAINED)


def _config(adapter: Path) -> LoraConfig:
    saved: Any = LoraConfig.from_pretrained(str(adapter))
    return models.lora_config(saved.r, saved.lora_alpha)


def _load(model: Any, adapter: Path, name: str) -> None:
    state = {n: t for n, t in load_file(adapter / "adapter_model.safetensors").items() if ".lora_" in n}
    result: Any = set_peft_model_state_dict(model, state, adapter_name=name)
    assert not result.unexpected_keys, result.unexpected_keys
