"""wandb, offline: a run that is found there leads back to its manifest."""

from __future__ import annotations

from truthward.ledger import Run
from truthward.tables import Recipe
from truthward.tracking import tracked


def test_what_is_found_in_wandb_leads_back_to_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    run = Run(tmp_path / "small" / "sft-0123456789")
    recipe = Recipe(name="small", why={"seed": "as in the paper"})
    manifest = {"stage": "sft", "status": "running", "fingerprint": "0123456789", "parents": {"model": "base-abc"}}
    run.record(**manifest, recipe=recipe.model_dump(mode="json"), authors={"seed": {"by": "Ada Example"}})
    with tracked(recipe, run) as tracker:
        tracker.log(1, {"loss": 2.0})
        run.finish(metrics={"first_loss": 2.125, "accuracy": {"mean": 0.8125, "n": 4}})
    assert "warning" not in capsys.readouterr().out
    (file,) = run.path.rglob("*.wandb")
    written = file.read_bytes()  # records of protobuf, whose strings stand as they are
    for config in (b'"small/sft-0123456789"', b"as in the paper", b"Ada Example"):
        assert config in written
    for summary in (b"first_loss", b"2.125", b"accuracy/mean", b"0.8125"):
        assert summary in written
    for artifact in (b"manifest.json", b'{"model":"base-abc"}'):
        assert artifact in written
