"""Rules on PPO: the KL, groups that cannot differ, discount, corrections, scores, lengths of answers."""

from __future__ import annotations

import json
import urllib.request
from http.client import HTTPException

from truthward.check.facts import Facts
from truthward.check.findings import Found, error, note, rule, warning
from truthward.records import Prompt

PATIENCE = 10  # seconds for a server's list of models
ENDS = 0.5  # share of the demonstrations' answers that must fit into max_new_tokens


@rule("kl-none", "kl-horizon-short")
def divergence(facts: Facts) -> Found:
    """What holds the policy to its reference."""
    for _, ppo in facts.uses("ppo"):
        if ppo.kl_coef == 0:
            why = "unheld, gold scores fall while the proxy's rise (docs/overoptimisation.md measures it)"
            fix = "0.02 to 0.1 is usual"
            yield warning("kl-none", "ppo.kl_coef", "nothing holds the policy to its reference", why=why, fix=fix)
        if ppo.kl_target and ppo.kl_horizon < 10 * ppo.rollouts:
            text = f"kl_coef may change by a fifth every {ppo.kl_horizon} answers, and an iteration has {ppo.rollouts}"
            why = "it would chase the noise of single iterations"
            fix = f"set it to {50 * ppo.rollouts} or more"
            yield warning("kl-horizon-short", "ppo.kl_horizon", text, why=why, fix=fix)


@rule("groups-alike", "groups-one-prompt")
def groups(facts: Facts) -> Found:
    """Groups of answers that cannot differ, or are too few to compare."""
    for _, ppo in facts.uses("ppo"):
        if ppo.advantage == "gae":
            continue
        count = ppo.rollouts // ppo.group_size
        if ppo.temperature <= 0.3:
            text = f"{ppo.group_size} answers to a prompt at temperature {ppo.temperature:g} are the same answer"
            why = f"{ppo.advantage} learns from differences within a group alone"
            yield error("groups-alike", "ppo.temperature", text, why=why, fix="0.7 to 1 is usual")
        elif ppo.hard_rewards and ppo.group_size == 2 and len(ppo.rewards) == 1:
            text = "two answers that score 0 or 1 are alike half of the time"
            why = "such a group teaches nothing, and the time for its answers is lost"
            yield warning("groups-alike", "ppo.hard_rewards", text, why=why, fix="set ppo.group_size = 4 or more")
        if count == 1 and not facts.toy:
            text = "all rollouts of an iteration answer one prompt"
            why = "the policy is pulled to one prompt at a time"
            fix = "raise ppo.rollouts or lower ppo.group_size"
            yield warning("groups-one-prompt", "ppo.group_size", text, why=why, fix=fix)


@rule("discount-short")
def discount(facts: Facts) -> Found:
    """Whether a score at the end of an answer reaches its first token."""
    for _, ppo in facts.uses("ppo"):
        left = ppo.gamma**ppo.max_new_tokens
        if ppo.advantage == "gae" and left < 0.5:
            text = f"gamma {ppo.gamma:g} leaves {left:.0%} of the score for the first of {ppo.max_new_tokens} tokens"
            why = "the beginning of an answer, where it turns true or false, would hardly be trained"
            yield warning("discount-short", "ppo.gamma", text, why=why, fix="1 is usual for answers")


@rule("tis-off", "tis-biased")
def correction(facts: Facts) -> Found:
    """The correction for a sampler that is not the trainer."""
    for _, ppo in facts.uses("ppo"):
        if ppo.sampler != "exact" and ppo.tis_cap == 0:
            text = f"answers are sampled in {ppo.sampler} and nothing corrects for the difference"
            why = (
                "the update would be about another policy than the one that answered; int8 was off by up to 1.8 nats a token"
            )
            yield warning("tis-off", "ppo.tis_cap", text, why=why, fix="2 is usual")
        if 0 < ppo.tis_cap < 1:
            text = f"a cap of {ppo.tis_cap:g} takes weight from tokens on which sampler and trainer agree"
            why = "at agreement the weight is 1"
            yield error("tis-biased", "ppo.tis_cap", text, why=why, fix="2 is usual")


