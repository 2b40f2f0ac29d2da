"""PPO climbs a reward that is known, and the bench's estimators and fits against worked numbers."""

import itertools
import json
import math
import statistics
import sys

import numpy as np
import pytest
import torch
from lab import ROOT

sys.path.insert(0, str(ROOT / "bench"))

import synthetic
import synthetic_task as task
from synthetic import ESTIMATORS, FREE, best_of, end, fit_bon, fit_rl, fitted, kl_best_of, t_interval


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The model that every run starts from, and what it is asked."""
    home = tmp_path_factory.mktemp("synthetic")
    task.build(home, steps=200)
    return home


def gains(world, kind: str, seeds: int, iterations: int) -> list[float]:
    """Gold at the end of a run less the mean of what the first model is taught to write, for each seed."""
    start = statistics.fmean(task.gold(task.strings(4096, seed=9)))
    found = []
    for seed in range(seeds):
        with task.opened(world, seed, f"ppo.advantage={kind}", f"ppo.iterations={iterations}") as ppo:
            found.append(end(task.climb(ppo)) - start)
    return found


# ------------------------------------------------------------------------------------------------------------ learning


@pytest.mark.parametrize("kind", ESTIMATORS.values())
def test_each_estimator_climbs_gold(world, kind):
    """Eight iterations of 64 answers: by more than 0.03, three standard errors of the mean that is measured."""
    assert gains(world, kind, seeds=1, iterations=8)[0] > 0.03


@pytest.mark.slow
@pytest.mark.parametrize("kind", ESTIMATORS.values())
def test_each_estimator_climbs_gold_on_every_seed(world, kind):
    """Five seeds, the seed as the unit: the 95 % interval of the gain lies above 0.05 (half a standard deviation)."""
    assert t_interval(gains(world, kind, seeds=5, iterations=12)).low > 0.05


@pytest.mark.slow
def test_a_weak_proxy_is_over_optimised(world):
    """The proxy goes on rising while gold falls from its peak, over three proxies of 200 labels each."""
    short = (*FREE, "ppo.iterations=20")
    results = [synthetic.work(world, synthetic.Job("few", seed, short, 200, 512)) for seed in range(3)]
    assert t_interval(synthetic.falls(results)).high < 0
    assert t_interval([synthetic.rise(r) for r in results]).low > 1


def test_the_study_runs(tmp_path):
    """A few steps of everything: every table has its rows, and there is a plot."""
    plot = tmp_path / "plot.svg"
    text = synthetic.main(["--quick", "--seeds=1", "--workers=1", f"--plot={plot}"])
    assert all(f"  {name}" in text for name in (*ESTIMATORS, *synthetic.SAMPLERS[1:]))
    assert "<svg" in plot.read_text()


# ---------------------------------------------------------------------------------------------------------- the task


@pytest.mark.parametrize(
    ("text", "sixteenths"),
    [("", 0), ("abc", 3), ("abz", 2), ("aab", 1.5), ("zz", -0.5), ("abcdefghijklm", 13), ("z" + "a" * 20, -6)],
)
def test_gold(text, sixteenths):
    """A new letter of a-m is worth 1, another new character 0, one that was there -1/2, and the 17th counts no more."""
    assert task.gold([text]) == [sixteenths / 16]


def test_labels_follow_gold_with_noise(tmp_path):
    """8/16 against 6.5/16 at temperature 0.05: the better one is preferred with probability sigmoid(1.875) = 0.867."""
    better, worse = "abcdefghz", "abcdefgzz"
    task.label(tmp_path / "pairs.jsonl", [better, worse] * 2000, 2000, seed=0)
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) == 2000
    assert statistics.fmean(row["chosen"] == better for row in rows) == pytest.approx(0.867, abs=0.025)


def test_gold_only_watches_a_run_against_a_proxy(world):
    """It has weight 0: the total that is trained on is the proxy's normalised score alone."""
    with task.opened(world, 0, "ppo.rollouts=8", "ppo.micro_batch_size=4", labels=16) as ppo:
        batch = ppo.rollout(lambda n: None)
        scores = ppo.score(batch)
        _, metrics = ppo.advantages(batch, scores)
    proxy, truth = (torch.tensor(column) for column in scores.scores)
    assert truth.std() > 0
    assert metrics["score/normalised"] == pytest.approx(((proxy - proxy.mean()) / proxy.std()).mean().item(), abs=1e-5)
    assert task.gold([task.chat.decode(ppo.tokenizer, ids) for ids in batch.answers]) == scores.scores[1]


