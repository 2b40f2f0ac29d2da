"""Reasons that say something, and what a run puts on record of its data and its recipe."""

from __future__ import annotations

import pytest

from truthward import provenance
from truthward.reasons import links, says_nothing


@pytest.mark.parametrize(
    "reason", ["test", "Try it.", "because", "just because we want it", "the learning rate", "x", "0.1"]
)
def test_a_reason_that_says_nothing_is_told_from_one_that_does(reason):
    assert says_nothing(reason, "sft.learning_rate")


@pytest.mark.parametrize(
    "reason", ["few rows", "see #12", "as in dpo-1f2e", "docs/log.md", "1e-4 moved the loss too little"]
)
def test_a_reason_may_be_short_or_point_to_evidence(reason):
    assert not says_nothing(reason, "sft.learning_rate")


def test_links_are_found_in_a_reason():
    text = "ppo-81c2 drifted (#12, docs/log.md), https://example.org/a; not well-fed or 0.05"
    assert links(text) == ["ppo-81c2", "#12", "docs/log.md", "https://example.org/a"]


def test_a_recipe_outside_a_repository_has_no_authors(tmp_path):
    (tmp_path / "r.toml").write_text('[why]\nseed = "x"\n')
    assert provenance.authors(tmp_path / "r.toml") == {}


def test_the_nearest_source_counts(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/a.jsonl").write_text("{}\n\n{}\n")
    lines = '[[source]]\npath = "."\nlicence = "A"\n[[source]]\npath = "deep"\nlicence = "B"\n'
    (tmp_path / provenance.SOURCES).write_text(lines)
    assert provenance.sources([str(tmp_path / "deep")])[str(tmp_path / "deep")]["licence"] == "B"
    assert provenance.sources([str(tmp_path / "deep/a.jsonl")])[str(tmp_path / "deep/a.jsonl")]["rows"] == 2


def test_too_much_data_is_not_kept(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text("x" * 100)
    assert provenance.keepable(tmp_path) == [tmp_path / "a.jsonl"]
    monkeypatch.setattr(provenance, "KEPT_MB", 50 / 2**20)
    assert provenance.keepable(tmp_path) == []
