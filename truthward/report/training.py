"""How training went: curves of every trained stage, and where PPO's time goes."""

from __future__ import annotations

from statistics import median
from typing import Any

from truthward.report.page import Html, figure, join, note, table, tag
from truthward.report.plots import curve_plot
from truthward.report.view import View
from truthward.tracking import read_metrics

CURVES = {
    "sft": (["loss"], "Cross-entropy of the answers' tokens, nats a token."),
    "distill": (
        ["loss", "shift"],
        "Nats a token on the model's own answers. Loss: KL from the target, what the parent says with its principles counted"
        " in, to the model without them. Shift: the same KL to the parent, where the loss starts.",
    ),
    "reward": (
        ["loss", "accuracy", "margin"],
        "On the pairs of each step: loss, share whose chosen answer scores higher, and by how much.",
    ),
    "dpo": (
        ["loss", "rewards/accuracies", "rewards/margins"],
        "Loss starts at ln 2 = 0.693. Implicit rewards are beta times the log-ratio to the parent; accuracy is the share of"
        " pairs whose chosen answer has the higher one.",
    ),
    "ppo": (
        ["score/normalised", "kl/k3", "entropy", "answers/tokens", "value/explained", "sampler_gap"],
        "By iteration: score of the answers in units of the first iteration's spread, KL to the reference a token, entropy"
        " a token, length in tokens, the share of the returns' variance that the critic explains, and the mean gap between"
        " the sampler's log-probabilities and those of training, to stay near 0. docs/ppo.md says how to read them.",
    ),
}
PARTS = {"rollout": "sampling answers", "score": "rewards, log-probabilities, values", "update": "passes of minibatches"}


def curves(view: View) -> Html:
    """Training curves of every trained stage that is complete."""
    parts: list[Html] = []
    for stage in view.stages:
        if stage.name not in CURVES:
            continue
        keys, words = CURVES[stage.name]
        rows = read_metrics(stage.seen.run) if stage.seen.run else []
        svg = curve_plot(rows, keys, f"curve-{stage.name}")
        parts.append(tag("h3", stage.name))
        empty = "no metrics were recorded" if stage.seen.run else stage.state
        parts.append(figure(svg, words) if svg else note(f"No curves: {empty}."))
        parts.append(_time(rows))
    return join(parts)


def _time(rows: list[dict[str, Any]]) -> Html:
    """What each part of an iteration takes, and how near it comes to the machine's own matrix products."""
    wanted = [f"{kind}/{part}" for kind in ("seconds", "gemm_share") for part in PARTS]
    timed = [row for row in rows if all(isinstance(row.get(key), int | float) for key in wanted)]
    if not timed:
        return Html("")
    middle = {part: median(row[f"seconds/{part}"] for row in timed) for part in PARTS}
    shares = {part: median(row[f"gemm_share/{part}"] for row in timed) for part in PARTS}
    whole = sum(middle.values()) or 1.0
    columns = ["part of an iteration", "what", "seconds (median)", "share of the time", "share of matrix-product speed"]
    body = [
        [part, what, f"{middle[part]:.1f}", f"{middle[part] / whole:.0%}", f"{shares[part]:.0%}"]
        for part, what in PARTS.items()
    ]
    words = "The last column counts matrix products alone, against the speed that was measured on the machine at the start."
    return join([table(columns, body), note(words)])
