"""The tables of a recipe: every key with its type, default, bounds and meaning; one class a table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

MODEL_STAGES = ("base", "sft", "distill", "dpo", "ppo")  # stages whose result is a chat model that the evals score
Stage = Literal["base", "sft", "distill", "constitution", "reward", "dpo", "ppo"]
ModelStage = Literal["base", "sft", "distill", "dpo", "ppo"]


class Table(BaseModel):
    """A table of the recipe; ``why`` holds the reason for each value that was set."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    why: dict[str, str] = Field(default={}, description="reason for each key of this table")


class Model(Table):
    base: str = Field("smollm2-135m-instruct", description="the wheel's model, a local folder, a hub id, or tiny-random")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="compute type; auto times both")
    threads: int = Field(0, ge=0, description="CPU threads; 0 takes all cores")


class Training(Table):
    """What every stage trained by a TRL trainer shares. Batch sizes count sequences (or pairs)."""

    parent: ModelStage = Field("sft", description="the stage whose model this one starts from")
    tune: Literal["lora", "full"] = Field("lora", description="train LoRA adapters, or every weight")
    lora_rank: int = Field(16, ge=1, description="rank of the LoRA matrices")
    lora_alpha: int = Field(32, ge=1, description="LoRA scale: delta W = alpha/rank * B A")
    learning_rate: float = Field(1e-4, gt=0, lt=1, description="peak learning rate of AdamW")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="decay after warm-up")
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="share of the steps that the rate climbs")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this global norm")
    epochs: float = Field(1.0, gt=0, description="passes over the data")
    batch_size: int = Field(16, ge=1, description="rows an optimizer step, over all ranks")
    micro_batch_size: int = Field(8, ge=1, description="rows a forward pass, on each rank")
    max_length: int = Field(512, ge=8, description="longest row in tokens; longer rows are an error, never cut")
    checkpoint_every: int = Field(20, ge=1, description="optimizer steps between checkpoints")


class Voice(Training):
    """What keeps a chat model's voice while it is trained: replay of its parent's own answers, and a part of the change.

    Answers to ordinary prompts are sampled from the parent once; SFT learns on them as on demonstrations, DPO is held to the
    parent's distribution over words at each of their tokens.
    """

    scale: float = Field(
        1.0, gt=0, le=1, description="share of the change of weights that is kept when the model is saved (WiSE-FT)"
    )
    replay: str = Field("", description="ordinary prompts (JSONL) whose answers by the parent are replayed; empty: none")
    replay_prompts: int = Field(320, ge=1, description="replay at most this many of them, drawn by seed")
    replay_tokens: int = Field(48, ge=1, description="longest replayed answer in tokens")
    replay_temperature: float = Field(0.7, ge=0, description="sampling temperature of the replayed answers")


class Sft(Voice):
    parent: ModelStage = "base"
    data: list[str] = Field(["data/demonstrations.jsonl"], min_length=1, description="demonstrations or revisions (JSONL)")
    packing: bool = Field(
        True, description="fill sequences of max_length with rows, attention kept apart; batch_size counts them"
    )


class Distill(Training):
    principles: list[str] = Field(["constitution/principles.toml"], min_length=1, description="the written constitution")
    use: list[str] = Field(["truth-over-flattery"], description="ids or tags of the principles that take part; all if empty")
    prompts: list[str] = Field(
        ["data/prompts.jsonl", "data/truth/train"], min_length=1, description="prompts (JSONL), or truth banks for questions"
    )
    max_prompts: int = Field(400, ge=1, description="use at most this many prompts, drawn by seed")
    samples: int = Field(1, ge=1, description="answers a prompt that the model learns on")
    max_new_tokens: int = Field(40, ge=1, description="longest answer in tokens")
    temperature: float = Field(0.7, gt=0, description="sampling temperature of the answers")
    alpha: float = Field(4.0, ge=0, description="weight of log p_follow - log p_violate in the target")
    cutoff: float = Field(
        0.0, ge=0, lt=1, description="words below this share of the likeliest one's probability keep theirs"
    )


