"""The report's section on truth against voice, from a ``frontier.json`` beside a model."""

import json
import re

import pytest
from test_report import ATTACK, _interval, furnish

from truthward.errors import UserError
from truthward.ledger import plan, write_json
from truthward.report import write_report
from truthward.report.frontier import _places, frontier
from truthward.report.view import gather

METRICS = ("truth.mc2", "truth.pairs", "short.right", "instructions.followed", "fluency.broken", "text.nats")


def value(*scales, **changed):
    points = [
        {
            "scale": s,
            "metrics": {m: _interval(k + s / 10, k + s / 10 - 0.05, k + s / 10 + 0.05) for k, m in enumerate(METRICS)},
        }
        for s in scales
    ]
    return {"model": "dpo-ab12", "parent": "sft-cd34", "split": "dev", "points": points, **changed}


@pytest.fixture
def recipe(tmp_path):
    return furnish(tmp_path)


def place(recipe, content, stage="sft"):
    write_json(plan(recipe)[stage].path / "frontier.json", content)
    return gather(recipe)


def test_without_the_file_there_is_no_section(recipe):
    assert frontier(gather(recipe)) == ""
    assert "Truth against voice" not in write_report(recipe).read_text(encoding="utf-8")
    assert frontier(place(recipe, value())) == ""


def test_it_stands_below_the_truth_scores(recipe):
    place(recipe, value(0, 1))
    text = write_report(recipe).read_text(encoding="utf-8")
    assert re.findall(r'<h2 id="([^"]*)"', text)[:4] == ["first", "truth", "frontier", "baselines"]
    ids = re.findall(r'\sid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    assert text.count("<svg") == 3


def test_every_point_has_a_row_in_order_of_scale_with_every_interval(recipe):
    section = frontier(place(recipe, value(1, 0.25, 0, 2)))
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", section, re.DOTALL)][1:]
    assert [row[0] for row in rows] == ["0 (parent)", "0.25", "1 (as trained)", "2"]
    assert rows[2][1:3] == ["0.100<br><small>[0.05, 0.15]</small>", "1.100<br><small>[1.05, 1.15]</small>"]
    assert [len(row) for row in rows] == [1 + len(METRICS)] * 4
    heads = ["scale", "MC2", "pairs", "short answers right", "instructions followed", "broken answers ↓", "nats a byte ↓"]
    assert re.findall(r"<th [^>]*>([^<]*)<", section) == heads
    assert "dpo-ab12 scores on the dev questions when its change from sft-cd34" in section
    assert "short answers right 4," in section


def test_the_plot_shows_truth_against_short_answers_with_a_label_a_point(recipe):
    section = frontier(place(recipe, value(0, 0.25, 1.5)))
    svg = section.partition("<svg")[2].partition("</svg>")[0]
    assert 'aria-label="pairs, MC2 against short answers right"' in svg
    assert len(re.findall(r">0\.25</text>", svg)) == 2
    points = _places(value(0, 0.25, 1.5)["points"], "truth.mc2")
    assert [(p.label, round(p.x["mean"], 3), round(p.y["mean"], 3)) for p in points] == [
        ("0", 2.0, 0.0),
        ("0.25", 2.025, 0.025),
        ("1.5", 2.15, 0.15),
    ]


def test_what_was_not_measured_is_a_dash_and_no_point(recipe):
    content = value(0, 1)
    del content["points"][1]["metrics"]["truth.mc2"]
    content["points"][0]["metrics"]["truth.pairs"] = content["points"][1]["metrics"]["truth.pairs"] = None
    section = frontier(place(recipe, content))
    assert section.count("<td>-</td>") == 1
    assert "pairs" not in re.findall(r"<th [^>]*>([^<]*)<", section)
    assert 'aria-label="MC2 against' in section
    for point in content["points"]:
        point["metrics"]["short.right"] = None
    section = frontier(place(recipe, content))
    assert "<svg" not in section
    assert "0 (parent)" in section


def test_other_metrics_and_texts_are_shown_escaped(recipe):
    content = value(0, split=ATTACK)
    content["points"][0]["metrics"][ATTACK] = _interval(0.5, 0.4, 0.6)
    section = frontier(place(recipe, content))
    assert "<script" not in section
    assert section.count("&lt;script&gt;") == 3


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "model: Field required"),
        (value(0, points=[{"scale": "x", "metrics": {}}]), "points.0.scale"),
        (value(0, points=[{"scale": 1, "metrics": {"truth.mc2": {"mean": 1}}}]), r"points.0.metrics.truth.mc2.low"),
        (value(0, model="../x"), "model: "),
    ],
)
def test_a_file_of_another_form_is_refused_by_its_key(recipe, content, words):
    with pytest.raises(UserError, match=rf"frontier\.json: (.|\n)*{words}"):
        frontier(place(recipe, content))


def test_a_file_that_is_cut_off_is_refused(recipe):
    view = place(recipe, value(0, 1))
    path = plan(recipe)["sft"].path / "frontier.json"
    path.write_text(json.dumps(value(0, 1))[:40])
    with pytest.raises(UserError, match=r"frontier\.json"):
        frontier(view)
