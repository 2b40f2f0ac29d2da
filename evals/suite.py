"""All sets together: every question of every set goes through the model in one stream of batches, then is graded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from evals import facts, fluency, language, listening, situations, truth
from evals.asking import Exam, Metric, Scored, Sums, Values
from evals.truth import Style
from truthward.banks import read_bank
from truthward.console import progress
from truthward.recipe import banked, most_of, sets_of
from truthward.records import Prompt, Question, draw, read_rows
from truthward.resampling import Array, draw_weights, interval_of
from truthward.score import answer_sums
from truthward.tables import Recipe


def exams(style: Style) -> dict[str, Exam]:
    """Every set by name; ``style`` is the judge by words alone that the truth set needs."""
    return {
        "truth": truth.truth(style),
        "short": listening.SHORT,
        "instructions": listening.INSTRUCTIONS,
        "fluency": fluency.FLUENCY,
        "forms": truth.FORMS,
        "open": truth.OPEN,
        "sycophancy": facts.SYCOPHANCY,
        "calibration": facts.CALIBRATION,
        "unknown": situations.UNKNOWN,
        "bias": situations.BIAS,
        "grounded": situations.GROUNDED,
        "persona": language.PERSONA,
        "skills": facts.SKILLS,
        "text": language.TEXT,
    }


def questions(recipe: Recipe, stage: str) -> dict[str, list[Any]]:
    """The rows of every set on which a stage's model is measured, by set; at most ``evals.most`` of each."""
    rows = {name: read_bank(recipe, name) for name in banked(sets_of(recipe, stage))}
    most = {name: most_of(recipe, name) for name in rows}
    return {name: draw(r, most[name], recipe.seed) if most[name] else r for name, r in rows.items()}


def known_texts(recipe: Recipe) -> Iterator[str]:
    """All that the evals' banks and the data beside them hold in words, the same at every stage of a recipe."""
    table = recipe.evals
    rows = [row for name in ("truth", *banked(table.sets)) for row in read_bank(recipe, name)]
    rows += [*read_rows(table.style_bank, Question), *read_rows(table.first_questions, Prompt)]
    for row in rows:
        yield row.model_dump_json()


def score_model(
    model: Any, tokenizer: Any, rows: Mapping[str, list[Any]], by_name: Mapping[str, Exam], tokens_a_batch: int
) -> list[Scored]:
    """Ask a model every question and grade what it finds likely."""
    asked = [(name, row, ask) for name, some in rows.items() for row in some for ask in by_name[name].ask(row)]
    items = [ask.item(tokenizer) for _, _, ask in asked]
    with progress() as bar:
        task = bar.add_task("evals", total=len(items))
        scores = answer_sums(model, items, tokens_a_batch=tokens_a_batch, tick=lambda n: bar.advance(task, n))
    sums = iter(scores)
    return [
        grade_row(name, row, by_name[name], [next(sums) for _ in by_name[name].ask(row)])
        for name, some in rows.items()
        for row in some
    ]


def grade_row(name: str, row: Any, exam: Exam, sums: Sums) -> Scored:
    """A row's values from the log-probabilities of all its answers."""
    first = exam.ask(row)[0].answers
    return Scored(name, row.id, row.topic, exam.grade(row, sums), first[int(np.argmax(sums[0]))])


def judged(name: str, rows: Sequence[Any], exam: Exam, judge: Style) -> list[Scored]:
    """The same rows answered by a judge that sees the answers alone, never the question."""
    return [grade_row(name, row, exam, [[judge(a) for a in ask.answers] for ask in exam.ask(row)]) for row in rows]


# ----------------------------------------------------------------------------------------------------------- metrics


def columns_of(metric: Metric, rows: Sequence[Values]) -> list[Array]:
    """What a metric needs of the items' values; nan where an item has none."""
    return [np.array([np.nan if r.get(c) is None else r[c] for r in rows], dtype=float) for c in metric.columns]


def resampled(scored: Sequence[Scored], exam: Exam, resamples: int, seed: int) -> Array:
    """``[resamples, n]`` weights of a set's items; those of one row are drawn together."""
    rows = [exam.drawn_with(s.id) for s in scored]
    topics = dict(zip(rows, (s.topic for s in scored), strict=True))
    place = {row: k for k, row in enumerate(topics)}
    weights = draw_weights(list(topics.values()), resamples, seed, fixed_topics=exam.fixed_topics)
    return weights[:, [place[row] for row in rows]]


def measure(
    scored: Sequence[Scored], by_name: Mapping[str, Exam], resamples: int, seed: int
) -> dict[str, dict[str, Any] | None]:
    """Every metric of every set with its interval, by ``set.metric``; None where no item has what it needs."""
    found: dict[str, dict[str, Any] | None] = {}
    for name in dict.fromkeys(s.set for s in scored):
        own = [s for s in scored if s.set == name]
        weights = resampled(own, by_name[name], resamples, seed)
        for key, metric in by_name[name].metrics.items():
            interval = interval_of(metric.statistic, weights, columns_of(metric, [s.values for s in own]))
            found[f"{name}.{key}"] = interval.as_dict() if interval else None
    return found


def means(scored: Sequence[Scored], exam: Exam, name: str) -> dict[str, float]:
    """Metrics without intervals, as baselines have them."""
    found: dict[str, float] = {}
    for key, metric in exam.metrics.items():
        value = metric.statistic(np.ones((1, len(scored))), *columns_of(metric, [s.values for s in scored]))[0]
        found |= {} if np.isnan(value) else {f"{name}.{key}": round(float(value), 4)}
    return found