class Constitution(Table):
    parent: ModelStage = Field("sft", description="the model that answers, criticises and revises")
    principles: list[str] = Field(["constitution/principles.toml"], min_length=1, description="the written constitution")
    prompts: list[str] = Field(["data/prompts.jsonl"], min_length=1, description="prompts to answer (JSONL)")
    max_prompts: int = Field(240, ge=1, description="use at most this many prompts, drawn by seed")
    ways: list[Literal["samples", "contrast", "revisions"]] = Field(
        ["samples", "revisions"],
        min_length=1,
        description="where pairs come from: best and worst sample, one told to keep and one to break a principle, revisions",
    )
    rounds: int = Field(1, ge=0, description="critique and revision rounds for each prompt")
    examples: str = Field("constitution/examples.toml", description="critiques and revisions that stand as examples")
    shots: int = Field(0, ge=0, description="examples shown before a critique or revision, drawn by seed")
    samples: int = Field(2, ge=2, description="answers a prompt, from which preference pairs are made")
    min_confidence: float = Field(0.6, ge=0.5, lt=1, description="pairs whose label is nearer to 0.5 are left out")
    max_new_tokens: int = Field(64, ge=1, description="longest generated text in tokens")
    temperature: float = Field(0.8, gt=0, description="sampling temperature of answers and revisions")
    batch_size: int = Field(32, ge=1, description="rows generated together")


class Server(Table):
    """An OpenAI-compatible endpoint, and how fast it may be asked."""

    base_url: str = Field("", description="its address, with /v1; empty: the judge runs in this process")
    key_env: str = Field(
        "OPENAI_API_KEY", description="environment variable that holds the key; empty: the server needs none"
    )
    timeout: float = Field(60.0, gt=0, description="seconds that the server may be silent before a request is retried")
    retries: int = Field(6, ge=0, description="further tries of a request after faults of the network or the server")
    requests_per_minute: float = Field(0.0, ge=0, description="most requests a minute, evenly spaced; 0: no limit")
    concurrency: int = Field(8, ge=1, description="requests under way at once")
    price_per_million_in: float = Field(0.0, ge=0, description="price of a million tokens read; only for the estimate")
    price_per_million_out: float = Field(0.0, ge=0, description="price of a million tokens written; only for the estimate")


class Judge(Server):
    """Who judges by the principles, and on which labelled pairs that must be earned."""

    model: str = Field("", description="empty: constitution.parent; a stage, a folder, a hub id, or the name on the server")
    methods: list[Literal["contrast", "likelihood", "choice"]] = Field(
        ["contrast", "likelihood", "choice"], min_length=1, description="ways of judging to try; a server can only choose"
    )
    bank: str = Field("data/judge", description="labelled pairs of answers by principle")
    pairs: int = Field(100, ge=1, description="at most this many labelled pairs of each principle, the first of its file")
    gate: Literal["block", "warn"] = Field("block", description="what happens when no method clears chance")
    principles: int = Field(2, ge=1, description="principles averaged in one judgement of samples")
    clamp: float = Field(0.0, ge=0, lt=0.5, description="labels are held within [this, 1 - this]")


class Reward(Training):
    preferences: list[str] = Field(
        ["data/truth/train", "constitution"], min_length=1, description="truth banks, preference files or constitution"
    )
    max_prompts: int = Field(2000, ge=1, description="use at most this many prompts, each with all its pairs, drawn by seed")
    validation: str = Field("data/truth/dev", description="labelled questions for the validation accuracy")
    principle_bank: str = Field("data/judge", description="labelled pairs by principle, on which it is measured")
    principle_pairs: int = Field(34, ge=1, description="at most this many of each principle, the first of its file")
    without: list[str] = Field([], description="principles whose rows are left out, to see what they do")
    center_coef: float = Field(0.01, ge=0, description="weight of (r_chosen + r_rejected)^2, which keeps rewards near 0")


class Dpo(Voice):
    preferences: list[str] = Field(
        ["data/truth/train", "constitution"], min_length=1, description="truth banks, preference files or constitution"
    )
    max_prompts: int = Field(2000, ge=1, description="use at most this many prompts, each with all its pairs, drawn by seed")
    loss: Literal["dpo", "positive", "length_normalised"] = Field(
        "dpo", description="sums of log-probabilities; with a price on less likely chosen answers; or means over tokens"
    )
    beta: float = Field(0.1, gt=0, description="strength of the pull to the reference model")
    positive_coef: float = Field(5.0, gt=0, description="lambda of DPO-positive, in nats of an answer")
    replay_coef: float = Field(1.0, gt=0, description="weight of KL(parent || policy) a token of the replayed answers")
    replay_share: float = Field(0.5, gt=0, description="replayed answers beside each prompt with its pairs")
    sft_coef: float = Field(0.0, ge=0, description="weight of the chosen answer's negative log-likelihood a token")


