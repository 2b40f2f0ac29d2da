"""Answers as branches of their prompt: several prompts, each with several answers, in one row and without padding.

A token attends to the prompt of its own tree and to its own branch, at the positions it would have alone, so every
number equals that of scoring each (prompt, answer) by itself, while a prompt is computed once for all its answers and
only positions that predict an answer's token pass through the LM head. Everything but attention sees the row; attention
goes tree by tree, as a batch padded to the longest tree.

Shapes: T tokens, G trees of at most L tokens, N answer tokens and A answers of all trees in order.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from truthward.errors import UserError

TREES = "trees"  # our name for attention tree by tree among those of transformers


@dataclass(frozen=True)
class Item:
    """A prompt and the answers to it, as token ids."""

    prompt: list[int]
    answers: list[list[int]]

    @property
    def length(self) -> int:
        return len(self.prompt) + sum(map(len, self.answers))


class Trunk(NamedTuple):
    """What all prompts of some items begin with, computed once: keys and values ``[1, heads, P, width]`` of each layer."""

    keys: list[Tensor]
    values: list[Tensor]

    @property
    def length(self) -> int:
        return self.keys[0].shape[2]


@torch.no_grad()
def grow_trunk(model: Any, ids: list[int]) -> Trunk:
    """Keys and values of the tokens that many prompts share."""
    row = torch.tensor([ids], device=next(model.parameters()).device)
    layers = model.get_decoder()(input_ids=row, use_cache=True).past_key_values.layers
    return Trunk([layer.keys for layer in layers], [layer.values for layer in layers])


@dataclass(frozen=True)
class Forest:
    """Trees in a row.

    Attributes:
        ids, positions: ``[1, T]``.
        place: ``[T]``: where each token is in a batch of trees, row after row.
        sees: ``[G, 1, L, L]`` bool, True where the query may attend to the key.
        source: ``[N]``: where in the row the hidden state is that predicts each answer token.
        target: ``[N]``: the answer tokens.
        branch: ``[N]``: which answer (counted over all items) each token belongs to.
        tip: ``[A]``: where in the row each answer's last token is.
    """

    ids: Tensor
    positions: Tensor
    place: Tensor
    sees: Tensor
    source: Tensor
    target: Tensor
    branch: Tensor
    tip: Tensor

    def to(self, device: torch.device | str) -> Forest:
        """The same on another device."""
        return Forest(*(getattr(self, field.name).to(device) for field in fields(self)))

    def inputs(self, dtype: torch.dtype, trunk: Trunk | None = None) -> dict[str, Any]:
        """What a model that went through :func:`attend_by_tree` is called with.

        Args:
            trunk: what stands before every tree, and every token sees.
        """
        mask = torch.zeros(self.sees.shape, dtype=dtype, device=self.sees.device)
        mask.masked_fill_(~self.sees, torch.finfo(dtype).min)
        positions = self.positions + (trunk.length if trunk else 0)
        return {
            "input_ids": self.ids,
            "position_ids": positions,
            "attention_mask": mask,
            "place": self.place,
            "trunk": trunk,
        }


def plant(items: list[Item]) -> Forest:
    """Lay out items, one tree each."""
    total, longest = sum(item.length for item in items), max(item.length for item in items)
    ids, positions = torch.zeros(2, 1, total, dtype=torch.long)
    limb = torch.full((len(items), longest), -1)  # 0 is the tree's prompt; -1 is padding
    place, source, target, branch, tip = (list[int]() for _ in range(5))
    end = limbs = 0
    for tree, item in enumerate(items):
        begin, root = end, len(item.prompt)
        place += range(tree * longest, tree * longest + item.length)
        for k, piece in enumerate([item.prompt, *item.answers]):
            start, end = end, end + len(piece)
            ids[0, start:end] = torch.tensor(piece)
            positions[0, start:end] = torch.arange(len(piece)) + (root if k else 0)
            limb[tree, start - begin : end - begin] = k
            if k:  # an answer's first token is predicted by the prompt's last
                source += [begin + root - 1 if i == 0 else start + i - 1 for i in range(len(piece))]
                target += piece
                branch += [limbs] * len(piece)
                tip.append(end - 1)
                limbs += 1
    on_path = (limb.unsqueeze(2) == limb.unsqueeze(1)) | (limb.unsqueeze(1) == 0)
    causal = torch.ones(longest, longest, dtype=torch.bool).tril()
    where = (torch.tensor(values, dtype=torch.long) for values in (source, target, branch, tip))
    return Forest(ids, positions, torch.tensor(place), (on_path & causal).unsqueeze(1), *where)


def attend_by_tree(model: Any) -> Any:
    """Let a model of transformers take the inputs of a forest; it takes all others as before.

    Raises:
        UserError: its attention can't be exchanged.
    """
    model.set_attn_implementation(TREES)
    if model.config._attn_implementation != TREES:
        raise UserError(f"{type(model).__name__} does not attend through transformers' interface", where="model.base")
    return model


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    place: Any = None,
    trunk: Trunk | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of ``[1, heads, T, width]`` as ``[1, T, heads, width]``; without ``place`` of any batch."""
    if place is None or attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    attend = _by_products if query.device.type == "cpu" else sdpa_attention_forward
    trees, _, longest, _ = attention_mask.shape

    def behind(x: Tensor, part: list[Tensor]) -> Tensor:
        return torch.cat([part[module.layer_idx].expand(trees, -1, -1, -1), x], 2)

    mask = attention_mask
    if trunk:
        mask = torch.cat([mask.new_zeros(trees, 1, longest, trunk.length), mask], 3)
    if trees == 1 and trunk is None:
        return attend(module, query, key, value, mask, **options)

    def batch(x: Tensor) -> Tensor:
        _, heads, _, width = x.shape
        padded = x.new_zeros(trees * longest, heads, width).index_copy(0, place, x[0].transpose(0, 1))
        return padded.view(trees, longest, heads, width).transpose(1, 2)

    keys, values = batch(key), batch(value)
    if trunk:
        keys, values = behind(keys, trunk.keys), behind(values, trunk.values)
    out, _ = attend(module, batch(query), keys, values, mask, **options)
    return out.flatten(0, 1).index_select(0, place).unsqueeze(0), None


def _by_products(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **options: Any
) -> tuple[Tensor, None]:
    """``[G, heads, L, width] -> [G, L, heads, width]`` with the softmax in fp32.

    For short trees on a CPU this is faster than torch's fused kernel, whose backward pass in bf16 takes five times as long.
    """
    repeats = query.shape[1] // key.shape[1]
    key, value = (repeat_kv(x, repeats).flatten(0, 1) for x in (key, value))
    scores = torch.bmm((query * scaling).flatten(0, 1), key.transpose(1, 2)).view(*query.shape[:3], -1)
    weights = scores.float().add_(attention_mask).softmax(-1).to(query.dtype)
    return torch.bmm(weights.flatten(0, 1), value).view(query.shape).transpose(1, 2), None


AttentionInterface.register(TREES, _attend)
AttentionMaskInterface.register(TREES, sdpa_mask)
