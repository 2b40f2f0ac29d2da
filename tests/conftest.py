"""Fixtures that tests share. Nothing here needs a network, and everything runs on one thread."""

from __future__ import annotations

import os

os.environ |= {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

from pathlib import Path
from typing import Any

import pytest
import torch
from fault_lab import SFT, STEPS
from hypothesis import settings
from lab import PARENTS, ROOT, Lab, furnish, sharpen

from truthward import models
from truthward.branches import attend_by_tree
from truthward.ledger import Run
from truthward.tracking import read_metrics

torch.set_num_threads(1)
settings.register_profile("plain", deadline=None, derandomize=True, database=None, max_examples=50)
settings.load_profile("plain")


@pytest.fixture
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths of recipes and data are read from the repository's root."""
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="session")
def tiny() -> tuple[Any, Any]:
    """The tiny random model as the recipe ``tiny-random`` gives it, and its tokenizer. Not to be changed."""
    model, tokenizer = models.fetch_base(models.TINY, seed=0)
    return attend_by_tree(model.eval()).requires_grad_(False), tokenizer


@pytest.fixture(scope="session")
def sharp() -> tuple[Any, Any]:
    """The same with larger weights (see :func:`lab.sharpen`), so that a fault in masks shows. Not to be changed."""
    model, tokenizer = models.fetch_base(models.TINY, seed=0)
    return attend_by_tree(sharpen(model, tokenizer.eos_token_id)).requires_grad_(False), tokenizer


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A world in which base, sft, constitution, reward and dpo have run once."""
    home: Path = tmp_path_factory.mktemp("lab")
    made = furnish(home)
    for stage in PARENTS:
        made.run(stage)
    return made


@pytest.fixture(scope="session")
def undisturbed(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """SFT of :mod:`fault_lab` without a fault."""
    run = lab.copy(tmp_path_factory.mktemp("undisturbed") / "runs").run("sft", *SFT)
    assert run.manifest["incidents"] == []
    assert [row["step"] for row in read_metrics(run)] == list(range(1, STEPS + 1))
    return run


@pytest.fixture
def copy(lab: Lab, tmp_path: Path) -> Lab:
    """The lab with its runs in a folder of this test's own."""
    return lab.copy(tmp_path / "runs")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
