"""What each principle brought, by hand and on a real run; and what leaving one out does."""

import pytest

from reward import __main__ as reward
from truthward.console import console
from truthward.effects import difference, effects, show_effect
from truthward.errors import UserError
from truthward.ledger import Run
from truthward.records import Preference, Revision, by_prompt

INTERVAL = {"mean": 0.75, "low": 0.6, "high": 0.9, "n": 34}


def revision(principle: str, helped: bool) -> Revision:
    texts = dict.fromkeys(("prompt_id", "prompt", "answer", "critique", "revision", "model"), "x")
    numbers = {"principle_version": 1, "round": 1, "seed": 1, "score_before": 0.0, "score_after": 1.0}
    return Revision(**texts, **numbers, principle=principle, helped=helped)


def test_rows_are_counted_by_principle():
    worse = {**INTERVAL, "mean": 0.6}
    record = {
        "principles": {"a": {"contrast": {"accuracy": INTERVAL}, "likelihood": {"accuracy": worse}}, "b": {}},
        "chosen": {"a": "likelihood"},
    }
    made, learner = Run("made", {"judge": record}), Run("learner", {"metrics": {"principles": {"b": INTERVAL}}})
    revisions = [revision("a", True), revision("a", False), revision("b", False)]
    pairs = [Preference(prompt="q", chosen="x", rejected="y", principle=p) for p in (["a"], ["a", "b"])]
    a, b = effects(made, learner, revisions, pairs)
    assert a == ("a", 2, 1, 2, "likelihood", worse, None)
    assert b == ("b", 1, 0, 1, "", None, INTERVAL)


def test_the_difference_is_paired_by_hand():
    """Right on 3 of 4 against 1 of 4, a tie counting a half on one side: (1 + 0 + 1 - 0.5) / 4."""
    found = difference([1.0, 1.0, 2.0, -1.0], [-1.0, 0.5, -2.0, 0.0])
    assert (found.mean, found.n) == (0.375, 4)
    assert found.low <= 0.375 <= found.high


@pytest.mark.slow
def test_a_real_runs_effect_and_that_of_leaving_one_out(lab, tmp_path):
    """The second training leaves the principle's rows out, and is done once."""
    world = lab.copy(tmp_path / "runs")
    made = Run.load(next(world.runs.glob("*/constitution-*")))
    with console.capture() as captured:
        show_effect(str(made.path))
    assert "short-and-plain" in captured.get()
    before = set(made.path.parent.glob("reward-*"))
    for _ in range(2):
        with console.capture() as captured:
            show_effect(str(made.path), "short-and-plain")
        assert "accuracy with the rows of short-and-plain minus without" in captured.get()
    (new,) = set(made.path.parent.glob("reward-*")) - before
    assert Run.load(new).manifest["recipe"]["reward"]["without"] == ["short-and-plain"]
    with pytest.raises(UserError, match="no principle nobody"):
        show_effect(str(made.path), "nobody")


def test_what_is_no_finished_run_of_the_constitution_is_refused(lab):
    for stage in ("sft", "reward"):
        with pytest.raises(UserError, match="not a finished run of the constitution"):
            show_effect(str(next(lab.runs.glob(f"*/{stage}-*"))))


def test_rows_of_a_principle_that_is_left_out_are_not_trained_on(lab, monkeypatch):
    """Also where it is one of several by which a pair was judged."""
    seen = []
    monkeypatch.setattr(reward, "by_prompt", lambda rows: seen.extend(rows) or by_prompt(rows))
    pairs = [
        Preference(prompt=f"q{n}", chosen="x", rejected="y", principle=p)
        for n, p in enumerate((["a"], ["a", "b"], ["c"], []))
    ]
    monkeypatch.setattr(reward, "read_preferences", lambda *_, **__: pairs * 4)
    lab.run("reward", 'reward.without=["b"]', "reward.batch_size=2")
    assert {p.prompt for p in seen[:12]} == {"q0", "q2", "q3"}
