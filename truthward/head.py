"""The LM head over many positions, by chunks: what it says of given words, without ever holding all logits.

Shapes: N tokens, H hidden, V words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from truthward.products import product
from truthward.tensors import token_entropy, token_logprobs

HEAD_TOKENS = 256  # tokens whose logits are held at once: 50 MB in fp32 at 49,152 words


class Anchor(NamedTuple):
    """A frozen model's states ``[M, H]`` at some positions, and its head: what it says there of all words."""

    states_MH: Tensor
    weight_VH: Tensor
    bias_V: Tensor | None


def head_logprobs(
    head: Any, hidden_NH: Tensor, target_N: Tensor, temperature: float = 1.0, *, entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """log p of each target ``[N]`` (nats, fp32) at a temperature, from the states that predict it.

    Beside them, if asked for, the entropies of the distributions over words ``[N]``, without gradients.
    """

    def forward(hidden: Tensor) -> Any:
        return TokenLogprobs.apply(hidden, head.weight, head.bias, target_N, temperature, entropy)

    with _computing(head, forward):  # called as a module, so that ZeRO-3 brings its weights
        logprobs, _, entropies = head(hidden_NH)
    return logprobs, entropies


def head_logprobs_plainly(head: Any, hidden_NH: Tensor, target_N: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """As :func:`head_logprobs` by calling the head, so that the entropies have gradients and autocast does its part."""

    def chunk(h: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(h)
        return token_logprobs(logits, t, temperature), token_entropy(logits, temperature)

    pieces = zip(hidden_NH.split(HEAD_TOKENS), target_N.split(HEAD_TOKENS), strict=True)
    keep = not torch.is_grad_enabled()  # with gradients, a chunk's logits are made again rather than held
    parts = [chunk(h, t) if keep else checkpoint(chunk, h, t, use_reentrant=False) for h, t in pieces]
    logprobs, entropy = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropy)


@contextmanager
def scoring_head(
    model: Any, target_N: Tensor, keep_BT: Tensor | None = None, anchor: Anchor | None = None
) -> Iterator[None]:
    """Within, a model's LM head gives log p of targets instead of logits, without ever holding all of them.

    The model is still called as a whole, so that whatever wraps it (adapters, DDP, DeepSpeed) does its part; what it returns
    as ``logits`` is ``[2, N]``: log-probabilities (nats, fp32), and 1 where the target is the likeliest word, else 0.

    Args:
        target_N: the words, one for each position that reaches the head.
        keep_BT: bool, which of these positions have a target; None: all.
        anchor: of a frozen model at the last M positions, which have no target of their own: what stands there instead
            of a log-probability is ``KL(anchor || model)`` over all words.
    """
    head = model.get_output_embeddings()

    def forward(hidden: Tensor) -> Tensor:
        hidden_NH = hidden.flatten(0, -2) if keep_BT is None else hidden[keep_BT]
        first_NH = hidden_NH[: len(target_N)]
        scored = torch.stack(TokenLogprobs.apply(first_NH, head.weight, head.bias, target_N, 1.0, False)[:2])
        if anchor is None:
            return scored
        divergence = TokenDivergence.apply(hidden_NH[len(target_N) :], head.weight, head.bias, anchor)
        return torch.cat([scored, torch.stack([divergence, torch.zeros_like(divergence)])], 1)

    with _computing(head, forward):
        yield


@contextmanager
def _computing(head: Any, forward: Callable[[Tensor], Any]) -> Iterator[None]:
    """Within, a module's ``forward`` is another: on the instance, over the class's own, or over what DeepSpeed put there."""
    before = vars(head).get("forward")
    head.forward = forward
    try:
        yield
    finally:
        del head.forward
        if before is not None:
            head.forward = before


class TokenLogprobs(torch.autograd.Function):
    """``log p_n = z_n[t_n] - logsumexp(z_n)``, ``z = (h W^T + b) / T``, by chunks of ``HEAD_TOKENS`` tokens.

    A token's log-probability depends on its own hidden state alone, so the forward pass can leave its gradient by that
    state, ``d_n = (W[t_n] - softmax(z_n) W) / T``: ``[N, H]`` in place of logits ``[N, V]``. The backward pass is
    ``g_n d_n``. Only where the head itself is trained are the logits made again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        heat: float,
        full: bool,
    ) -> Any:
        """At temperature ``heat``: log p, whether the target is the likeliest word, if ``full`` entropies; ``[N]``."""
        logprobs, likeliest, entropies, slopes = [], [], [], []
        for h, t in zip(hidden_NH.split(HEAD_TOKENS), target_N.split(HEAD_TOKENS), strict=True):
            z = product(h, weight_VH, bias_V).float() / heat
            top, z_t = z.amax(1, keepdim=True), z.gather(1, t.unsqueeze(1))
            z = z.sub_(top)
            e = z.exp() if full else z.exp_()
            total = e.sum(1, keepdim=True)
            logprobs.append((z_t - top - total.log()).squeeze(1))
            likeliest.append((z_t >= top).squeeze(1).float())
            if full:
                entropies.append((total.log() - torch.linalg.vecdot(e, z).unsqueeze(1) / total).squeeze(1))
            if ctx.needs_input_grad[0]:
                mean = product(e.div_(total).to(weight_VH.dtype), weight_VH.t())
                slopes.append((weight_VH[t] - mean) / heat)
        ctx.heat = heat
        ctx.save_for_backward(torch.cat(slopes) if slopes else None, hidden_NH, weight_VH, bias_V, target_N)
        flags, entropy = torch.cat(likeliest), torch.cat(entropies) if full else hidden_NH.new_empty(0)
        ctx.mark_non_differentiable(flags, entropy)
        return torch.cat(logprobs), flags, entropy

    @staticmethod
    def backward(ctx: Any, g_N: Tensor, *_: Tensor) -> Any:
        slope_NH, hidden_NH, weight_VH, bias_V, target_N = ctx.saved_tensors
        by_hidden = None if slope_NH is None else (g_N.unsqueeze(1) * slope_NH).to(hidden_NH.dtype)
        by_weight = torch.zeros_like(weight_VH) if ctx.needs_input_grad[1] else None
        by_bias = torch.zeros_like(bias_V) if ctx.needs_input_grad[2] else None
        if by_weight is None and by_bias is None:
            return by_hidden, None, None, None, None, None
        pieces = (x.split(HEAD_TOKENS) for x in (hidden_NH, target_N, g_N))
        for h, t, g in zip(*pieces, strict=True):
            p = (product(h, weight_VH, bias_V).float() / ctx.heat).softmax(1)
            by_z = p.mul_(-g.unsqueeze(1)).scatter_add_(1, t.unsqueeze(1), g.unsqueeze(1))
            by_z = (by_z / ctx.heat).to(weight_VH.dtype)
            if by_weight is not None:
                by_weight.addmm_(by_z.T, h)
            if by_bias is not None:
                by_bias += by_z.sum(0)
        return by_hidden, by_weight, by_bias, None, None, None


class TokenDivergence(torch.autograd.Function):
    """``KL(anchor || model)_n = sum_v q_n(v) (log q_n(v) - log p_n(v))`` over all words, by chunks of tokens.

    ``q`` is the anchor's distribution, ``p = softmax(h W^T + b)`` the model's. The gradient by a token's state is
    ``(p - q) W``, left by the forward pass as in :class:`TokenLogprobs`; only where the head is trained are the logits
    made again.
    """

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, anchor: Anchor) -> Tensor:
        divergences, slopes = [], []
        for h, s in zip(hidden_NH.split(HEAD_TOKENS), anchor.states_MH.split(HEAD_TOKENS), strict=True):
            log_p, log_q = _log_shares(h, weight_VH, bias_V), _log_shares(s, anchor.weight_VH, anchor.bias_V)
            q = log_q.exp()
            divergences.append(torch.linalg.vecdot(q, log_q - log_p))
            if ctx.needs_input_grad[0]:
                slopes.append(product(log_p.exp().sub_(q).to(weight_VH.dtype), weight_VH.t()))
        ctx.anchor = anchor
        ctx.save_for_backward(torch.cat(slopes) if slopes else None, hidden_NH, weight_VH, bias_V)
        return torch.cat(divergences)

    @staticmethod
    def backward(ctx: Any, g_N: Tensor) -> Any:
        slope_NH, hidden_NH, weight_VH, bias_V = ctx.saved_tensors
        by_hidden = None if slope_NH is None else (g_N.unsqueeze(1) * slope_NH).to(hidden_NH.dtype)
        by_weight = torch.zeros_like(weight_VH) if ctx.needs_input_grad[1] else None
        by_bias = torch.zeros_like(bias_V) if ctx.needs_input_grad[2] else None
        if by_weight is None and by_bias is None:
            return by_hidden, None, None, None
        pieces = (x.split(HEAD_TOKENS) for x in (hidden_NH, ctx.anchor.states_MH, g_N))
        for h, s, g in zip(*pieces, strict=True):
            p = _log_shares(h, weight_VH, bias_V).exp_()
            q = _log_shares(s, ctx.anchor.weight_VH, ctx.anchor.bias_V).exp_()
            by_z = p.sub_(q).mul_(g.unsqueeze(1)).to(weight_VH.dtype)
            if by_weight is not None:
                by_weight.addmm_(by_z.T, h)
            if by_bias is not None:
                by_bias += by_z.sum(0)
        return by_hidden, by_weight, by_bias, None


def _log_shares(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Tensor:
    """log softmax of the head's logits ``[N, V]`` in fp32."""
    return product(hidden_NH, weight_VH, bias_V).float().log_softmax(-1)
