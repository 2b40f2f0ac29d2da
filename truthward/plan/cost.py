"""Time of a training stage on a cluster: floating-point operations, bytes over the network, bytes out of memory.

P: parameters of the model; Psi: bytes of a set of parameters; N: ranks. ``docs/scale.md`` has the formulas in one place.
"""

from __future__ import annotations

from typing import NamedTuple

from truthward.check.facts import Shape
from truthward.check.memory import BUCKET
from truthward.plan.machines import Cluster

HIDDEN = 0.5  # assumed: share of the computing under which DeepSpeed's streams can hide the network (overlap_comm)
DECODE = 0.6  # assumed: share of the memory's bandwidth that a decode step reaches
KERNELS, START = 20, 5e-6  # assumed: kernels of a layer in a decode step, seconds that each takes to start


class Learning(NamedTuple):
    """What a step trains, on one model.

    Attributes:
        shape: of the model.
        trained: parameters.
        width: bytes of weights and gradients.
        passes: forward passes without a gradient, beside the one with (a reference, scores).
        models: passes with a gradient a row (policy and critic: 2).
        recompute: whether activations are computed again in the backward pass.
    """

    shape: Shape
    trained: float
    width: int
    passes: float = 0
    models: float = 1
    recompute: bool = False

    @property
    def whole(self) -> bool:
        """Whether every weight is trained."""
        return self.trained >= self.shape.parameters

    def flops(self, tokens: float, context: float) -> float:
        """Of ``tokens`` tokens of rows in which each attends to ``context`` others on average.

        Forward 2 P (Kaplan et al. 2020, arXiv 2001.08361, section 2.1) and 4 layers H context for attention's two products;
        back to the inputs as much, and to the weights again where they are trained.
        """
        forward = forward_flops(self.shape, tokens, context)
        back = 1 + self.whole + self.recompute
        return forward * (self.passes + self.models * (1 + back))

    def useful(self, tokens: float, context: float) -> float:
        """The operations that model FLOPs utilisation counts: those above without any that are done twice."""
        return self._replace(recompute=False).flops(tokens, context)


def forward_flops(shape: Shape, tokens: float, context: float) -> float:
    """Of a forward pass."""
    return tokens * (2 * shape.parameters + 4 * shape.layers * shape.hidden * context)


def volume(learning: Learning, zero: int, ranks: int, micros: int = 1) -> float:
    """Bytes that each rank sends in an optimizer step (Rajbhandari et al. 2020, arXiv 1910.02054, section 7).

    Stages 0 to 2: gradients are summed and scattered, then gradients (0) or new weights (1, 2) gathered: 2 Psi of what is
    trained. Stage 3 gathers all weights in the forward and again in the backward pass of every micro-batch, and sums and
    scatters gradients: 3 Psi where all weights are trained. Stages 2 and 3 sum gradients in every micro-batch.
    """
    trained, everything = learning.trained * learning.width, learning.shape.parameters * learning.width
    share = (ranks - 1) / ranks
    reduced = trained * (micros if zero >= 2 else 1)
    gathered = trained if zero < 3 else gathers(learning) * everything * micros
    return share * (reduced + gathered)


def gathers(learning: Learning) -> float:
    """How often stage 3 gathers all weights in a micro-batch: once a forward pass, again in each backward pass."""
    return 2 * learning.models + learning.passes


class Step(NamedTuple):
    """An optimizer step: seconds of computing, of the network, and of it what is not hidden."""

    compute: float
    network: float
    exposed: float

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed


def step(learning: Learning, cluster: Cluster, tokens: float, context: float, zero: int, micros: int = 1) -> Step:
    """Seconds of an optimizer step; gradients go in buckets, weights layer by layer.

    Args:
        tokens: of each rank in the step.
        context: tokens that a token attends to, on average.
        micros: micro-batches that the step is cut into.
    """
    kind, ranks = cluster.kind, cluster.devices
    compute = learning.flops(tokens, context) / (kind.peak * kind.share)
    if ranks == 1:
        return Step(compute, 0.0, 0.0)
    trained, everything = learning.trained * learning.width, learning.shape.parameters * learning.width
    layers = max(1, learning.shape.layers)
    buckets = max(1, learning.trained / BUCKET)
    network = (micros if zero >= 2 else 1) * cluster.pass_time(trained, buckets)
    if zero < 3:
        network += cluster.pass_time(trained, buckets)
    else:
        network += micros * gathers(learning) * cluster.pass_time(everything, layers)
    hidden = HIDDEN * compute if kind.device == "cuda" else 0.0
    return Step(compute, network, max(0.0, network - hidden))


class Rollout(NamedTuple):
    """Sampling of PPO's answers on each rank: seconds of the prompts' pass, of the decode steps; bytes of the KV cache."""

    prefill: float
    decode: float
    cache: float

    @property
    def seconds(self) -> float:
        return self.prefill + self.decode


def rollout(shape: Shape, cluster: Cluster, answers: float, prompt: float, length: float, width: int) -> Rollout:
    """Sampling ``answers`` answers of ``length`` tokens on each rank, which hold the policy whole.

    A decode step reads all weights and the cache once (Pope et al. 2022, arXiv 2211.05102, section 2): its time is that of
    the memory, of the products, or of the kernels' starts, whichever is longest. Keys and values take 2 layers H
    (key-value heads / heads) elements a token.
    """
    kind = cluster.kind
    a_token = shape.cached * width
    cache = answers * a_token * (prompt + length)
    prefill = forward_flops(shape, answers * prompt, prompt / 2) / (kind.peak * kind.share)
    read = (shape.parameters * width + answers * a_token * (prompt + length / 2)) / (kind.bandwidth * DECODE)
    products = forward_flops(shape, answers, prompt + length / 2) / (kind.peak * kind.share)
    starts = shape.layers * KERNELS * START if kind.device == "cuda" else 0.0
    return Rollout(prefill, length * max(read, products, starts), cache)
