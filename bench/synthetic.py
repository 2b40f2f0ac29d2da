"""PPO on a task with known truth: does it climb gold, how far may it be pushed against a proxy, does the sampler matter?

``python bench/synthetic.py [--quick] [--seeds 5] [--workers 2] [--plot docs/overoptimisation.svg]``. Prints tables and
writes the plot of docs/overoptimisation.md. The seed is the unit of every interval.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from synthetic_task import Curve, build, climb, opened, pool

from truthward.stats import Interval

ESTIMATORS = {"PPO (GAE)": "gae", "RLOO": "rloo", "GRPO": "grpo", "Dr. GRPO": "dr_grpo"}
SAMPLERS = ("exact", "bfloat16", "int8")
LABELS = {"few": 200, "more": 1000}
FREE = (
    "ppo.kl_coef=0.0",
    "ppo.learning_rate=3e-3",
    "ppo.iterations=30",
)  # no KL penalty, small steps: the whole way out is seen
Points = tuple[np.ndarray, np.ndarray]  # sqrt(KL) and gold's gain over the first model
Fitting = Callable[[np.ndarray, np.ndarray], tuple[float, float, float]]
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}  # 0.975, by freedom


# --------------------------------------------------------------------------------------------------------------- runs


class Job(NamedTuple):
    """One run: what it is called, its seed, its overrides, on how many labels its proxy rests, and how large its pool is."""

    name: str
    seed: int
    overrides: tuple[str, ...]
    labels: int = 0
    answers: int = 0


class Result(NamedTuple):
    """A run's curve, the proxy's accuracy on pairs in gold's order, proxy and gold scores of the pool; seconds."""

    curve: Curve
    accuracy: float
    pool: tuple[list[float], list[float]]
    seconds: float


def work(home: Path, job: Job) -> Result:
    """Do one run, silently."""
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), opened(home, job.seed, *job.overrides, labels=job.labels) as ppo:
        accuracy = math.nan
        drawn: tuple[list[float], list[float]] = ([], [])
        if job.labels:
            accuracy = ppo.run.parent("reward").manifest["metrics"]["validation_accuracy"]["mean"]
            drawn = pool(ppo, job.answers)
        return Result(climb(ppo), accuracy, drawn, time.perf_counter() - start)


def do(jobs: list[Job], workers: int, steps: int) -> dict[str, list[Result]]:
    """All runs, each on one thread, by name and in the order of their seeds; the first model is taught ``steps`` steps."""
    results: dict[str, list[Result]] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        build(Path(folder), steps=steps)
        run: Callable[..., Any] = map
        if workers > 1:
            context = multiprocessing.get_context("spawn")
            run = stack.enter_context(ProcessPoolExecutor(workers, mp_context=context)).map
        for job, result in zip(jobs, run(work, [Path(folder)] * len(jobs), jobs), strict=True):
            results.setdefault(job.name, []).append(result)
    return results