class Sampling(Table):
    """How PPO's answers are sampled."""

    prompts: str = Field("data/prompts.jsonl", description="prompts to answer (JSONL)")
    rollouts: int = Field(32, ge=2, description="answers sampled an iteration, over all ranks")
    group_size: int = Field(1, ge=1, description="answers to each prompt; RLOO and GRPO compare them with each other")
    max_new_tokens: int = Field(48, ge=1, description="longest answer in tokens")
    max_prompt_tokens: int = Field(256, ge=1, description="longest prompt in tokens; longer ones are an error")
    temperature: float = Field(1.0, gt=0, description="sampling temperature; log-probabilities are scaled alike")
    sampler: Literal["exact", "bfloat16", "int8"] = Field("exact", description="the weights that answers are sampled with")
    engine: Literal["local", "vllm", "openai"] = Field(
        "local", description="who samples: this process, vLLM given weights over NCCL, or a server given adapters by disk"
    )
    engine_url: str = Field("", description="the server's address, with /v1")
    tis_cap: float = Field(2.0, ge=0, description="most that pi_old / pi_sampler may weigh a token; 0 does not correct")
    truncation: Literal["penalty", "replace", "mask"] = Field(
        "penalty",
        description="of answers that don't end: take truncation_penalty off, score minus that, or leave out",
    )
    truncation_penalty: float = Field(1.0, ge=0, description="in units of the first rollout's spread of scores")


class Scoring(Table):
    """What PPO's answers are scored with."""

    rewards: list[str] = Field(
        ["reward"], min_length=1, description='"reward" (the stage), "file.py:function", or a sequence classifier\'s folder'
    )
    reward_weights: list[float] = Field([], description="weight of each of the rewards; all 1 if empty")
    hard_rewards: bool = Field(False, description="1 where a score beats the first rollout's mean, else 0")
    score_clip: float = Field(0.0, ge=0, description="normalised scores are held within this range; 0 leaves them")


class Objective(Table):
    """What PPO's update minimises."""

    advantage: Literal["gae", "rloo", "grpo", "dr_grpo"] = Field(
        "gae", description="gae learns a critic; the others compare"
    )
    reduction: Literal["token", "sequence", "dr_grpo"] = Field("token", description="what the loss is a mean over")
    ratio: Literal["token", "sequence"] = Field("token", description="the ratio that is clipped: a token's or the answer's")
    clip_range: float = Field(0.2, gt=0, lt=1, description="PPO's epsilon for the ratio")
    dual_clip: float = Field(0.0, ge=0, description="bound of the loss at negative advantages, in units of these; 0: none")
    value_clip_range: float = Field(0.2, gt=0, description="epsilon for the value")
    value_coef: float = Field(0.1, ge=0, description="weight of the value loss")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="GAE's lambda")
    gamma: float = Field(1.0, gt=0, le=1, description="discount a token")
    kl_coef: float = Field(0.05, ge=0, description="beta: reward - beta * KL(policy || reference), a token")
    kl_form: Literal["reward", "k2", "k3"] = Field("reward", description="KL in the reward, or an estimator in the loss")
    kl_target: float = Field(0.0, ge=0, description="KL of an answer that an adaptive kl_coef holds; 0 keeps kl_coef fixed")
    kl_horizon: int = Field(10_000, ge=1, description="answers in which an adaptive kl_coef can change by a fifth of itself")
    entropy_coef: float = Field(0.0, ge=0, description="weight of the entropy that is added to the objective")
    ptx_coef: float = Field(0.0, ge=0, description="weight of the demonstrations' negative log-likelihood a token")
    ptx_data: list[str] = Field([], description="demonstrations (JSONL) for it")