# ------------------------------------------------------------------------------------------------------- the statistics


@pytest.mark.parametrize("n", [1, 2, 4, 7])
def test_best_of_n_is_the_mean_over_all_subsets(n):
    draw = np.random.default_rng(0)
    proxy, truth = draw.normal(size=7), draw.normal(size=7)
    subsets = itertools.combinations(range(7), n)
    assert best_of(proxy, truth, n) == pytest.approx(
        statistics.fmean(truth[max(s, key=lambda i: proxy[i])] for s in subsets)
    )


@pytest.mark.parametrize("n", [1, 2, 16])
def test_the_kl_of_best_of_n(n):
    """The best of n uniform numbers has density n u^(n-1): its KL from the uniform, by a sum over a fine grid."""
    u = (np.arange(200_000) + 0.5) / 200_000
    density = n * u ** (n - 1)
    assert kl_best_of(n) == pytest.approx((density * np.log(density)).mean(), abs=1e-4)


def test_fits_find_what_the_points_were_made_of():
    """Peaks where the derivatives vanish: a/2b = 0.6/0.4 and exp(a/b - 1) = e^2."""
    d = np.linspace(0.1, 3, 30)
    assert fit_bon(d, d * (0.6 - 0.2 * d)) == pytest.approx((0.6, 0.2, 1.5))
    assert fit_rl(d, d * (0.6 - 0.2 * np.log(d))) == pytest.approx((0.6, 0.2, math.exp(2)))
    assert fit_bon(d, d**2)[2] == math.inf


def test_a_fit_s_interval_is_over_seeds():
    """Two seeds with a = 1 and a = 3: the whole fit lies between, and the interval reaches both."""
    d = np.linspace(0.1, 3, 30)
    value, low, high = fitted([(d, d * (a - 0.2 * d)) for a in (1, 3)], fit_bon).a
    assert (value, low, high) == pytest.approx((2, 1, 3))


def test_a_rise_is_in_the_first_model_s_deviations():
    """From 1 to a mean of 6 over the last three, where the first model's scores are 0 and 4: (6 - 1) / 2."""
    curve = task.Curve([0.0] * 4, [1.0, 5.0, 6.0, 7.0], [0.0] * 4)
    assert synthetic.rise(synthetic.Result(curve, 0.5, ([0.0, 4.0], [0.0, 0.0]), 0.0)) == 2.5


def test_student_s_interval():
    """1, 2, 3: deviation 1, so 2 +- 4.303 / sqrt(3)."""
    found = t_interval([1.0, 2.0, 3.0])
    assert (found.mean, found.low, found.high, found.n) == pytest.approx((2, 2 - 2.4843, 2 + 2.4843, 3), abs=1e-4)


def test_a_fall_is_measured_where_others_peak():
    """Seed 0 peaks at 1, the other at 3; each is read at the other's peak, after a mean of three: 2 for 0, 3 for 1."""
    curves = [[0.0, 6, 0, 0, 6, 0, 0, 0, 0, 3], [0.0, 0, 0, 0, 9, 0, 0, 0, 0, 3]]
    results = [synthetic.Result(task.Curve(c, c, c), 0.5, ([], []), 0.0) for c in curves]
    assert synthetic.falls(results) == pytest.approx([1.5 - 2, 1.5 - 0])
