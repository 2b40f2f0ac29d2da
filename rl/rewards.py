"""Where PPO's scores come from: the preference model, Python functions, sequence classifiers, or several with weights.

``ppo.rewards`` names them: ``"reward"`` is the recipe's own stage; ``"file.py:function"`` (or ``"package.module:function"``)
a Python function as TRL's trainers take it; anything else the folder or hub id of a Hugging Face sequence classifier,
which keeps its own tokenizer and template.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from truthward import chat, models
from truthward.errors import TrainingFault, UserError

Source = Callable[[list[str], list[str], list[list[int]]], list[float]]  # prompts, answers, the answers' tokens -> scores


def open_sources(names: list[str], dtype: torch.dtype, device: str | torch.device = "cpu") -> dict[str, Source]:
    """Every reward beside the recipe's own preference model, ready to be asked.

    Raises:
        UserError: a file, function or classifier is not there, or is not of a form that can score answers.
    """
    others = [name for name in names if name != "reward"]
    return {n: python_reward(n) if _is_python(n) else ClassifierReward(n, dtype, device) for n in others}


def _is_python(name: str) -> bool:
    path, colon, function = name.rpartition(":")
    return bool(colon) and function.isidentifier() and bool(path)


# ------------------------------------------------------------------------------------------------- Python functions


def python_reward(name: str) -> Source:
    """A function ``(prompts, completions, completion_ids, ...) -> scores``; it gets those of the arguments that it names.

    The arguments are lists of equal length: texts, and for ``completion_ids`` token ids. True and False count 1 and 0.

    Raises:
        UserError: there is no such function, or it asks for an argument that there is not.
    """
    where, _, attribute = name.rpartition(":")
    try:
        module = _import_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
        function = getattr(module, attribute)
        parameters = inspect.signature(function).parameters.values()
    except (ImportError, AttributeError, OSError, SyntaxError, TypeError) as error:
        fix = "name a function that exists, e.g. rewards.py:short_and_true"
        raise UserError(f"no reward function can be loaded from {name!r}: {error}", where="ppo.rewards", fix=fix) from error
    given = ("prompts", "completions", "completion_ids")
    free = any(p.kind is p.VAR_KEYWORD for p in parameters)
    others = (p for p in parameters if p.name not in given and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL))
    unknown = [p.name for p in others if p.default is p.empty]
    if unknown:
        raise UserError(
            f"{name} asks for {', '.join(unknown)}", where="ppo.rewards", fix=f"a reward gets {', '.join(given)} and no more"
        )
    wanted = [n for n in given if free or n in {p.name for p in parameters}]

    def score(prompts: list[str], answers: list[str], tokens: list[list[int]]) -> list[float]:
        arguments = dict(zip(given, (prompts, answers, tokens), strict=True))
        return _checked(name, function(**{n: arguments[n] for n in wanted}), len(prompts))

    return score


def _import_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _checked(name: str, scores: Any, count: int) -> list[float]:
    try:
        values = [float(score) for score in scores]
    except (TypeError, ValueError) as error:
        raise TrainingFault(f"reward {name} must return a list of numbers: {error}\n  to do: mend the function") from error
    if len(values) != count:
        raise TrainingFault(f"reward {name} gave {len(values)} scores for {count} answers\n  to do: return one an answer")
    bad = [i for i, value in enumerate(values) if not math.isfinite(value)]
    if bad:
        raise TrainingFault(f"reward {name} gave {values[bad[0]]} to answer {bad[0]}\n  to do: return finite numbers")
    return values


# -------------------------------------------------------------------------------------------------------- classifiers


class ClassifierReward:
    """A Hugging Face sequence classifier with its own tokenizer and template: the logit, or the log-odds of label 1 of two.

    Raises:
        UserError: it cannot be loaded, or has more than two labels.
    """

    def __init__(self, name: str, dtype: torch.dtype, device: str | torch.device = "cpu") -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        models.refuse_code(name, "ppo.rewards")
        try:
            loaded: Any = AutoModelForSequenceClassification.from_pretrained(
                name, dtype=dtype, use_safetensors=True, output_loading_info=True, trust_remote_code=False
            )
            self.tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError) as error:
            first = f"no sequence classifier can be loaded from {name!r}: {str(error).splitlines()[0]}"
            fix = 'give a folder with config.json, safetensors and a tokenizer, a hub id, or "file.py:function"'
            raise UserError(first, where="ppo.rewards", fix=fix) from error
        model, found = loaded
        if found["missing_keys"]:  # transformers draws these at random
            first = f"{name} has no weights for {', '.join(sorted(found['missing_keys'])[:3])}: it is no trained classifier"
            raise UserError(first, where="ppo.rewards", fix="name a sequence classifier, not a language model")
        if model.config.num_labels > 2:
            first = f"{name} has {model.config.num_labels} labels, so no one score"
            raise UserError(first, where="ppo.rewards", fix="wrap it in a Python function that makes one number of them")
        self.name, self.model = name, model.to(device).eval().requires_grad_(False)

    @torch.inference_mode()
    def __call__(self, prompts: list[str], answers: list[str], tokens: list[list[int]]) -> list[float]:
        rows = [self._encode(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        return _checked(self.name, [self._score(row) for row in rows], len(rows))

    def _encode(self, prompt: str, answer: str) -> dict[str, Any]:
        """What the model takes of what its tokenizer makes: some need to be told which tokens are the answer's."""
        if self.tokenizer.chat_template:
            turns = [*chat.user(prompt), {"role": "assistant", "content": answer}]
            options = {"tokenize": True, "return_dict": True}
            try:
                row = self.tokenizer.apply_chat_template(turns, sanitize_control_tokens=True, **options)
            except ValueError:  # a control token of this tokenizer is what plain text gives too: nothing tells them apart
                row = self.tokenizer.apply_chat_template(turns, **options)
        else:
            row = self.tokenizer(prompt, answer, split_special_tokens=True)
        taken = inspect.signature(self.model.forward).parameters
        return {n: torch.tensor([ids], device=self.model.device) for n, ids in row.items() if n in taken}

    def _score(self, row: dict[str, Any]) -> float:
        """One row at a time: classifiers find their last token by what is not padding, which an end token often equals."""
        kept, self.model.config.pad_token_id = self.model.config.pad_token_id, None
        logits = self.model(**row).logits[0].float()
        self.model.config.pad_token_id = kept
        return (logits[0] if len(logits) == 1 else logits[1] - logits[0]).item()