def plan(seeds: int, quick: bool) -> list[Job]:
    """The runs of the whole study, or of a small one that shows that it works."""
    short = ("ppo.iterations=3", "ppo.rollouts=16", "ppo.micro_batch_size=8", "reward.epochs=1") if quick else ()
    answers = 512 if quick else 4096
    jobs = []
    for seed in range(seeds):
        jobs += [Job(name, seed, (f"ppo.advantage={kind}", *short)) for name, kind in ESTIMATORS.items()]
        jobs += [Job(f"sampler {kind}", seed, (f"ppo.sampler={kind}", *short)) for kind in SAMPLERS[1:]]
        jobs += [
            Job(name, seed, (*FREE, *short), labels // 10 if quick else labels, answers) for name, labels in LABELS.items()
        ]
    return jobs


# ---------------------------------------------------------------------------------------------------------- statistics


def t_interval(values: Sequence[float]) -> Interval:
    """Mean with Student's 95 % interval; 2 to 10 values (a bootstrap of five values would be too narrow)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan, len(values))
    half = STUDENT[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half, len(values))


def end(curve: Curve) -> float:
    """Mean gold of the last fifth of a run."""
    return statistics.fmean(curve.gold[-max(1, len(curve.gold) // 5) :])


def kl_best_of(n: int) -> float:
    """KL(best of n || policy) in nats, ``log n - (n-1)/n`` (Stiennon et al. 2020, arXiv 2009.01325, appendix G.3)."""
    return math.log(n) - (n - 1) / n


def best_of(proxy: Sequence[float], truth: Sequence[float], n: int) -> float:
    """Expected truth of the proxy's best of n over all subsets of a pool (Nakano et al. 2021, 2112.09332, appendix I).

    The i-th lowest of N is the best of ``C(i-1, n-1)`` of the ``C(N, n)`` subsets.
    """
    ordered = np.asarray(truth)[np.argsort(proxy, kind="stable")]
    count = len(ordered)
    choose = lambda top, k: math.lgamma(top + 1) - math.lgamma(k + 1) - math.lgamma(top - k + 1)  # noqa: E731
    weights = [math.exp(choose(i - 1, n - 1) - choose(count, n)) if i >= n else 0.0 for i in range(1, count + 1)]
    return float(np.dot(weights, ordered))


class Fit(NamedTuple):
    """Coefficients of ``d (a - b f(d))``, d = sqrt(KL), and the d at which it is highest; each (value, low, high)."""

    a: tuple[float, float, float]
    b: tuple[float, float, float]
    peak: tuple[float, float, float]


def fit_bon(d: np.ndarray, gain: np.ndarray) -> tuple[float, float, float]:
    """Least squares of ``R(d) = d (a - b d)`` (Gao et al. 2023, arXiv 2210.10760, section 1): a, b and the peak a / 2b."""
    (a, b), *_ = np.linalg.lstsq(np.stack([d, -(d**2)], 1), gain, rcond=None)
    return float(a), float(b), float(a / (2 * b)) if b > 0 else math.inf


def fit_rl(d: np.ndarray, gain: np.ndarray) -> tuple[float, float, float]:
    """Least squares of ``R(d) = d (a - b log d)`` (the same paper): a, b and the peak exp(a/b - 1)."""
    (a, b), *_ = np.linalg.lstsq(np.stack([d, -d * np.log(d)], 1), gain, rcond=None)
    return float(a), float(b), math.exp(min(a / b - 1, 99)) if b > 0 else math.inf


def fitted(points: list[Points], fit: Fitting) -> Fit:
    """A fit to all seeds' points with percentile intervals over :func:`redrawn`."""
    whole = fit(*(np.concatenate(axis) for axis in zip(*points, strict=True)))
    low, high = np.percentile(redrawn(points, fit), [2.5, 97.5], axis=0, method="nearest")
    return Fit(*zip(whole, low.tolist(), high.tolist(), strict=True))


def redrawn(points: list[Points], fit: Fitting, draws: int = 2000) -> np.ndarray:
    """The fit to each of so many draws of whole seeds, ``[draws, 3]``."""
    draw, found = np.random.default_rng(0), []
    for _ in range(draws):
        chosen = [points[i] for i in draw.integers(0, len(points), len(points))]
        found.append(fit(*(np.concatenate(axis) for axis in zip(*chosen, strict=True))))
    return np.array(found)


def bon_points(result: Result) -> Points:
    """sqrt(KL) and gold's gain over the first model, of best-of-n for n = 2, 4, ... up to an eighth of the pool."""
    proxy, truth = result.pool
    sizes = [2**k for k in range(1, int(math.log2(len(truth) / 4)) + 1)]
    base = statistics.fmean(truth)
    return np.sqrt([kl_best_of(n) for n in sizes]), np.array([best_of(proxy, truth, n) - base for n in sizes])


def rl_points(result: Result) -> Points:
    """sqrt(KL) and gold's gain over the first model at each iteration of PPO."""
    kl = np.maximum(result.curve.kl, 1e-6)  # the estimate of a KL near 0 can be negative
    return np.sqrt(kl), np.array(result.curve.gold) - statistics.fmean(result.pool[1])


def rise(result: Result) -> float:
    """How far the proxy's score went up in a run, in standard deviations of its scores of the first model's answers."""
    return (statistics.fmean(result.curve.proxy[-3:]) - result.curve.proxy[0]) / statistics.pstdev(result.pool[0])


def falls(results: list[Result]) -> list[float]:
    """Gold at the end less gold where the mean of the *other* seeds was highest: choosing and measuring stay apart."""
    curves = np.array([r.curve.gold for r in results])
    smooth = np.apply_along_axis(lambda c: np.convolve(c, np.ones(3) / 3, mode="same"), 1, curves)[:, 1:-1]
    others = (smooth.sum(0) - smooth) if len(results) > 1 else smooth
    return [end(r.curve) - s[o.argmax()] for r, s, o in zip(results, smooth, others, strict=True)]


# -------------------------------------------------------------------------------------------------------------- tables


def tables(results: dict[str, list[Result]]) -> str:
    """What the study found, as text."""
    lines = ["against gold: its mean in the first iteration, and in the last fifth of them; 95 % t intervals over seeds"]
    for name in ESTIMATORS:
        runs = results[name]
        gain = t_interval([end(r.curve) - r.curve.gold[0] for r in runs])
        first, last = t_interval([r.curve.gold[0] for r in runs]), t_interval([end(r.curve) for r in runs])
        kl, seconds = statistics.fmean(r.curve.kl[-1] for r in runs), statistics.median(r.seconds for r in runs)
        lines.append(
            f"  {name:10} {first.mean:.3f} -> {last}  gain {gain.signed()}  KL {kl:.1f} nats  {seconds:.0f} s a run"
        )
    lines.append("samplers, differences to exact: gold at the end, and mean gold over the run")
    exact = results["PPO (GAE)"]
    for kind in SAMPLERS[1:]:
        pairs = list(zip(results[f"sampler {kind}"], exact, strict=True))
        ends = t_interval([end(a.curve) - end(b.curve) for a, b in pairs])
        areas = t_interval([statistics.fmean(a.curve.gold) - statistics.fmean(b.curve.gold) for a, b in pairs])
        lines.append(f"  {kind:10} end {ends.signed()}  mean {areas.signed()}")
    lines.append("against a proxy: fits of gold's gain to sqrt(KL), bootstrapped over seeds")
    for name, labels in LABELS.items():
        runs = results[name]
        correlation = t_interval([statistics.correlation(*r.pool) for r in runs])
        lines.append(f"  {labels} labels: accuracy {t_interval([r.accuracy for r in runs])}, correlation {correlation}")
        best, ppo = fitted([bon_points(r) for r in runs], fit_bon), fitted([rl_points(r) for r in runs], fit_rl)
        for what, fit in (("best-of-n", best), ("PPO", ppo)):
            numbers = "  ".join(f"{k} {v:.3f} [{low:.3f}, {high:.3f}]" for k, (v, low, high) in fit._asdict().items())
            lines.append(f"    {what:10} {numbers}")
        rose = t_interval([rise(r) for r in runs])
        largest = t_interval([float(bon_points(r)[1][-1]) for r in runs])
        final = t_interval([end(r.curve) - statistics.fmean(r.pool[1]) for r in runs])
        lines.append(f"    gain of the best of the largest n {largest.signed()}; PPO's at its end {final.signed()}")
        lines.append(
            f"    PPO's end less its peak {t_interval(falls(runs)).signed()}; the proxy rose {rose.signed()} deviations"
        )
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------- plot


def draw(results: dict[str, list[Result]], path: Path) -> None:
    """Three panels: gold climbed by each estimator, best-of-n and PPO against both proxies; bands are over seeds, 95 %."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {
            "svg.hashsalt": "truthward",
            "svg.fonttype": "none",
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.9), layout="constrained")
    for name in ESTIMATORS:
        curves = np.array([r.curve.gold for r in results[name]])
        bands = [t_interval(column) for column in curves.T.tolist()]
        x = np.arange(1, len(bands) + 1)
        (line,) = left.plot(x, [b.mean for b in bands], label=name)
        left.fill_between(x, [b.low for b in bands], [b.high for b in bands], alpha=0.12, color=line.get_color(), lw=0)
    left.set(title="Gold is the reward", xlabel="iteration (64 answers each)", ylabel="gold, mean of the answers")
    panels = ((middle, "Best of n by the proxy", bon_points, fit_bon), (right, "PPO against the proxy", rl_points, fit_rl))
    for axes, title, points, fit in panels:
        for (name, labels), colour in zip(LABELS.items(), ("tab:red", "tab:blue"), strict=True):
            runs = [points(r) for r in results[name]]
            d, gain = (np.concatenate(axis) for axis in zip(*runs, strict=True))
            a, b, _ = fit(d, gain)
            x = np.linspace(0.05, d.max(), 40)
            bend = x if fit is fit_bon else np.log(x)
            band = np.percentile([x * (a - b * bend) for a, b, _ in redrawn(runs, fit, 500)], [2.5, 97.5], axis=0)
            axes.scatter(d, gain, s=5, alpha=0.25, color=colour, lw=0)
            axes.fill_between(x, *band, alpha=0.12, color=colour, lw=0)
            axes.plot(x, x * (a - b * bend), color=colour, label=f"{labels} labels, fit")
            axes.plot(*np.mean(runs, axis=0), color=colour, ls=":", marker=".", ms=4, label="mean over seeds")
        axes.axhline(0, color="grey", lw=0.6)
        axes.set(title=title, xlabel="sqrt(KL from the first model), sqrt(nats)", ylabel="gold, gain over the first model")
    for axes in (left, middle, right):
        axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> str:
    """Run the study; returns its tables."""
    parser = argparse.ArgumentParser(description="PPO on a task with known truth")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it works")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--plot", type=Path, default=Path("docs/overoptimisation.svg"))
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    results = do(plan(options.seeds, options.quick), options.workers, steps=50 if options.quick else 300)
    draw(results, options.plot)
    return f"{tables(results)}\n{(time.perf_counter() - start) / 60:.1f} minutes; plot in {options.plot}"


if __name__ == "__main__":
    print(main())
