"""Optimizer steps on sums over tokens, whoever holds which tokens and which part of the optimizer.

A loss of :mod:`rl.update` is a sum over this rank's tokens of weight x loss, with weights from the whole minibatch. So the
gradient of a step is the sum, not the mean, over micro-batches and ranks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from truthward import ranks, zero
from truthward.tables import Launch


class Stepper:
    """A module and its optimizer, the same on every rank; gradients are added up before a step.

    Args:
        module: already on its device.
        optimizer: over parameters that get a gradient in each step, on every rank alike.
        max_norm: to which the gradient is clipped.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float) -> None:
        self.module: Any = module
        self.optimizer: Any = optimizer
        self.max_norm = max_norm

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a part of the step's loss."""
        loss.backward()

    def step(self) -> float:
        """Step on what was added, or drop it where it is not finite; returns the norm before clipping.

        A NaN has been spread over all gradients by the clipping.
        """
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        if ranks.count() > 1:
            _add_up(trained)
        norm = float(nn.utils.clip_grad_norm_(trained, self.max_norm))
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm


class ZeroStepper(Stepper):
    """The same with DeepSpeed's engine around the module: gradients, moments and weights are shared out as ZeRO says.

    The engine steps behind its backward pass and cannot leave a step out that is not finite; the guard goes back then.
    """

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float, settings: dict[str, Any], micro: int
    ) -> None:
        import deepspeed

        filled = settings | {
            "train_micro_batch_size_per_gpu": micro,
            "managed_gradient_accumulation": False,  # a step ends where it is called, however many backward passes it has
            "gradient_clipping": max_norm,
            "gradient_accumulation_steps": 1,
        }
        filled["zero_optimization"]["overlap_comm"] &= filled["zero_optimization"]["stage"] == 2
        zero.of_one_type(module, filled)
        engine, wrapped, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=filled, dist_init_required=False
        )
        super().__init__(engine, optimizer, max_norm)
        self.optimizer, self.stage = wrapped, settings["zero_optimization"]["stage"]

    def backward(self, loss: Tensor) -> None:
        """As above; DeepSpeed takes means over ranks."""
        self.module.backward(loss * ranks.count(), scale_wrt_gas=False)

    def step(self) -> float:
        self.module.step()
        if self.stage == 3:
            # it overwrites with the first backward pass of a step and adds with later ones, also to what parameters that
            # the first did not touch (the critic's) have left there from the step before
            self.optimizer.grad_partitions_flat_buffer.zero_()
        return float(self.module.get_global_grad_norm())


def stepper(
    module: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float, launch: Launch, dtype: torch.dtype, micro: int
) -> Stepper:
    """What the recipe's ``[launch]`` asks for.

    Args:
        dtype: the compute type.
        micro: answers of a micro-batch.
    """
    settings = zero.configuration(launch, dtype)
    return ZeroStepper(module, optimizer, max_norm, settings, micro) if settings else Stepper(module, optimizer, max_norm)


def _add_up(parameters: list[nn.Parameter]) -> None:
    """Sum the gradients over ranks, all in one message."""
    import torch.distributed as dist

    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.view(-1) for g in gradients])
    dist.all_reduce(flat)
    for gradient, whole in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(whole.view_as(gradient))