# --------------------------------------------------------------------------------------------------------- one number


def spread(scores: list[list[float]]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each source's scores, to normalise later ones by; 1 where they are all the same."""
    means = [sum(column) / len(column) for column in scores]
    deviations = [torch.tensor(column, dtype=torch.float64).std().item() for column in scores]
    return means, [d if d > 1e-6 else 1.0 for d in deviations]


def combine(
    scores: list[list[float]], means: list[float], deviations: list[float], weights: list[float], *, hard: bool, clip: float
) -> Tensor:
    """``sum_k w_k clip((s_k - mean_k) / std_k)``, or with ``hard`` the weights of those sources that beat their mean.

    Normalising by what the policy scored where it started makes learning rate and KL mean the same for any source
    (Stiennon et al. 2020, arXiv 2009.01325, appendix B); clipping is Bai et al.'s and DeepSpeed-Chat's guard.

    Args:
        scores: for each source, one an answer.
        means, deviations: of :func:`spread` over the first rollout.
        weights: of the sources.
        hard: 1 or 0 in place of the normalised score.
        clip: bound of a normalised score; 0 leaves it.

    Returns:
        scores ``[B]``.
    """
    s, mean, std, w = (torch.tensor(v, dtype=torch.float64) for v in (scores, means, deviations, weights))
    normal = (s - mean.unsqueeze(1)) / std.unsqueeze(1)
    if hard:
        normal = (normal > 0).double()
    elif clip:
        normal = normal.clamp(-clip, clip)
    return (w.unsqueeze(1) * normal).sum(0).float()