class Ppo(Sampling, Scoring, Objective):
    parent: ModelStage = Field("sft", description="where the policy starts; it is also the reference for the KL")
    tune: Literal["lora", "full"] = Field("lora", description="the policy: an adapter, or a copy of every weight")
    lora_rank: int = Field(16, ge=1, description="rank of new adapters")
    lora_alpha: int = Field(32, ge=1, description="LoRA scale of new adapters")
    iterations: int = Field(4, ge=1, description="rollout, score, advantages, update; this many times")
    epochs: int = Field(2, ge=1, description="passes over the rollouts of an iteration")
    minibatches: int = Field(2, ge=1, description="optimizer steps a pass")
    micro_batch_size: int = Field(8, ge=1, description="answers a forward pass, on each rank")
    learning_rate: float = Field(1e-5, gt=0, lt=1, description="peak rate of AdamW, falling to 0 in a line")
    value_learning_rate: float = Field(0.0, ge=0, lt=1, description="the critic's; 0 takes learning_rate")
    warmup_ratio: float = Field(0.0, ge=0, lt=1, description="share of the steps that the rates climb")
    target_kl: float = Field(0.1, gt=0, description="stop an iteration's passes when KL(old || new) a token passes it")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this global norm")


EvalSet = Literal[
    "truth",
    "short",
    "instructions",
    "fluency",
    "forms",
    "open",
    "sycophancy",
    "calibration",
    "unknown",
    "bias",
    "grounded",
    "persona",
    "skills",
    "text",
]
HEARD = ("short", "instructions", "open")  # sets whose questions a model answers in its own words
VOICE = ("short", "instructions", "fluency")  # sets that check such answers by rule, without a judge
BANK_OF = {
    "forms": "truth",
    "open": "truth",
    "sycophancy": "facts",
    "calibration": "facts",
}  # sets that read another's bank, by set
BANKLESS = ("fluency",)  # sets that ask nothing of their own
VOICE_METRICS = ("short.right", "instructions.followed", "fluency.broken")  # gated unless a recipe names them
VOICE_MARGIN = 0.03  # more than that must surely be lost
Gate = Literal["block", "warn", "off"]
Benchmark = Literal["truthfulqa", "bbq", "hh", "model_written", "ifeval"]


class Evals(Table):
    truth: str = Field("data/truth/test", description="questions of held-out topics")
    style_bank: str = Field("data/truth/train", description="labelled questions that the style baselines learn from")
    banks: str = Field("data/evals", description="folder with the other banks, <set>/<split>/*.jsonl")
    split: Literal["dev", "test"] = Field("test", description="which half of the other banks; tune on dev alone")
    sets: list[EvalSet] = Field(list(get_args(EvalSet)), min_length=1, description="what is measured")
    models: list[ModelStage] = Field(["base", "sft", "dpo", "ppo"], min_length=1, description="stages that are scored")
    brief: list[ModelStage] = Field(
        [], description="of these, the stages scored on truth and greedily on short, instructions and fluency alone"
    )
    most: int | dict[str, int] = Field(
        0,
        description='most rows of each set but truth, drawn by seed, 0 takes all; or by set, with "default" for the others',
    )
    temperature: float = Field(
        0.7, ge=0, description="of the sampled answer beside the greedy one, in sets that hear answers; 0: greedy alone"
    )
    resamples: int = Field(
        4000, ge=100, description="bootstrap resamples behind each interval; p-values end at one over them"
    )
    gate: Gate | dict[str, Gate] = Field(
        "block",
        description="what a loss does, for a set or a metric (truth.mc1); a single word is for the truth set and the voice",
    )
    margin: float | dict[str, float] = Field(
        0.0,
        description="a loss counts when it is surely more than this; for all but the voice (0.03), or for a set or a metric",
    )
    files: dict[Benchmark, str] = Field({}, description="public benchmarks from your own files, by name")
    primer: str = Field("", description="text file put before TruthfulQA's questions in their plain form")
    lm_eval: list[str] = Field([], description="tasks of lm-evaluation-harness to run by name, where it is installed")
    first_questions: str = Field(
        "data/first-questions.jsonl",
        description="questions whose answers by every stage open the report; in no training data",
    )
    tokens_a_batch: int = Field(2048, ge=64, description="tokens scored in one forward pass")