@rule("weights-zero", "weight-negative", "score-clip-tight", "truncation-free", "critic-untrained")
def scores(facts: Facts) -> Found:
    """What becomes of the scores."""
    for _, ppo in facts.uses("ppo"):
        weights = ppo.reward_weights
        if weights and not any(weights):
            text = "every reward has weight 0"
            yield error("weights-zero", "ppo.reward_weights", text, why="nothing is optimised", fix="give one a weight")
        for name, weight in zip(ppo.rewards, weights, strict=False):
            if weight < 0:
                text = f"{name} has weight {weight:g}"
                why = "what it scores high is made rare: right for a penalty, a wrong sign for anything else"
                yield warning("weight-negative", "ppo.reward_weights", text, why=why, fix="make sure that it is a penalty")
        if 0 < ppo.score_clip < 1:
            text = f"scores are held within {ppo.score_clip:g} of the first rollout's spreads"
            why = "a third and more of all answers score the same"
            yield warning("score-clip-tight", "ppo.score_clip", text, why=why, fix="3 to 5 is usual; 0 leaves them")
        if ppo.truncation == "penalty" and ppo.truncation_penalty == 0:
            text = "answers that do not end are scored as if they did"
            why = "the policy may learn to go on for ever"
            yield warning("truncation-free", "ppo.truncation_penalty", text, why=why, fix="1 is usual")
        if ppo.advantage == "gae" and ppo.value_coef == 0:
            text = "the critic's loss has weight 0"
            fix = 'the default is 0.1; or set ppo.advantage = "rloo"'
            yield error("critic-untrained", "ppo.value_coef", text, why="it would say 0 for ever", fix=fix)


@rule("minibatch-small", "prompts-few", "iterations-few")
def sizes(facts: Facts) -> Found:
    """How many answers a step is about, and how many prompts there are."""
    for _, ppo in facts.uses("ppo"):
        size, asked = ppo.rollouts // ppo.minibatches, ppo.rollouts // ppo.group_size
        prompts = len(facts.rows(ppo.prompts, Prompt))
        if size < 8 and not facts.toy:
            text = f"an optimizer step is about {size} answers"
            why = "the sign of a policy gradient over so few answers is nearly chance"
            yield warning("minibatch-small", "ppo.minibatches", text, why=why, fix="8 or more; lower ppo.minibatches")
        if 0 < prompts < asked:
            text = f"{prompts} prompts for {asked} questions an iteration"
            why = "an iteration asks the same prompt again and again, and the policy learns it by heart"
            yield warning("prompts-few", "ppo.prompts", text, why=why, fix="give more prompts, or lower ppo.rollouts")
        if prompts and ppo.iterations * asked > 50 * prompts:
            text = f"each of {prompts} prompts is asked {ppo.iterations * asked // prompts} times"
            why = "the policy learns the prompts, not the behaviour"
            yield warning("prompts-few", "ppo.iterations", text, why=why, fix="give more prompts, or fewer iterations")
        if ppo.iterations * ppo.rollouts < 1000 and not facts.toy:
            text = f"{ppo.iterations * ppo.rollouts} answers in all"
            why = "enough to see the score and the KL move, not to change a model"
            yield note("iterations-few", "ppo.iterations", text, why=why)


@rule("engine-silent")
def engine(facts: Facts) -> Found:
    """Whether the server that PPO samples from is there: asked before each start, and needed once PPO is what comes next."""
    for _, ppo in facts.uses("ppo"):
        if ppo.engine == "local" or not facts.launching:
            continue
        said = _models_of(ppo.engine_url)
        if said is not None:
            before = facts.recipe.stages[: facts.recipe.stages.index("ppo")]
            tell = error if all(facts.run(stage).done for stage in before) else warning
            fix = "start it, or see docs/engines.md; every rank asks it"
            yield tell("engine-silent", "ppo.engine_url", said, why="PPO's answers are sampled there", fix=fix)


def _models_of(url: str) -> str | None:
    """What is wrong with a server's list of models; None: nothing."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/models", timeout=PATIENCE) as answer:
            return None if json.load(answer)["data"] else f"{url} serves no model"
    except (OSError, ValueError, LookupError, TypeError, HTTPException) as fault:
        return f"{url}/models gives no list of models: {type(fault).__name__}: {fault}"


@rule("answers-cut")
def lengths(facts: Facts) -> Found:
    """Whether answers as long as the demonstrations' can end."""
    shown = [row.answers[0] for row in facts.texts.get("sft", [])]
    if facts.toy or not shown:
        return
    counts = facts.lengths(shown)
    for stage, table in facts.uses("constitution", "distill", "ppo"):
        long = sum(n + 1 > table.max_new_tokens for n in counts)
        if long > ENDS * len(counts):
            text = f"{long} of {len(counts)} demonstrated answers are longer than {table.max_new_tokens} tokens"
            why = "answers as the model was taught them would be cut, then punished or judged by their beginning"
            fix = f"raise it to {sorted(counts)[int(0.9 * len(counts))] + 1}, which holds nine in ten"
            yield warning("answers-cut", f"{stage}.max_new_tokens", text, why=why, fix=fix)
