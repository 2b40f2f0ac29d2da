"""What lm-evaluation-harness measures, where it is installed: any of its tasks by name, and IFEval's checks."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from evals.asking import Exam, Metric, answer_freely, metric
from evals.benchmarks import objects
from evals.suite import Scored
from truthward.banks import Bankrow
from truthward.errors import UserError
from truthward.records import validated
from truthward.tables import Evals

FIX = "pip install 'lm-eval>=0.4.9,<0.5' (for IFEval also langdetect, nltk and immutabledict)"


def require(table: Evals) -> None:
    """Refuse what needs lm-evaluation-harness where it is not installed, before a model is loaded.

    Raises:
        UserError: says how to install it.
    """
    wanted = "evals.lm_eval" if table.lm_eval else "evals.files.ifeval" if "ifeval" in table.files else ""
    if wanted and importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-evaluation-harness is not installed", where=wanted, fix=FIX)


def run_tasks(model: Any, tokenizer: Any, names: list[str], limit: int = 0) -> dict[str, dict[str, Any]]:
    """Tasks of the harness on a model that is loaded.

    Args:
        limit: at most so many documents of each task; 0 takes all.

    Returns:
        ``lm_eval.<task>.<metric>`` -> interval; mean ± 1.96 of the harness's standard errors, n its documents.

    Raises:
        UserError: it knows no such task.
    """
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise UserError(f"unknown task {', '.join(unknown)}", where="evals.lm_eval", fix="list them: lm-eval ls tasks")
    done = evaluator.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, device=str(model.device)),
        tasks=list(names),
        limit=limit or None,
        task_manager=manager,
        bootstrap_iters=1000,
        log_samples=False,
    )
    found = {}
    for task, scores in done["results"].items():
        for key, value in scores.items():
            name, _, way = key.partition(",")
            error = scores.get(f"{name}_stderr,{way}")
            if isinstance(value, float) and isinstance(error, float):
                label = name if way in ("none", "") else f"{name}_{way}"
                n = done["n-samples"][task]["effective"]
                interval = {"mean": value, "low": value - 1.96 * error, "high": value + 1.96 * error, "n": n}
                found[f"lm_eval.{task}.{label}"] = interval
    return found


# ------------------------------------------------------------------------------------------------------------ IFEval


class Instruction(Bankrow):
    """A prompt of IFEval with the instructions that an answer must follow (Zhou et al. 2023, arXiv 2311.07911)."""

    prompt: str
    instruction_id_list: list[str]
    given: list[dict[str, Any]]

    @property
    def asked(self) -> list[str]:
        return [self.prompt]


IFEVAL = Exam(
    ask=lambda row: [],
    grade=lambda row, sums: {},
    metrics={
        "prompt": metric("IFEval, all of a prompt's instructions followed (strict)", "prompt"),
        "instructions": Metric("IFEval, instructions followed (strict)", ("instructions",)),
        "loose": metric("IFEval, all of a prompt's instructions followed (loose)", "loose"),
    },
    verdict="prompt",
    style=False,
)


def follow_instructions(model: Any, tokenizer: Any, path: str, most: int, max_new_tokens: int = 512) -> list[Scored]:
    """Greedy answers to the prompts of an IFEval file, checked by the harness's own code.

    Raises:
        UserError: what its checks need is not installed, or a row is wrong.
    """
    try:
        from lm_eval.tasks.ifeval.utils import process_results
    except ImportError as error:
        raise UserError(f"IFEval's checks need more: {error}", where="evals.files.ifeval", fix=FIX) from error
    rows = []
    for n, (where, value) in enumerate(objects(Path(path))):
        kept = {"id": f"ifeval-{n}", "topic": "ifeval", "given": value.get("kwargs")}
        kept |= {key: value.get(key) for key in ("prompt", "instruction_id_list")}
        rows.append(validated(kept, Instruction, where))
    rows = rows[:most] if most else rows
    answers = answer_freely(model, tokenizer, [row.prompt for row in rows], max_new_tokens)
    scored = []
    for row, answer in zip(rows, answers, strict=True):
        given = {"key": 0, "prompt": row.prompt, "instruction_id_list": row.instruction_id_list, "kwargs": row.given}
        found = process_results(given, [answer])
        strict = found["inst_level_strict_acc"]
        values = {
            "prompt": float(found["prompt_level_strict_acc"]),
            "loose": float(found["prompt_level_loose_acc"]),
            "instructions": sum(strict) / len(strict) if strict else None,
        }
        scored.append(Scored("ifeval", row.id, row.topic, values, answer))
    return scored
