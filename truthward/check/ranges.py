"""Rules of one value each: what is usual for it, and what comes of more or less. ``docs/check.md`` gives the sources."""

from __future__ import annotations

import math
from typing import NamedTuple

from truthward.check.facts import Facts
from truthward.check.findings import Found, error, rule, warning

INF = math.inf


class Range(NamedTuple):
    """Where a value is usual, and beyond which it is an error.

    Attributes:
        key: stage and key.
        low, high: outside of these it is a warning.
        least, most: outside of these an error.
        below, above: what comes of it.
    """

    key: str
    low: float
    high: float
    below: str = ""
    above: str = ""
    least: float = -INF
    most: float = INF


RANGES = [
    *(
        Range(
            f"{stage}.max_grad_norm",
            0.01,
            100,
            "clipping at so little makes every step the same length, whatever the gradient",
            "nothing would ever be clipped, and one bad batch can undo the run",
        )
        for stage in ("sft", "distill", "reward", "dpo", "ppo")
    ),
    *(
        Range(f"{stage}.weight_decay", 0, 0.3, "", "decay pulls the weights to 0 faster than the data can hold them", most=2)
        for stage in ("sft", "distill", "reward", "dpo")
    ),
    Range(
        "dpo.beta",
        0.01,
        1,
        "the policy is hardly held to its reference: answers degenerate while the loss falls",
        "the policy is held to its reference so firmly that pairs move little",
        least=1e-3,
        most=10,
    ),
    Range("dpo.sft_coef", 0, 2, "", "imitation of the chosen answers outweighs the preference between them", most=20),
    Range("reward.center_coef", 0, 0.1, "", "pulling scores to 0 outweighs ranking them", most=10),
    Range(
        "ppo.kl_coef",
        0,
        0.5,
        "",
        "a token's KL costs more than its reward can bring: the policy stays where it is",
        most=10,
    ),
    Range(
        "ppo.kl_target",
        0,
        60,
        "",
        "so many nats an answer are past where gold scores turn down (docs/overoptimisation.md)",
    ),
    Range(
        "ppo.target_kl",
        0.001,
        1,
        "every pass is stopped after its first step",
        "no pass is ever stopped: the ratio's clip alone holds the update",
    ),
    Range(
        "ppo.clip_range",
        0.02,
        0.4,
        "nearly every token is clipped, so that nearly nothing is learned",
        "an update may more than double a token's probability before it is held",
        most=0.8,
    ),
    Range("ppo.value_clip_range", 0.02, 10, "the critic can hardly move in an iteration", "the critic is not held at all"),
    Range("ppo.gae_lambda", 0.8, INF, "the score at the end hardly reaches the tokens that earned it", least=0.3),
    Range("ppo.temperature", 0.5, 1.5, "samples are nearly alike: there is nothing to compare", "samples are word salad"),
    Range("ppo.epochs", 0, 8, "", "so many passes over the same rollout train on what an older policy did"),
    Range("ppo.entropy_coef", 0, 0.1, "", "the bonus for noise outweighs the reward", most=2),
    Range("ppo.ptx_coef", 0, 30, "", "demonstrations outweigh the reward"),
    Range("ppo.value_coef", 0.001, 10, "the critic takes no part in the common gradient norm", "the critic takes all of it"),
    Range(
        "constitution.temperature",
        0.2,
        1.3,
        "samples of one prompt are nearly alike: no pair differs enough to be judged",
        "answers, critiques and revisions are word salad",
    ),
    Range("constitution.min_confidence", 0, 0.95, "", "hardly any pair is so sure: there would be no rows"),
    Range("distill.temperature", 0.2, 1.3, "answers show little of what the model may say", "answers are word salad"),
    Range(
        "distill.alpha",
        0.5,
        16,
        "the target is the parent itself",
        "the target is the one word that the principle likes most",
    ),
    Range("judge.clamp", 0, 0.3, "", "labels are held so near to 0.5 that they say nothing"),
    Range("evals.resamples", 1000, INF, "p-values end at one over them, and intervals move from seed to seed"),
]


def names(ranges: list[Range]) -> list[str]:
    """Names of what these can find, as ``beta-low``."""
    lows = {_name(r.key, "low") for r in ranges if r.low > 0}
    return sorted(lows | {_name(r.key, "high") for r in ranges if r.high < INF})


def _name(key: str, end: str) -> str:
    return f"{key.partition('.')[2].replace('_', '-')}-{end}"


@rule(*names(RANGES))
def ranges(facts: Facts) -> Found:
    """Values outside of what is usual."""
    if facts.toy:
        return
    for key, low, high, below, above, least, most in RANGES:
        stage, _, name = key.partition(".")
        active = (
            stage == "evals" or stage in facts.recipe.stages or (stage == "judge" and "constitution" in facts.recipe.stages)
        )
        value = getattr(getattr(facts.recipe, stage), name)
        if not active or low <= value <= high or (name.startswith("value_") and facts.recipe.ppo.advantage != "gae"):
            continue
        usual = f"{low:g} or more" if high == INF else f"{high:g} or less" if low <= 0 else f"{low:g} to {high:g}"
        tell = warning if least <= value <= most else error
        end, why = ("low", below) if value < low else ("high", above)
        text = f"{value:g} is unusually {end}"
        yield tell(_name(key, end), key, text, why=why, fix=f"{usual} is usual")
