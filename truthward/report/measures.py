"""Every set of the evals beside truth: all metrics by stage, what they mean, confidence against how often it was right."""

from __future__ import annotations

import contextlib
from typing import Any, get_args

from truthward.banks import read_bank
from truthward.errors import UserError
from truthward.report.constitution import spread
from truthward.report.page import Html, difference, figure, join, note, score, spoken, table, tag
from truthward.report.plots import confidence_plot
from truthward.report.view import Stage, View
from truthward.tables import EvalSet

FLIPS = 4  # changed answers shown of each set in each direction
SETS = {
    "truth": "Truthfulness",
    "short": "Short answers, heard",
    "instructions": "Instructions, heard",
    "fluency": "Language of the answers",
    "forms": "Truthfulness in other forms",
    "sycophancy": "Sycophancy",
    "calibration": "Knowledge and confidence",
    "unknown": "Knowing what cannot be known",
    "bias": "Social bias",
    "grounded": "Grounded in dated passages",
    "persona": "Persona",
    "skills": "Small capability set",
    "text": "Ordinary text",
    "open": "Open answers",
    "truthfulqa": "TruthfulQA",
    "bbq": "BBQ",
    "hh": "HH-RLHF",
    "model_written": "Model-written evals",
    "ifeval": "IFEval",
    "lm_eval": "Tasks of lm-evaluation-harness",
}
ARROWS = {"higher": "↑", "lower": "↓", "": ""}


def measures(view: View) -> Html:
    """One table a set: metrics by stage, the final model against the base, what chance and style score."""
    parts = [_set(view, name, title) for name, title in SETS.items() if any(_has(s, name) for s in view.scored)]
    if not parts:
        return Html("")
    words = (
        "↑ higher is better, ↓ lower is better. Differences are paired, with 95 % intervals over topics and questions; p is"
        " corrected for the number of metrics (Holm). Detectable: the smallest true difference that these questions would"
        " find four times in five. A dash is something that was not measured, never a zero."
    )
    return join([note(words), *parts])


def _has(stage: Stage, name: str) -> bool:
    return any(key.startswith(f"{name}.") and value for key, value in (stage.evals or {})["metrics"].items())


def _set(view: View, name: str, title: str) -> Html:
    stages = [s for s in view.scored if _has(s, name)]
    about = {k: v for s in stages for k, v in (s.evals or {})["about"].items() if k.startswith(f"{name}.")}
    final = view.final if view.final in stages else None
    compared = final.compared("base") if final else None
    rows = []
    for key, words in about.items():
        found = [(s.evals or {})["metrics"].get(key) for s in stages]
        cells: list[Any] = [score(i) if i else "-" for i in found]
        gain = compared["differences"].get(key) if compared else None
        if compared:
            cells += [difference(gain), f"{gain['p_corrected']:.3f}", f"{gain['detectable']:.3f}"] if gain else ["-"] * 3
        n = max((i["n"] for i in found if i), default=0)
        rows.append([f"{words['label']} {ARROWS[words['better']]}", n, *cells, _chance(stages, key, words["better"])])
    against = [f"{final.name} - base", "p", "detectable"] if final and compared else []
    columns = ["metric", "n", *[s.name for s in stages], *against, "without knowledge"]
    parts = [tag("h3", title), table(columns, rows, "dense")]
    parts += _confidence(stages) if name == "calibration" else []
    return join([*parts, *_flips(view, name)])


def _chance(stages: list[Stage], key: str, better: str) -> str:
    """The best of what judges by style score, and random weights."""
    baselines = {name: scores[key] for s in stages for name, scores in (s.evals or {})["baselines"].items() if key in scores}
    noise = baselines.pop("random weights", None)
    best = min if better == "lower" else max
    words = [f"style {best(baselines.values()):.2f}"] if baselines else []
    return ", ".join(words + ([f"random weights {noise:.2f}"] if noise is not None else [])) or "-"


def _confidence(stages: list[Stage]) -> list[Html]:
    shown = [s for s in (stages[0], stages[-1]) if s.evals]
    rows = {s.name: [i["values"] for i in (s.evals or {})["items"] if i["set"] == "calibration"] for s in shown}
    known = {n: [v for v in some if None not in (v.get("confidence"), v.get("right"))] for n, some in rows.items()}
    points = {n: ([v["confidence"] for v in some], [v["right"] for v in some]) for n, some in known.items() if some}
    caption = (
        "Share of right answers by confidence, in bins of ten answers or more; on the line, confidence can be believed."
    )
    return [figure(confidence_plot(points, "confidence"), caption)] if points else []


def _flips(view: View, name: str) -> list[Html]:
    """Items of a set whose verdict changed from base to final; those of the truth set have a section of their own."""
    final = view.final
    compared = final.compared("base") if final else None
    if not final or not compared or name == "truth":
        return []
    asked: dict[str, str] = {}
    with contextlib.suppress(UserError):
        asked = {row.id: row.asked[0] for row in read_bank(view.recipe, name)} if name in get_args(EvalSet) else {}
    parts = []
    for better, words in ((True, "changed for the better"), (False, "changed for the worse")):
        found = [row for row in compared["flipped"] if row["set"] == name and row["better"] is better]
        rows = [
            [
                join([spoken(asked.get(r["id"], "")), tag("span", r["id"], class_="where")], ""),
                spoken(r["before"]),
                spoken(r["after"]),
            ]
            for r in spread(found, FLIPS)
        ]
        parts += [tag("p", f"{len(found)} {words}."), table(["asked", "base", final.name], rows, "even")] if found else []
    return parts