class Watch(Table):
    """What the guard does in every trained stage."""

    spike: float = Field(10.0, gt=0, description="robust z-score from which a loss or gradient norm is a spike")
    window: int = Field(16, ge=8, le=128, description="calm steps that a spike is measured against")
    warmup: int = Field(10, ge=4, description="calm steps before spikes are looked for")
    patience: int = Field(3, ge=1, description="findings in a row before it goes back or stops")
    skips: int = Field(20, ge=1, description="spiking batches in a row left out after that, before it does so again")
    rollbacks: int = Field(2, ge=0, description="most times that a stage goes back to a checkpoint before it stops")
    rate_factor: float = Field(0.5, gt=0, le=1, description="the rate is multiplied by this each time")


class Guard(Watch):
    """When the guard steps in during training. ``docs/guard.md`` says why each default has its value."""

    entropy_least: float = Field(0.3, ge=0, description="PPO's entropy may fall to this share of the first iterations'")
    repeated_rise: float = Field(0.3, ge=0, description="the share of repeated 4-grams may rise by this")
    kl_most: float = Field(1.0, gt=0, description="KL to the reference may reach this, in nats a token")
    length_most: float = Field(2.0, gt=1, description="answers may be this many times as long as the first iterations'")
    length_correlation: float = Field(0.8, gt=0, description="score and length of growing answers may correlate this much")
    gap_most: float = Field(0.2, gt=0, description="sampler and trainer may differ by this, in nats a token")
    critic_patience: int = Field(10, ge=1, description="iterations in which the critic may explain nothing")
    probe_every: int = Field(10, ge=0, description="iterations between looks at held-out truthfulness; 0: none")
    probe_questions: int = Field(16, ge=2, description="questions of reward.validation that are looked at, drawn by seed")
    truth_fall: float = Field(0.03, ge=0, description="held-out MC2 may fall by this while the score rises")
    hang_factor: float = Field(20.0, gt=1, description="a step may take this many times as long as the median one")
    hang_seconds: float = Field(1800.0, gt=0, description="and may always take this long")


class Launch(Table):
    """Where a recipe runs. The same recipe gives the same run anywhere, so none of this is part of a fingerprint."""

    ranks: int = Field(1, ge=1, description="processes on each host")
    hosts: int = Field(1, ge=1, description="machines")
    rendezvous: str = Field("", description="host:port at which the hosts meet, on one of them; needed from 2 hosts on")
    zero: Literal[0, 1, 2, 3] = Field(
        0, description="stage of ZeRO: ranks share out optimizer states (1), gradients too (2), weights too (3)"
    )
    offload: Literal["none", "optimizer", "all"] = Field(
        "none", description="what ZeRO keeps in the host's memory: optimizer states, or (stage 3) weights as well"
    )
    gradient_checkpointing: bool = Field(
        False, description="layers are computed again in the backward pass: a third more work, far less memory"
    )
    deepspeed: str | None = Field(None, description="further DeepSpeed settings (JSON), put over those of this table")
    restarts: int = Field(0, ge=0, description="times that all ranks are started again after one of them was lost")

    @property
    def world(self) -> int:
        """Processes on all hosts."""
        return self.ranks * self.hosts


class Check(Table):
    accept: list[str] = Field([], description='findings to go on with, by rule or "rule@where" (docs/check.md)')


@dataclass(frozen=True)
class Origin:
    """Where a recipe came from: its file, what the command line changed, and why. Recipes do not differ by it."""

    path: str = field(default="", compare=False)
    overrides: tuple[str, ...] = field(default=(), compare=False)
    why: str = field(default="", compare=False)


class Recipe(Table):
    _origin: Origin = PrivateAttr(Origin())  # not part of what a run is made from

    name: str = Field("", description="runs go to runs/<name>; the file's name if empty")
    seed: int = Field(17, ge=0, lt=2**32, description="every random draw derives from it")
    runs: str = Field("runs", description="where run directories are kept")
    stages: list[Stage] = Field(["base", "sft", "constitution", "reward", "dpo", "ppo"], min_length=1)
    unexplained: Literal["stop", "warn"] = Field("stop", description="what a value without a reason does")
    model: Model = Model()
    sft: Sft = Sft()
    distill: Distill = Distill()
    constitution: Constitution = Constitution()
    judge: Judge = Judge()
    reward: Reward = Reward()
    dpo: Dpo = Dpo()
    ppo: Ppo = Ppo()
    guard: Guard = Guard()
    evals: Evals = Evals()
    launch: Launch = Launch()
    check: Check = Check()

    @property
    def origin(self) -> Origin:
        return self._origin
