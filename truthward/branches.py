"""Answers as branches of their prompt: several prompts, each with several answers, in one row and without padding.

A token attends to the prompt of its own tree and to its own branch, at the positions it would have alone, so every
number equals that of scoring each (prompt, answer) by itself, while a prompt is computed once for all its answers and
only positions that predict an answer's token pass through the LM head.

Shapes: R rows, T positions, N answer tokens and A answers of all rows in order.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Item:
    """A prompt and the answers to it, as token ids."""

    prompt: list[int]
    answers: list[list[int]]

    @property
    def length(self) -> int:
        return len(self.prompt) + sum(map(len, self.answers))


@dataclass(frozen=True)
class Forest:
    """Trees planted in rows.

    Attributes:
        ids, positions: ``[R, T]``.
        sees: ``[R, 1, T, T]`` bool, True where the query may attend to the key.
        row, source: ``[N]``: where the hidden state that predicts each answer token is.
        target: ``[N]``: the answer tokens.
        branch: ``[N]``: which answer (counted over all items) each token belongs to.
        tip_row, tip: ``[A]``: where each answer's last token is.
    """

    ids: Tensor
    positions: Tensor
    sees: Tensor
    row: Tensor
    source: Tensor
    target: Tensor
    branch: Tensor
    tip_row: Tensor
    tip: Tensor

    def to(self, device: torch.device | str) -> Forest:
        """The same on another device."""
        return Forest(*(getattr(self, field.name).to(device) for field in fields(self)))

    def additive(self, dtype: torch.dtype) -> Tensor:
        """The attention mask as a model takes it: 0 where seen, the lowest number elsewhere."""
        mask = torch.zeros(self.sees.shape, dtype=dtype, device=self.sees.device)
        return mask.masked_fill_(~self.sees, torch.finfo(dtype).min)


def plant(rows: list[list[Item]]) -> Forest:
    """Lay out items; each inner list becomes one row."""
    width = max(sum(item.length for item in row) for row in rows)
    ids, positions = torch.zeros(2, len(rows), width, dtype=torch.long)
    tree, limb = torch.full((2, len(rows), width), -1)  # limb 0 is the tree's prompt; -1 is padding
    row_N, source_N, target_N, branch_N, tip_row, tip = [], [], [], [], [], []
    trees = limbs = 0
    for r, row in enumerate(rows):
        end = 0
        for item in row:
            root = len(item.prompt)
            first = end + root  # an answer's first token is predicted by the prompt's last
            for k, piece in enumerate([item.prompt, *item.answers]):
                start, end = end, end + len(piece)
                ids[r, start:end] = torch.tensor(piece)
                positions[r, start:end] = torch.arange(len(piece)) + (root if k else 0)
                tree[r, start:end], limb[r, start:end] = trees, k
                if k:
                    row_N += [r] * len(piece)
                    source_N += [first - 1 if i == 0 else start + i - 1 for i in range(len(piece))]
                    target_N += piece
                    branch_N += [limbs] * len(piece)
                    tip_row.append(r)
                    tip.append(end - 1)
                    limbs += 1
            trees += 1
    same_tree = tree.unsqueeze(2) == tree.unsqueeze(1)
    on_path = (limb.unsqueeze(2) == limb.unsqueeze(1)) | (limb.unsqueeze(1) == 0)
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    where = (torch.tensor(values, dtype=torch.long) for values in (row_N, source_N, target_N, branch_N, tip_row, tip))
    return Forest(ids, positions, (same_tree & on_path & causal).unsqueeze(1), *where)
