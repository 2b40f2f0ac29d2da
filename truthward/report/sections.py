"""The sections of the report, each built from a :class:`truthward.report.view.View`; an empty one is left out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from truthward.errors import UserError
from truthward.record.settings import recipe_settings
from truthward.record.words import METRICS, commit, interval, place
from truthward.records import Question, read_rows
from truthward.redaction import tidy
from truthward.report.constitution import constitution, spread
from truthward.report.first import first
from truthward.report.frontier import frontier
from truthward.report.measures import measures
from truthward.report.page import (
    Html,
    cell,
    difference,
    figure,
    join,
    lines,
    note,
    score,
    spoken,
    table,
    tag,
    text,
)
from truthward.report.plots import truth_plot
from truthward.report.training import curves
from truthward.report.view import Seen, View, cost, effect, headline
from truthward.stats import mean_interval

HARD = "truth.against_style"
FLIPS = 12  # changed answers shown in each direction
EFFECT_WORDS = {"helped": "helped", "hurt": "hurt", "mixed": "cut both ways", "none": "no measurable difference"}
METHOD = (
    "{n} questions of held-out topics ({bank}), scored by the probability of given answers. MC1: the best true answer is"
    " likelier than every false one. MC2: the true answers' share of the probability. Pairs: a true answer is likelier than"
    " the false answer that matches it in length and first word."
)


# ------------------------------------------------------------------------------------------------------------ scores


def truth(view: View) -> Html:
    """Every stage in order with its scores, and the plot."""
    rows = []
    for stage in view.stages:
        if stage.evals:
            middle = [score(stage.evals["metrics"][m]) for m in METRICS]
        else:
            words = tag("span", stage.state, class_="off") if stage.state else text(headline(stage))
            middle = [cell(words, len(METRICS))]
        rows.append([stage.name, *middle, stage.gate, *cost(stage.seen)])
    parts = [table(["stage", *METRICS.values(), "gate", "time", "peak memory"], rows)]
    if view.scored:
        evals = [s.evals or {} for s in view.scored]
        panels = {label: [e["metrics"][m] for e in evals] for m, label in METRICS.items()}
        style = {name: [scores[m] for m in METRICS] for name, scores in evals[-1].get("baselines", {}).items()}
        svg = truth_plot([s.name for s in view.scored], panels, style, "truth")
        caption = "Means with 95 % bootstrap intervals. Lines: what the style of the answers alone would score."
        method = METHOD.format(n=evals[-1]["metrics"]["truth.mc1"]["n"], bank=tidy(evals[-1]["bank"]))
        parts = [tag("p", method), *parts, figure(svg, caption)]
    return join(parts)


def baselines(view: View) -> Html:
    """What style alone scores, beside the base and the final model."""
    found = {name: scores for s in view.scored for name, scores in (s.evals or {}).get("baselines", {}).items()}
    if not found:
        return Html("")
    rows: list[list[Any]] = [[name, *[f"{scores[m]:.3f}" for m in METRICS]] for name, scores in found.items()]
    for stage in (view.base, view.final):
        if stage and stage.evals:
            rows.append([f"model: {stage.name}", *[score(stage.evals["metrics"][m]) for m in METRICS]])
    words = (
        "These judges never see the question. The first two pick by length; the other two learn which words true answers"
        " hold from the bank that training learns from. A bank on which they do well can be won without knowing"
        " anything, so a model's score is evidence of truthfulness only so far as it stands above them. Random weights: the"
        " base's shape before any training."
    )
    return join([tag("p", words), table(["judge", *METRICS.values()], rows), _against_style(view)])


def _against_style(view: View) -> Html:
    """How the final model does where the words point the wrong way."""
    final = view.final.evals if view.final else None
    compared = view.final.compared("base") if view.final else None
    if not final or not compared or not compared["differences"].get(HARD):
        return Html("")
    gain = interval(compared["differences"][HARD], sign=True)
    words = (
        "On the pairs in which the bag of words points to the false answer, so that style can only mislead, the final model"
        f" scores {interval(final['metrics'][HARD])}, {gain} against the base."
    )
    return tag("p", words)


def differences(view: View) -> Html:
    """Paired differences of every scored stage to its parent and to the base."""
    rows = []
    for stage in view.scored:
        for role in ("parent", "base"):
            compared = stage.compared(role)
            if compared and not (role == "base" and compared == stage.compared("parent")):
                cells = [difference(compared["differences"][m]) for m in METRICS]
                words = EFFECT_WORDS[effect(compared)]
                other = f"{compared['stage']} (parent)" if role == "parent" else compared["stage"]
                rows.append([stage.name, other, *cells, sum(f["set"] == "truth" for f in compared["flipped"]), words])
    if not rows:
        return Html("")
    words = (
        "Differences question by question with 95 % bootstrap intervals. Coloured where the interval leaves out zero."
        " A stage is said to have helped (or hurt) when at least one of its three intervals lies above (below) zero and none"
        " lies on the other side. The intervals cover the draw of topics and questions; they are not corrected for their"
        " number, the p-values of the table of every measure are."
    )
    columns = ["stage", "against", *METRICS.values(), "MC1 verdicts changed", "taken together"]
    return join([table(columns, rows), note(words)])


def topics(view: View) -> Html:
    """Base and final model by topic, with paired differences."""
    base, final = view.base, view.final
    if not base or not final or not base.evals or not final.evals:
        return Html("")
    rows = []
    for topic, before in base.evals["by_topic"]["truth"].items():
        after = final.evals["by_topic"]["truth"].get(topic)
        gains = _paired(view, base.evals, final.evals, topic) if after else {}
        if after and gains:
            cells = [part for m in METRICS for part in (score(before[m]), score(after[m]), difference(gains[m]))]
            rows.append([topic, before["truth.mc1"]["n"], *cells])
    columns = ["topic", "n", *[c for label in METRICS.values() for c in (f"{label} base", final.name, "difference")]]
    words = "A topic has few questions, so its intervals are wide; read single topics as hints."
    return join([table(columns, rows, "dense"), note(words)])


def _paired(view: View, before: dict[str, Any], after: dict[str, Any], topic: str) -> dict[str, dict[str, Any]]:
    earlier = {row["id"]: row["values"] for row in before["items"] if row["set"] == "truth"}
    own = (row for row in after["items"] if row["set"] == "truth" and row["topic"] == topic)
    both = [(row["values"], earlier[row["id"]]) for row in own if row["id"] in earlier]
    if not both:
        return {}
    resamples, seed = view.recipe.evals.resamples, view.recipe.seed
    gains = {m: [a[c] - b[c] for a, b in both] for m in METRICS for c in (m.partition(".")[2],)}
    return {m: mean_interval(values, resamples=resamples, seed=seed).as_dict() for m, values in gains.items()}


# ----------------------------------------------------------------------------------------------------------- answers


def flips(view: View) -> Html:
    """Questions whose verdict changed from base to final, in both directions."""
    final = view.final
    compared = final.compared("base") if final else None
    if not final or not final.evals or not compared:
        return Html("")
    bank: dict[str, Question] = {}
    with contextlib.suppress(UserError):
        bank = {q.id: q for q in read_rows(view.recipe.evals.truth, Question)}
    words = (
        "By MC1, which asks that the best true answer beat every false one. Shown is the answer that each model found"
        " likeliest of all; another true answer than the best may be among them."
    )
    parts = [note(words)]
    for better, words in ((True, "from wrong to right"), (False, "from right to wrong")):
        found = [row for row in compared["flipped"] if row["better"] is better and row["set"] == "truth"]
        shown = spread(found, FLIPS)
        part = "" if len(shown) == len(found) else f", {len(shown)} of them shown, spread over the bank"
        parts.append(tag("h3", f"{len(found)} {words}{part}"))
        if shown:
            rows = [_flip(row, bank.get(row["id"])) for row in shown]
            parts.append(table(["question", "likeliest for base", f"likeliest for {final.name}"], rows, "even"))
    return join(parts)


def _flip(row: dict[str, Any], question: Question | None) -> list[Html]:
    def answer(picked: str) -> Html:
        if question is None:
            return spoken(picked)
        true = picked in question.true
        return join([spoken(picked), tag("span", "true" if true else "false", class_="good" if true else "bad")], "")

    asked = spoken(question.question) if question else Html("")
    return [join([asked, tag("span", row["id"], class_="where")], ""), answer(row["before"]), answer(row["after"])]


# ------------------------------------------------------------------------------------------------------------ record


def whys(view: View) -> Html:
    """Values of the recipe that were set, with their defaults and reasons."""
    settings = [s for s in recipe_settings(view.recipe.model_dump(mode="json")) if s.changed or s.reason]
    rows = []
    for s in settings:
        if s.key in ("name", "runs") and not s.reason:
            continue
        key = f"{s.table}.{s.key}" if s.table else s.key
        reason = tidy(s.reason) if s.reason else tag("span", "no reason given", class_="bad")
        rows.append([tag("code", key), _value(s.value), _value(s.default), reason])
    if not rows:
        return note("Every value is the default.")
    words = "Values that differ from the default or that were explained; all others are defaults."
    return join([note(words), table(["key", "value", "default", "reason"], rows)])


def _value(value: Any) -> Html:
    words = ", ".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)
    return tag("code", tidy(words) or '""')


def lineage(view: View) -> Html:
    """Every run of the plan with what it came from and what it took."""
    rows = []
    for stage in view.stages:
        rows.append(_lineage_row(stage.name, stage.seen, {}))
        if stage.evals_seen:
            rows.append(_lineage_row(f"evals-{stage.name}", stage.evals_seen, stage.evals or {}))
    columns = ["stage", "run (stage-fingerprint) and parents", "data (SHA-256)", "commit", "dtype", "cost", "incidents"]
    return table(columns, rows, "dense")


def _lineage_row(name: str, seen: Seen, evals: dict[str, Any]) -> list[Any]:
    this = seen.run or seen.partial
    manifest = this.manifest if this else {}
    where = [tag("code", place(seen.planned.path), class_="tight")]
    where += [tag("span", f"{role}: {parent}", class_="where tight") for role, parent in seen.planned.parents.items()]
    data = [join([tidy(path), tag("code", sha[:12])], " ") for path, sha in seen.planned.data.items()]
    dtype = manifest.get("dtype") or evals.get("dtype", "")
    reason = manifest.get("dtype_reason") or evals.get("dtype_reason", "")
    kind = lines([str(dtype).removeprefix("torch."), tag("span", tidy(reason), class_="where roomy")]) if dtype else "-"
    numbers = [*cost(seen), f"resumed {manifest.get('resumed', 0)}×"]
    spent = tag("span", lines(numbers), class_="tight") if seen.run else tag("span", seen.status, class_="off")
    incidents = lines(map(_incident, manifest.get("incidents", []))) or "none"
    return [name, lines(where), lines(data) or "-", commit(manifest) if manifest else "-", kind, spent, incidents]


def _incident(entry: dict[str, Any]) -> str:
    details = ", ".join(f"{k} {v}" for k, v in entry.items() if k not in ("time", "kind"))
    return tidy(f"{entry.get('time', '')} {entry.get('kind', '')}: {details}")


SECTIONS: dict[str, tuple[str, Callable[[View], Html]]] = {
    "first": ("What each stage says", first),
    "truth": ("Truthfulness by stage", truth),
    "frontier": ("Truth against voice", frontier),
    "baselines": ("What style alone would score", baselines),
    "differences": ("Paired differences", differences),
    "topics": ("By topic", topics),
    "measures": ("Every measure", measures),
    "curves": ("Training curves", curves),
    "flips": ("Questions that changed", flips),
    "constitution": ("Rows of the constitution", constitution),
    "whys": ("Reasons", whys),
    "lineage": ("Lineage", lineage),
}
