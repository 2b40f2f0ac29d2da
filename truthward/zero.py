"""DeepSpeed as a recipe's ``[launch]`` asks for it: what Rajbhandari et al. 2020 (arXiv 1910.02054) call ZeRO."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from truthward import hardware, ranks, shards
from truthward.tables import Launch

BUCKET = 50_000_000  # elements that are reduced or gathered together


def configuration(launch: Launch, dtype: torch.dtype) -> dict[str, Any] | None:
    """Settings of DeepSpeed, or None where a recipe does without it.

    Batch sizes, accumulation and clipping are "auto": whoever trains fills them in. bf16 weights are trained with fp32
    master copies, which DeepSpeed keeps.
    """
    if not launch.zero:
        return None
    on_host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    zero: dict[str, Any] = {
        "stage": launch.zero,
        "contiguous_gradients": True,
        "overlap_comm": torch.cuda.is_available(),
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
    }
    if launch.offload != "none":
        zero["offload_optimizer"] = on_host
    if launch.offload == "all":
        zero["offload_param"] = on_host
    made = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's AdamW, which needs no compiler
        "zero_force_ds_cpu_optimizer": False,
    }
    further = json.loads(Path(launch.deepspeed).read_text(encoding="utf-8")) if launch.deepspeed else {}
    return _over(made, further)


def _over(settings: dict[str, Any], further: dict[str, Any]) -> dict[str, Any]:
    """Settings with others put over them, table by table."""
    merged = dict(settings)
    for key, value in further.items():
        both = isinstance(value, dict) and isinstance(settings.get(key), dict)
        merged[key] = _over(settings[key], value) if both else value
    return merged


def enter(launch: Launch) -> dict[str, bool]:
    """Tell accelerate whether it works for DeepSpeed, and that a CPU's ranks are ranks; before any of its objects is made.

    Without a GPU it takes each process under DeepSpeed for the only one, and would give all of them the same rows; told that
    it runs on a CPU, it would leave DeepSpeed out without a word. So transformers looks for a GPU that knows bf16.

    Returns:
        ``accelerator_config`` for a trainer's arguments.
    """
    import transformers.training_args
    from accelerate.state import AcceleratorState, PartialState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    if not launch.zero:
        return {}
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    logging.getLogger("accelerate.accelerator").setLevel(logging.ERROR)  # it tells at each start whose accumulation holds
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # of calls that are DeepSpeed's
    if not torch.cuda.is_available():
        transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    state = PartialState(**({} if torch.cuda.is_available() else {"backend": "gloo"}))
    assert state.num_processes == ranks.count(), "accelerate counts other ranks than there are"
    return {"use_configured_state": True}


def share_out(module: Any, launch: Launch) -> Any:
    """Cut a module's weights into the stretches that ZeRO-3 keeps on each rank's device; called by every rank.

    DeepSpeed would first put the whole model on every device, where a large one has no room. Here one parameter at a time is
    whole, and it is the first rank's: what the others hold need not have been read (:func:`truthward.models.load_cut`).
    """
    import deepspeed

    asked = configuration(launch, torch.float32) or {}
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": asked["zero_optimization"]}
    cut: dict[torch.nn.Parameter, Any] = {}  # tied weights stay tied
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if parameter not in cut:
                held: Any = parameter
                if parameter.is_meta:
                    held = torch.nn.Parameter(torch.empty_like(parameter, device=hardware.device()))
                if cut:
                    next(iter(cut.values())).convert_to_zero_parameters(param_list=[held])
                else:
                    deepspeed.zero.Init(module=torch.nn.ParameterList([held]), config_dict_or_path=settings)
                cut[parameter] = held
            setattr(owner, name, cut[parameter])
    for name, value in ranks.share(dict(module.named_buffers())).items():
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, value.to(hardware.device()))
    return module


def of_one_type(module: Any, settings: dict[str, Any]) -> None:
    """Give weights that came to a module after :func:`share_out` the type of the others, as DeepSpeed wants it."""
    if settings["bf16"]["enabled"] and any(hasattr(p, "ds_id") for p in module.parameters()):
        for parameter in module.parameters():
            if not hasattr(parameter, "ds_id"):
                parameter.data = parameter.data.bfloat16()


@contextlib.contextmanager
def present(parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """Within, these parameters are whole on every rank, wherever ZeRO-3 keeps them. Entered by every rank."""
    absent = [p for p in parameters if getattr(getattr(p, "ds_status", None), "name", "") == "NOT_AVAILABLE"]
    if not absent:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(absent):
        yield


@contextlib.contextmanager
def used_whole(model: Any) -> Iterator[None]:
    """Within, a module's weights are whole while it computes, where :func:`share_out` cut them and no engine is there yet.

    The ranks call the model equally often.
    """
    inside: dict[int, contextlib.ExitStack] = {}

    def before(module: Any, _: Any) -> None:
        inside[id(module)] = contextlib.ExitStack()
        inside[id(module)].enter_context(present(module.parameters(recurse=False)))

    def after(module: Any, *_: Any) -> None:
        inside.pop(id(module)).close()

    hooks = []
    for module in model.modules():
        if any(hasattr(p, "ds_id") for p in module.parameters(recurse=False)):
            hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def whole(parameter: torch.nn.Parameter) -> torch.Tensor:
    """A copy of all of a parameter, on the CPU of every rank. Called by every rank."""
    with present([parameter]):
        return parameter.detach().cpu().clone()


def kept_whole(parameter: torch.nn.Parameter | None) -> torch.Tensor | None:
    """All of a frozen parameter: itself, or a copy where ZeRO-3 shares it out. Called by every rank."""
    if parameter is None or not hasattr(parameter, "ds_id"):
        return None if parameter is None else parameter.detach()
    with present([parameter]):
        return parameter.detach().clone()


def gathered(model: Any) -> dict[str, torch.Tensor] | None:
    """The trained weights, whole, on the first rank's CPU, where ZeRO-3 shares them out; else None. Called by every rank."""
    if not any(hasattr(p, "ds_id") for p in model.parameters()):
        return None
    state: dict[str, torch.Tensor] = {}
    seen: dict[int, torch.Tensor] = {}  # tied weights stay tied
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            if id(parameter) not in seen:
                full = whole(parameter)
                seen[id(parameter)] = full if ranks.first() else full[:0]
            state[name] = seen[id(parameter)]
    return state


