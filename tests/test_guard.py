"""The guard's formulas with worked numbers, its rules, and what it decides from rows of metrics."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from truthward.errors import TrainingFault
from truthward.guard import rules
from truthward.guard.detectors import paired_change, repeated_share, robust_z
from truthward.guard.watch import Guard
from truthward.ledger import Run
from truthward.recipe import guard_settings
from truthward.report.plots import curve_plot
from truthward.report.training import incidents_table, marks
from truthward.tables import Guard as Table
from truthward.tables import Recipe

# ------------------------------------------------------------------------------------------------------------ formulas


def test_robust_z_of_worked_numbers():
    """Level 5 without slope, distances 0 1 1 95 1 1 0 with median 1; the last five are 6 in the middle."""
    score = robust_z(11, [5, 4, 6, 100, 6, 4, 5])
    assert (score.expected, score.spread) == (6, 1)
    assert score.z == pytest.approx(0.6745 * 5)


def test_a_fall_is_no_spread():
    """On the line 10, 9, 8, 7, 6 nothing deviates: the spread is a twentieth of the median 8."""
    score = robust_z(12, [10, 9, 8, 7, 6])
    assert (score.expected, score.spread) == (8, pytest.approx(0.4))
    assert score.z == pytest.approx(0.6745 * 4 / 0.4)


def test_a_rise_goes_on():
    """On the line 6, 7, 8, 9, 10 the next is 11: it is what is expected."""
    assert robust_z(11, [6, 7, 8, 9, 10]).z == 0
    assert robust_z(12, [6, 7, 8, 9, 10]).expected == 11


def test_the_spread_of_normal_values_is_their_deviation():
    values = torch.distributions.Normal(3, 2).icdf(torch.linspace(0.005, 0.995, 101))
    values = values[torch.randperm(101, generator=torch.Generator().manual_seed(0))].tolist()
    assert robust_z(9, values).spread / 0.6745 == pytest.approx(2, abs=0.2)


def test_a_constant_history_has_a_spread_of_a_twentieth():
    assert robust_z(2.2, [2.0] * 9).z == pytest.approx(0.6745 * 0.2 / 0.1)
    assert robust_z(2.2, [2.0]).z == pytest.approx(0.6745 * 0.2 / 0.1)
    assert robust_z(0.0, [0.0] * 9).z == 0


@given(st.lists(st.floats(0.1, 1e3), min_size=1, max_size=20), st.floats(-1e3, 1e3), st.floats(0.01, 100))
def test_robust_z_does_not_depend_on_the_unit(history, value, unit):
    z = robust_z(value, history).z
    assert robust_z(value * unit, [x * unit for x in history]).z == pytest.approx(z, rel=1e-6, abs=1e-6)


def test_repeated_share_of_worked_numbers():
    """abcdabcd has five 4-grams, of which the last stood there before; ababababab seven of two kinds."""
    assert repeated_share("abcdabcd") == pytest.approx(1 / 5)
    assert repeated_share("ababababab") == pytest.approx(5 / 7)
    assert repeated_share("abcdefgh") == repeated_share("abcd") == repeated_share("") == 0


def test_paired_change_of_worked_numbers():
    """Differences -0.1, -0.3, -0.2: mean -0.2, deviation 0.1, error 0.1 / sqrt(3)."""
    change = paired_change([0.5, 0.6, 0.7], [0.4, 0.3, 0.5])
    assert change == pytest.approx((-0.2, 0.1 / math.sqrt(3)))


# --------------------------------------------------------------------------------------------------------------- rules

QUIET = {  # a PPO iteration in which nothing is wrong
    "entropy": 2.0,
    "answers/repeated": 0.1,
    "kl/k1": 0.1,
    "answers/tokens": 10.0,
    "score/length_correlation": 0.1,
    "score/normalised": 0.0,
    "value/explained": 0.2,
    "sampler_gap": 0.01,
    "loss/value": 1.0,
    "grad_norm": 1.0,
    "skipped": 0,
    "steps": 4,
}
TRUTH = {"probe/truth": 0.4, "probe/change": -0.1, "probe/error": 0.03}
FINDINGS = {  # what must be found, what must not, and how often until something is done
    "entropy collapse": ({"entropy": 0.59}, {"entropy": 0.61}, 3, "rolled back"),
    "repetition": ({"answers/repeated": 0.41}, {"answers/repeated": 0.39}, 3, "rolled back"),
    "KL runaway": ({"kl/k1": 1.01}, {"kl/k1": 0.99}, 3, "rolled back"),
    "length explosion": ({"answers/tokens": 20.1}, {"answers/tokens": 19.9}, 3, "rolled back"),
    "paid for length": (
        {"answers/tokens": 13.1, "score/length_correlation": 0.81},
        {"answers/tokens": 12.9, "score/length_correlation": 0.81},
        3,
        "stopped",
    ),
    "less true": (
        {"score/normalised": 0.8, **TRUTH},
        {"score/normalised": 0.8, **TRUTH, "probe/error": 0.034},
        1,
        "stopped",
    ),
    "sampler drift": ({"sampler_gap": 0.21}, {"sampler_gap": 0.19}, 3, "stopped"),
    "critic explains nothing": ({"value/explained": 0.0}, {"value/explained": 0.01}, 10, None),
    "not finite": ({"skipped": 3}, {"skipped": 2}, 1, "rolled back"),
    "spike of grad_norm": ({"grad_norm": 1.75}, {"grad_norm": 1.74}, 3, "rolled back"),  # 10 * 0.05 / 0.6745 over 1
    "spike of loss/value": ({"loss/value": 1.75}, {"loss/value": 1.74}, 3, "rolled back"),
}


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path)


def watching(run: Run, kinds=rules.PPO, calm: int = 12, **table) -> Guard:
    """A guard that has seen some quiet rows."""
    guard = Guard(Table(**table), run, kinds)
    for step in range(1, calm + 1):
        row = QUIET if kinds is rules.PPO else {"loss": 1.0, "grad_norm": 1.0}
        assert guard.observe({"step": step, **row}) is None
    assert run.manifest.get("incidents", []) == []
    return guard


def test_every_rule_of_ppo_is_tried_here():
    assert {rule.kind for rule in rules.PPO} == set(FINDINGS)


@pytest.mark.parametrize("kind", FINDINGS)
def test_a_finding_is_acted_upon_and_what_is_just_allowed_is_not(run, kind):
    wrong, allowed, times, act = FINDINGS[kind]
    guard = watching(run)
    for step in range(13, 13 + times):
        assert guard.observe({"step": step, **QUIET, **allowed}) is None
    assert guard.run.manifest.get("incidents", []) == []
    guard = watching(run)
    acts = [guard.observe({"step": step, **QUIET, **wrong}) for step in range(13, 13 + times)]
    assert acts == [None] * (times - 1) + [act]
    last = run.manifest["incidents"][-1]
    assert (last["kind"], last["step"], last["action"]) == (kind, 12 + times, act or "noted")
    assert last["metric"] in (*wrong, "grad_norm")
    assert guard.calm is (act is None)


def test_a_score_that_does_not_rise_is_no_hacking(run):
    """Truth may fall for other reasons; then the KL and the evals speak."""
    guard = watching(run)
    assert guard.observe({"step": 13, **QUIET, **TRUTH, "score/normalised": 0.1}) is None


def test_what_is_at_first_is_not_judged_by_itself(run):
    """With a single iteration nothing is known about the spread of what follows."""
    guard = Guard(Table(), run, rules.PPO)
    acts = [guard.observe({"step": s, **QUIET, "entropy": e}) for s, e in enumerate((2.0, 0.1, 2.0), 1)]
    assert acts == [None] * 3
    assert run.manifest.get("incidents", []) == []


@pytest.mark.parametrize("steps", [1, 9])
def test_spikes_are_not_looked_for_before_the_warm_up_is_over(run, steps):
    guard = watching(run, rules.TRAINER, calm=steps)
    assert guard.observe({"step": steps + 1, "loss": 50.0, "grad_norm": 1.0}) is None
    assert guard.calm


def test_a_fall_is_no_spike(run):
    guard = watching(run, rules.TRAINER)
    assert guard.observe({"step": 13, "loss": 0.0, "grad_norm": 0.0}) is None
    assert guard.calm


# ------------------------------------------------------------------------------------------------------------- decisions

SPIKE = {"loss": 9.0, "grad_norm": 1.0}
CALM = {"loss": 1.0, "grad_norm": 1.0}


def observe(guard: Guard, start: int, *rows: dict) -> list:
    return [guard.observe({"step": start + k, **row}) for k, row in enumerate(rows)]


def test_single_spikes_are_noted_and_leave_no_trace_in_what_is_normal(run):
    guard = watching(run, rules.TRAINER)
    assert observe(guard, 13, SPIKE, SPIKE, CALM, SPIKE) == [None] * 4
    assert [(i["step"], i["action"]) for i in run.manifest["incidents"]] == [(13, "noted"), (16, "noted")]
    assert all(row["loss"] == 1.0 for row in guard.past.recent)


def test_evidence_is_in_the_record(run):
    guard = watching(run, rules.TRAINER)
    observe(guard, 13, SPIKE)
    (entry,) = json.loads((run.path / "manifest.json").read_text())["incidents"]
    evidence = {
        "metric": "loss",
        "value": 9.0,
        "expected": 1.0,
        "spread": 0.05,
        "z": round(0.6745 * 8 / 0.05, 1),
        "most": 10.0,
    }
    assert evidence.items() <= entry.items()


def test_going_back_lowers_the_rate_and_has_an_end(run):
    guard = watching(run, rules.TRAINER, rollbacks=2, rate_factor=0.5)
    rates = [guard.rate]
    for start in (13, 40):
        assert observe(guard, start, SPIKE, SPIKE, SPIKE)[-1] == "rolled back"
        guard.rebuild([{"step": step, **CALM} for step in range(start - 12, start)])
        rates.append(guard.rate)
    assert rates == [1.0, 0.5, 0.25]
    assert observe(guard, 60, SPIKE, SPIKE, SPIKE)[-1] == "stopped"
    fault = guard.fault()
    assert isinstance(fault, TrainingFault)
    assert "spike of loss at step 62" in str(fault)


def test_after_going_back_batches_that_still_spike_are_left_out(run):
    """The first time they are trained on; then it was not the rate. A spike elsewhere is treated as the first was."""
    guard = watching(run, rules.TRAINER, skips=5)
    assert not guard.refuses({"step": 13, **SPIKE})
    assert observe(guard, 13, SPIKE, SPIKE, SPIKE)[-1] == "rolled back"  # at step 15
    guard.rebuild([{"step": step, **CALM} for step in range(1, 13)])
    assert not guard.refuses({"step": 13, **CALM})
    for step in range(13, 17):  # 16 follows in one go
        assert guard.refuses({"step": step, **SPIKE})
        assert guard.observe({"step": step, **SPIKE}) is None
    assert guard.observe({"step": 17, **CALM}) is None
    assert not guard.refuses({"step": 18, **SPIKE})
    skipped = [i["step"] for i in run.manifest["incidents"] if i["action"] == "skipped"]
    assert skipped == [13, 14, 15, 16]


def test_leaving_out_has_an_end(run):
    guard = watching(run, rules.TRAINER, skips=5)
    observe(guard, 13, SPIKE, SPIKE, SPIKE)
    guard.rebuild([{"step": step, **CALM} for step in range(1, 13)])
    assert observe(guard, 13, *[SPIKE] * 5) == [None] * 4 + ["rolled back"]


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_what_is_not_finite_is_left_out_from_the_start(run, value):
    guard = watching(run, rules.TRAINER, calm=1)
    bad = {"loss": 0.0, "grad_norm": value}
    assert guard.refuses({"step": 2, **bad})
    assert guard.observe({"step": 2, **bad}) is None
    assert not guard.refuses({"step": 3, **CALM})
    assert [(i["kind"], i["action"], i["value"]) for i in run.manifest["incidents"]] == [
        ("not finite", "skipped", str(value))
    ]


def test_a_run_that_goes_on_decides_as_one_that_was_never_killed(run, tmp_path):
    """At every step: rows up to there lived through again, the rest seen; the same actions, the same record."""
    rows = [CALM] * 12 + [SPIKE, CALM] + [CALM] * 3 + [SPIKE] * 2 + [CALM] * 2 + [SPIKE] * 3
    rows = [{"step": step, **row} for step, row in enumerate(rows, 1)]
    whole = Guard(Table(), run, rules.TRAINER)
    acts = [whole.observe(row) for row in rows]
    assert acts[-1] == "rolled back"
    for kill in range(1, len(rows)):
        folder = tmp_path / str(kill)
        folder.mkdir()
        first = Guard(Table(), Run(folder), rules.TRAINER)
        seen = [first.observe(row) for row in rows[:kill]]
        checkpoint = max(k for k in range(kill) if k == 0 or rows[k - 1]["loss"] == 1.0)
        written = folder / "manifest.json"
        manifest = json.loads(written.read_text()) if written.exists() else {}
        again = Guard(Table(), Run(folder, manifest), rules.TRAINER)
        again.rebuild(rows[:checkpoint])
        assert seen[:checkpoint] + [again.observe(row) for row in rows[checkpoint:]] == acts
        assert without_times(again.run) == without_times(run)


def without_times(run: Run) -> list[dict]:
    return [{k: v for k, v in entry.items() if k != "time"} for entry in run.manifest["incidents"]]


def test_the_guard_is_part_of_a_fingerprint_but_for_when_a_step_hangs():
    ppo, sft = (guard_settings(Recipe(), stage).keys() for stage in ("ppo", "sft"))
    assert ppo == Table.model_fields.keys() - {"why", "hang_factor", "hang_seconds"}
    assert sft == {"spike", "window", "warmup", "patience", "skips", "rollbacks", "rate_factor"}


def test_incidents_become_marks_at_their_step():
    entries = [
        {"kind": "spike of loss", "step": 5, "metric": "loss", "value": 3.0},
        {"kind": "not finite", "step": 7, "metric": "grad_norm", "value": "nan"},
        {"kind": "hung", "step": 9},
    ]
    assert marks(entries) == [(5, "1", "loss", 3.0), (7, "2", "grad_norm", None), (9, "3", "", None)]


def test_incidents_stand_on_the_curve_and_in_the_table():
    entries = [
        {"time": "T", "kind": "spike of loss", "step": 5, "action": "noted", "metric": "loss", "value": 3.0, "z": 20.1},
        {"time": "T", "kind": "not finite", "step": 5, "action": "skipped", "metric": "grad_norm", "value": "nan"},
        {"time": "T", "kind": "hung", "step": 9, "action": "stopped", "stacks": "<b>"},
    ]
    plain = [{"step": step, "loss": 1.0, "grad_norm": 1.0} for step in range(1, 20)]
    without = curve_plot(plain, ["loss", "grad_norm"], "x")
    svg = curve_plot(plain, ["loss", "grad_norm"], "x", marks(entries))
    assert svg.count(">1-2</text>") == svg.count(">3</text>") == 2  # in both panels
    assert ">1-2</text>" not in without
    page = incidents_table(entries)
    assert page.count("<tr>") == 4
    assert "z 20.1" in page
    assert "<b>" not in page
