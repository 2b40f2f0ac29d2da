"""Linear layers by oneDNN on a CPU: ``x [..., in] -> x W' + b [..., out]``, for training and for sampling.

``F.linear`` in fp32 goes through a library that leaves an AMD core more than half idle; oneDNN is 2 to 3 times faster on
the weight as it is, forward and in both gradients, and more once the weight is reordered into its blocks. The arithmetic
is fp32 all the same. Elsewhere, and in other types, all of this is ``F.linear``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional as F

from truthward.errors import UserError

Product = Callable[[Tensor], Tensor]  # without gradients, as sampling uses them

PRECISIONS = ("exact", "bfloat16", "int8")
TYPICAL_ROWS = 64  # oneDNN chooses its blocks for a batch size; blocks for 64 rows are good for 1 to 1,000

# without the VNNI instructions two products of full 8 bits are added in 16 bits and may not fit
STEPS = 127 if torch.cpu._is_vnni_supported() else 63


# ----------------------------------------------------------------------------------------------------------- training


class Linear(nn.Linear):
    """``nn.Linear`` whose three products, forward and both gradients, are oneDNN's where the weight is fp32 on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype != torch.float32 or not _onednn(self.weight) or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        return _Linear.apply(x, self.weight, self.bias)


class LoraLinear(lora.Linear):
    """peft's adapted linear layer, ``x W' + b + s (x A') B'``, as one operation in the weight's own type.

    peft takes nine operations forward, and in bf16 casts every input and output of an adapter to fp32 and back; that cost
    more than the products themselves. A and B stay in fp32, as do their gradients. What is not one plain adapter over a
    frozen weight on a CPU is left to peft.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = [] if self.disable_adapters or self.merged else [a for a in self.active_adapters if a in self.lora_A]
        if args or kwargs or len(active) != 1 or not self._plain(active[0]):
            return super().forward(x, *args, **kwargs)
        (name,), base = active, self.base_layer
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return _LoraLinear.apply(x, base.weight, base.bias, a, b, self.scaling[name])

    def _plain(self, name: str) -> bool:
        base, a, b = self.base_layer, self.lora_A[name], self.lora_B[name]
        return (
            type(base) is Linear
            and _onednn(base.weight)
            and not base.weight.requires_grad
            and not hasattr(a.weight, "ds_id")  # ZeRO-3 gathers a weight when its own layer is called
            and type(self.lora_dropout[name]) is nn.Identity
            and name not in self.lora_variant
            and b.bias is None
            and not torch.is_autocast_enabled("cpu")
        )


def quicken(model: nn.Module) -> nn.Module:
    """Let every plain or adapted linear layer of a model compute as the classes above do; weights stay where they are."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
        elif type(module) is lora.Linear:
            module.__class__ = LoraLinear
    return model


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        by_x = _product(g, weight.t()) if ctx.needs_input_grad[0] else None
        by_weight = _product(g.flatten(0, -2).t(), x.flatten(0, -2).t()) if ctx.needs_input_grad[1] else None
        return by_x, by_weight, g.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        a, b = a.to(x.dtype), b.to(x.dtype)
        inner = _product(x, a).mul_(scale)
        ctx.save_for_backward(x, weight, a, b, inner)
        ctx.scale = scale
        return _product(x, weight, bias).add_(_product(inner, b))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight, a, b, inner = ctx.saved_tensors
        by_inner = _product(g, b.t()).mul_(ctx.scale)
        by_x = _product(g, weight.t()).add_(_product(by_inner, a.t())) if ctx.needs_input_grad[0] else None
        x, g, inner, by_inner = (t.flatten(0, -2).t() for t in (x, g, inner, by_inner))
        return by_x, None, None, _product(by_inner, x).float(), _product(inner, g).t().float(), None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


# ----------------------------------------------------------------------------------------------------------- sampling


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` without gradients, on the weight where it lies."""
    return _product(x, weight, bias) if _onednn(weight) else F.linear(x, weight, bias)


def shared(weight: Tensor, bias: Tensor | None = None) -> Product:
    """:func:`product` with a fixed weight."""
    return lambda x: product(x, weight, bias)


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
