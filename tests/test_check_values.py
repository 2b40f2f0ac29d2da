"""Mistakes in the values of a recipe, each planted alone."""

import json

import pytest
from check_lab import Planted, assert_found, facts, find, ids, rows

from truthward.check.ranges import RANGES, names
from truthward.check.training import PEAKS, SIZES, highest_rate

pytestmark = pytest.mark.usefixtures("at_root")


def deepspeed(**config):
    def change(folder):
        (folder / "zero.json").write_text(json.dumps(config))
        return [f"launch.deepspeed={folder / 'zero.json'}"]

    return change


def no_json(folder):
    (folder / "zero.json").write_text("{'stage': 2}")
    return [f"launch.deepspeed={folder / 'zero.json'}"]


def no_labels(folder):
    row = {"id": "x", "principle": "none-of-ours", "prompt": "Why?", "better": "So.", "worse": "Because."}
    return rows("judge.bank", [row])(folder)


GROUPS = ['ppo.advantage="rloo"', "ppo.group_size=4"]
TRAINING = [
    Planted("rate-high", "warning", "sft.learning_rate", "LoRA on 135M", ["sft.learning_rate=0.03"]),
    Planted("rate-high", "error", "sft.learning_rate", "times the highest", ["sft.learning_rate=0.2"]),
    Planted(
        "rate-high",
        "error",
        "dpo.learning_rate",
        "all weights",
        ['dpo.tune="full"', 'ppo.parent="sft"', "dpo.learning_rate=0.006"],
    ),
    Planted("rate-high", "warning", "dpo.learning_rate", "8,030M", ["dpo.learning_rate=1e-3"], "cluster-8b"),
    Planted("rate-high", "warning", "reward.learning_rate", "usual", ["reward.learning_rate=1e-2"]),
    Planted("rate-high", "warning", "ppo.learning_rate", "usual", ["ppo.learning_rate=3e-4"]),
    Planted("rate-high", "error", "ppo.value_learning_rate", "usual", ["ppo.value_learning_rate=0.1"]),
    Planted("rate-low", "warning", "dpo.learning_rate", "LoRA needs", ["dpo.learning_rate=5e-7"]),
    Planted("warmup-long", "warning", "sft.warmup_ratio", "50%", ["sft.warmup_ratio=0.5"]),
    Planted("warmup-long", "error", "dpo.warmup_ratio", "95%", ["dpo.warmup_ratio=0.95"]),
    Planted("run-short", "warning", "sft.data", "optimizer step", ["sft.batch_size=16"]),
    Planted("run-short", "warning", "reward.preferences", "optimizer step", ["reward.batch_size=80"]),
    Planted("rows-too-few", "error", "dpo.preferences", "do not fill", ["dpo.max_prompts=3"]),
    Planted("rows-dropped", "warning", "dpo.batch_size", "left out", ["dpo.max_prompts=31", "dpo.micro_batch_size=8"]),
    Planted(
        "step-partial",
        "warning",
        "reward.batch_size",
        "1 of 8 micro-batches",
        ["reward.batch_size=32", "reward.max_prompts=36"],
    ),
    Planted("accumulation-deep", "warning", "dpo.batch_size", "gathers", ["dpo.batch_size=100", "dpo.micro_batch_size=1"]),
    Planted("epochs-many", "warning", "dpo.epochs", "passes", ["dpo.epochs=8.0"]),
    Planted("epochs-many", "warning", "sft.epochs", "by heart", ["sft.epochs=20.0"]),
    Planted("lora-scale", "warning", "sft.lora_alpha", "alpha / rank = 16", ["sft.lora_alpha=256"]),
    Planted("lora-scale", "warning", "dpo.lora_alpha", "alpha / rank = 0.0625", ["dpo.lora_alpha=1"]),
    Planted("lora-rank-high", "warning", "sft.lora_rank", "576 wide", ["sft.lora_rank=512", "sft.lora_alpha=512"]),
    Planted(
        "checkpoint-none",
        "warning",
        "dpo.checkpoint_every",
        "starts over",
        ["dpo.epochs=3.0", "dpo.checkpoint_every=1000"],
    ),
    Planted("checkpoint-often", "warning", "dpo.checkpoint_every", "moments", ["dpo.epochs=3.0", "dpo.checkpoint_every=1"]),
    Planted("no-effect", "warning", "sft.lora_rank", "no adapter", ['sft.tune="full"', "sft.lora_rank=8"]),
    Planted("no-effect", "warning", "sft.micro_batch_size", "packed", ["sft.micro_batch_size=2"]),
    Planted("no-effect", "warning", "ppo.gae_lambda", "no critic", [*GROUPS, "ppo.gae_lambda=0.9"]),
    Planted("no-effect", "warning", "ppo.kl_horizon", "kl_target is 0", ["ppo.kl_horizon=500"]),
    Planted(
        "no-effect",
        "warning",
        "ppo.truncation_penalty",
        "mask",
        ['ppo.truncation="mask"', "ppo.truncation_penalty=2.0"],
    ),
    Planted("no-effect", "warning", "ppo.score_clip", "0 or 1", ["ppo.hard_rewards=true", "ppo.score_clip=3.0"]),
    Planted("no-effect", "warning", "ppo.tis_cap", "exact", ["ppo.tis_cap=3.0"]),
    Planted(
        "no-effect",
        "warning",
        "constitution.shots",
        "no revisions",
        ['constitution.ways=["samples"]', "constitution.shots=2"],
    ),
]
OUT_OF_RANGE = [
    Planted("max-grad-norm-low", "warning", "sft.max_grad_norm", "same length", ["sft.max_grad_norm=0.001"]),
    Planted("max-grad-norm-high", "warning", "ppo.max_grad_norm", "clipped", ["ppo.max_grad_norm=1000.0"]),
    Planted("weight-decay-high", "warning", "dpo.weight_decay", "decay", ["dpo.weight_decay=0.5"]),
    Planted("beta-low", "warning", "dpo.beta", "degenerate", ["dpo.beta=0.005"]),
    Planted("beta-high", "error", "dpo.beta", "firmly", ["dpo.beta=20.0"]),
    Planted("sft-coef-high", "warning", "dpo.sft_coef", "imitation", ["dpo.sft_coef=5.0"]),
    Planted("center-coef-high", "warning", "reward.center_coef", "ranking", ["reward.center_coef=1.0"]),
    Planted("kl-coef-high", "warning", "ppo.kl_coef", "stays where it is", ["ppo.kl_coef=1.0"]),
    Planted("kl-target-high", "warning", "ppo.kl_target", "nats", ["ppo.kl_target=100.0"]),
    Planted("target-kl-low", "warning", "ppo.target_kl", "first step", ["ppo.target_kl=1e-5"]),
    Planted("target-kl-high", "warning", "ppo.target_kl", "no pass", ["ppo.target_kl=10.0"]),
    Planted("clip-range-low", "warning", "ppo.clip_range", "clipped", ["ppo.clip_range=0.001"]),
    Planted("clip-range-high", "error", "ppo.clip_range", "double", ["ppo.clip_range=0.9"]),
    Planted("value-clip-range-low", "warning", "ppo.value_clip_range", "critic", ["ppo.value_clip_range=0.001"]),
    Planted("value-clip-range-high", "warning", "ppo.value_clip_range", "critic", ["ppo.value_clip_range=100.0"]),
    Planted("gae-lambda-low", "error", "ppo.gae_lambda", "earned", ["ppo.gae_lambda=0.1"]),
    Planted("temperature-low", "warning", "ppo.temperature", "alike", ["ppo.temperature=0.2"]),
    Planted("temperature-high", "warning", "constitution.temperature", "salad", ["constitution.temperature=1.6"]),
    Planted("epochs-high", "warning", "ppo.epochs", "older policy", ["ppo.epochs=20"]),
    Planted("entropy-coef-high", "warning", "ppo.entropy_coef", "noise", ["ppo.entropy_coef=0.5"]),
    Planted(
        "ptx-coef-high",
        "warning",
        "ppo.ptx_coef",
        "outweigh",
        ["ppo.ptx_coef=100.0", 'ppo.ptx_data=["data/demonstrations.jsonl"]'],
    ),
    Planted("value-coef-low", "warning", "ppo.value_coef", "norm", ["ppo.value_coef=1e-6"]),
    Planted("value-coef-high", "warning", "ppo.value_coef", "all of it", ["ppo.value_coef=50.0"]),
    Planted("min-confidence-high", "warning", "constitution.min_confidence", "rows", ["constitution.min_confidence=0.99"]),
    Planted("clamp-high", "warning", "judge.clamp", "nothing", ["judge.clamp=0.4"]),
    Planted("resamples-low", "warning", "evals.resamples", "p-values", ["evals.resamples=100"]),
    Planted("alpha-low", "warning", "distill.alpha", "parent", ["distill.alpha=0.0", 'stages=["base","sft","distill"]']),
    Planted(
        "alpha-high", "warning", "distill.alpha", "likes most", ["distill.alpha=64.0", 'stages=["base","sft","distill"]']
    ),
]
POLICY = [
    Planted("kl-none", "warning", "ppo.kl_coef", "proxy", ["ppo.kl_coef=0.0"]),
    Planted("kl-horizon-short", "warning", "ppo.kl_horizon", "noise", ["ppo.kl_target=6.0", "ppo.kl_horizon=64"]),
    Planted("groups-alike", "error", "ppo.temperature", "same answer", [*GROUPS, "ppo.temperature=0.1"]),
    Planted(
        "groups-alike", "warning", "ppo.hard_rewards", "0 or 1", [GROUPS[0], "ppo.group_size=2", "ppo.hard_rewards=true"]
    ),
    Planted("groups-one-prompt", "warning", "ppo.group_size", "one prompt", [GROUPS[0], "ppo.group_size=32"]),
    Planted("discount-short", "warning", "ppo.gamma", "18%", ["ppo.gamma=0.99", "ppo.max_new_tokens=170"]),
    Planted("tis-off", "warning", "ppo.tis_cap", "int8", ['ppo.sampler="int8"', "ppo.tis_cap=0.0"]),
    Planted("tis-biased", "error", "ppo.tis_cap", "agree", ['ppo.sampler="int8"', "ppo.tis_cap=0.5"]),
    Planted("weights-zero", "error", "ppo.reward_weights", "nothing is optimised", ["ppo.reward_weights=[0.0]"]),
    Planted("weight-negative", "warning", "ppo.reward_weights", "sign", ["ppo.reward_weights=[-1.0]"]),
    Planted("score-clip-tight", "warning", "ppo.score_clip", "spreads", ["ppo.score_clip=0.2"]),
    Planted("truncation-free", "warning", "ppo.truncation_penalty", "for ever", ["ppo.truncation_penalty=0.0"]),
    Planted("critic-untrained", "error", "ppo.value_coef", "weight 0", ["ppo.value_coef=0.0"]),
    Planted("minibatch-small", "warning", "ppo.minibatches", "about 4 answers", ["ppo.minibatches=8"]),
    Planted("prompts-few", "warning", "ppo.prompts", "240 prompts", ["ppo.rollouts=512"]),
    Planted("prompts-few", "warning", "ppo.iterations", "not the behaviour", ["ppo.iterations=500"]),
    Planted("iterations-few", "note", "ppo.iterations", "512 answers", ["ppo.iterations=1"], "cluster-8b"),
    Planted("answers-cut", "warning", "ppo.max_new_tokens", "cut", ["ppo.max_new_tokens=8"]),
    Planted("answers-cut", "warning", "constitution.max_new_tokens", "nine in ten", ["constitution.max_new_tokens=8"]),
]
PIPELINE = [
    Planted("reason-missing", "error", "recipes/laptop.toml", "ppo.kl_coef", ["ppo.kl_coef=0.1"]),
    Planted("constitution-unreadable", "error", "nowhere.toml", "", ['constitution.principles=["nowhere.toml"]']),
    Planted("revisions-none", "error", "constitution.rounds", "no round", ["constitution.rounds=0"]),
    Planted(
        "labels-none",
        "error",
        "constitution.min_confidence",
        "no pair",
        ["constitution.min_confidence=0.8", "judge.clamp=0.25"],
    ),
    Planted("shots-many", "warning", "constitution.shots", "examples", ["constitution.shots=500"]),
    Planted("judge-unlabelled", "error", "judge.bank", "labelled pair", no_labels),
    Planted("judge-pairs-few", "warning", "judge.pairs", "chance", ["judge.pairs=5"]),
    Planted(
        "judge-key",
        "error",
        "judge.key_env",
        "NO_SUCH_KEY",
        [
            'judge.base_url="http://localhost:1/v1"',
            'judge.model="m"',
            'judge.methods=["choice"]',
            'judge.key_env="NO_SUCH_KEY"',
        ],
    ),
    Planted(
        "principle-unknown",
        "error",
        "distill.use",
        "did you mean truth-over-flattery",
        ['distill.use=["truth-over-flatery"]', 'stages=["base","sft","distill"]'],
    ),
    Planted("principle-unknown", "error", "reward.without", "no principle", ['reward.without=["short-and-plane"]']),
    Planted("stage-unscored", "warning", "evals.models", "distill", ['stages=["base","sft","distill"]']),
    Planted("gate-off", "warning", "evals.gate", "less truthful", ['evals.gate="off"']),
    Planted(
        "gate-undecided", "warning", "evals.most", "skills", ['evals.gate={truth="block",skills="block"}', "evals.most=10"]
    ),
    Planted("margin-wide", "warning", "evals.margin", "0.2", ["evals.margin=0.2"]),
    Planted("style-bank-tested", "error", "evals.style_bank", "knowledge", ["evals.style_bank=data/truth/test"]),
    Planted("file-missing", "error", "evals.files.truthfulqa", "nowhere.csv", ['evals.files={truthfulqa="nowhere.csv"}']),
    Planted("deepspeed-unreadable", "error", "launch.deepspeed", "JSON", no_json),
    Planted("deepspeed-unreadable", "error", "launch.deepspeed", "nowhere.json", ["launch.deepspeed=nowhere.json"]),
    Planted(
        "deepspeed-differs",
        "error",
        "TMP/zero.json",
        "gradient_accumulation_steps = 4",
        deepspeed(gradient_accumulation_steps=4),
    ),
    Planted("deepspeed-differs", "error", "TMP/zero.json", "optimizer", deepspeed(optimizer={"type": "AdamW"})),
    Planted("deepspeed-differs", "error", "TMP/zero.json", "stage 3", deepspeed(zero_optimization={"stage": 3})),
    Planted("deepspeed-differs", "error", "TMP/zero.json", "fp16", deepspeed(fp16={"enabled": True})),
]
PLANTED = [*TRAINING, *OUT_OF_RANGE, *POLICY, *PIPELINE]


@pytest.mark.parametrize("planted", PLANTED, ids=ids(PLANTED))
def test_a_planted_value_is_found(planted, tmp_path):
    assert_found(planted, tmp_path)


def test_every_end_of_every_range_is_planted():
    assert {p.rule for p in OUT_OF_RANGE} == set(names(RANGES))


@pytest.mark.parametrize("stage", PEAKS)
def test_the_highest_rate_goes_through_its_two_sizes_and_falls_between_them(stage):
    small, large = PEAKS[stage]
    assert highest_rate(stage, int(SIZES[0]), "lora") == pytest.approx(small)
    assert highest_rate(stage, int(SIZES[1]), "lora") == pytest.approx(large)
    assert large < highest_rate(stage, 1_000_000_000, "lora") < small
    assert highest_rate(stage, int(SIZES[0]), "full") == pytest.approx(small / 10)


def test_rates_and_ranges_are_not_judged_on_a_model_for_tests():
    changes = ["sft.learning_rate=0.5", "dpo.beta=50.0"]
    assert find("rate-high", facts("tiny", changes)) == find("beta-high", facts("tiny", changes)) == []
