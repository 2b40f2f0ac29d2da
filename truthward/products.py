"""Products with a fixed weight, ``x [N, in] -> x W' + b [N, out]``, in the ways that sampling uses.

On a CPU, ``F.linear`` in fp32 goes through a library that leaves an AMD core two thirds idle; oneDNN is 2 to 3 times
faster on the weight as it is, more once the weight is reordered into its blocks, and as fast on others. Elsewhere all of
this is ``F.linear``. Nothing here has gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from truthward.errors import UserError

Product = Callable[[Tensor], Tensor]

PRECISIONS = ("exact", "bfloat16", "int8")
TYPICAL_ROWS = 64  # oneDNN chooses its blocks for a batch size; blocks for 64 rows are good for 1 to 1,000

# without the VNNI instructions two products of full 8 bits are added in 16 bits and may not fit
STEPS = 127 if torch.cpu._is_vnni_supported() else 63


def shared(weight: Tensor, bias: Tensor | None = None) -> Product:
    """A product that reads the weight where it lies."""
    if not _onednn(weight):
        return lambda x: F.linear(x, weight, bias)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def packed(weight: Tensor, bias: Tensor | None = None) -> Product:
    """A product with a reordered copy of the weight."""
    if _onednn(weight):
        weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), TYPICAL_ROWS)
    return shared(weight, bias)


def bfloat16(weight: Tensor, bias: Tensor | None = None) -> Product:
    """A product in bf16."""
    return packed(weight.bfloat16(), None if bias is None else bias.bfloat16())


def int8(weight: Tensor, bias: Tensor | None = None) -> Product:
    """A product of 8-bit integers: each output's weights on a scale of their own, each row of x on one of its own.

    A scale a row (not one for the batch) keeps a row's result apart from what else is in the batch.

    Raises:
        UserError: the weight is not on a CPU that oneDNN knows.
    """
    weight = weight.float().contiguous()  # the reordering reads past strides
    if not _onednn(weight):
        raise UserError("8-bit sampling needs a CPU", where="precision", fix='use "bfloat16" or "exact"')
    scale = weight.abs().amax(1).clamp(min=1e-12) / STEPS
    blocks = torch.ops.onednn.qlinear_prepack((weight / scale.unsqueeze(1)).round_().to(torch.int8), None)
    zero = torch.zeros(len(scale), dtype=torch.int32)

    def product(x: Tensor) -> Tensor:
        x = x.float()
        row = x.abs().amax(1, keepdim=True).clamp_(min=1e-12).div_(127)
        steps = (x / row).round_().add_(128).to(torch.uint8)  # signed inputs have no fast kernel; the zero point is 128
        out = torch.ops.onednn.qlinear_pointwise(
            steps, 1.0, 128, blocks, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
        ).mul_(row)
        return out if bias is None else out.add_(bias)

    return product


def side_by_side(products: Sequence[Product]) -> Product:
    """The outputs of several products of one input, joined."""
    return lambda x: torch.cat([product(x) for product in products], -1)


def _onednn(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    bf16 = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32 or bf16