def keep_types(trainer: Any) -> None:
    """Let a trainer of transformers under DeepSpeed leave its inputs' types alone.

    It would round whatever is no whole number to the compute type: DPO's reference log-probabilities to the next 0.5 nats.
    """
    from accelerate.utils import send_to_device

    trainer._prepare_input = lambda inputs: send_to_device(inputs, trainer.args.device)


def keep_own_checkpoints(trainer: Any) -> None:
    """Let a trainer of transformers under DeepSpeed write and read :mod:`truthward.shards`.

    DeepSpeed's own checkpoints are pickles, and those of one number of ranks are of no use to another. What the trainer
    writes beside them (its scheduler, its state) stays as it is.
    """
    import transformers.trainer

    def trained() -> dict[str, Any]:
        return {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}

    def write(folder: str) -> None:
        with ranks.agreed():  # the trainer's state, by which a checkpoint is known, comes after all parts
            shards.write(Path(folder), trained(), trainer.model_wrapped.optimizer)
            if ranks.first():
                torch.save(trainer.lr_scheduler.state_dict(), Path(folder) / "scheduler.pt")

    read_rest = trainer._load_optimizer_and_scheduler

    def read(checkpoint: str | None) -> None:
        if checkpoint is not None:
            shards.read(Path(checkpoint), trained(), trainer.model_wrapped.optimizer)
        read_rest(checkpoint)
        if checkpoint is not None:  # the scheduler knows where it stands, the optimizer would begin with its first rate
            for group, rate in zip(trainer.optimizer.param_groups, trainer.lr_scheduler.get_last_lr(), strict=True):
                group["lr"] = rate

    trainer.save_model = lambda *args, **kwargs: None  # the parts hold the weights; the stage saves the model at its end
    trainer._save_optimizer_and_scheduler, trainer._load_optimizer_and_scheduler = write, read
    transformers.trainer.deepspeed_load_checkpoint = lambda *args, **kwargs: None
