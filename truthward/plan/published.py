"""Throughput and failures that others have published, beside what the cost model says of the same settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from truthward.check.facts import KNOWN, Shape
from truthward.plan.cost import Learning, rollout, step
from truthward.plan.machines import KINDS, Cluster

FOUNDRY = "llm-foundry, scripts/train/benchmarking/README.md"
TITAN = "torchtitan, docs/performance.md (2024) and benchmarks/llama3_h100_202412_torchtitan.md"
MPT = {  # parameters as the table gives them; layers and width of the published configurations
    "1b": Shape(1_315_950_592, 24, 2048, 8192, 16, 16, 50368),
    "7b": Shape(6_658_859_008, 32, 4096, 16384, 32, 32, 50368),
    "13b": Shape(12_853_954_560, 40, 5120, 20480, 40, 40, 50368),
    "30b": Shape(29_975_214_080, 48, 7168, 28672, 56, 56, 50368),
    "70b": Shape(64_862_437_376, 80, 8192, 32768, 64, 64, 50368),
    "llama-8b": Shape.of(KNOWN["llama-3.1-8b"]),
    "llama-70b": Shape.of(KNOWN["llama-3.1-70b"]),
}


class Published(NamedTuple):
    """Training of all weights, fully sharded (as ZeRO-3): tokens a second and GPU.

    Attributes:
        micro, micros: rows of a micro-batch, micro-batches of a step.
        recompute: whether activations were checkpointed.
    """

    model: str
    kind: str
    gpus: int
    length: int
    micro: int
    micros: int
    recompute: bool
    tokens: float
    source: str


RUNS = (
    Published("1b", "h100-80gb", 64, 2048, 20, 1, False, 44402, FOUNDRY),
    Published("7b", "h100-80gb", 8, 2048, 6, 1, False, 10643, FOUNDRY),
    Published("13b", "h100-80gb", 64, 2048, 2, 1, False, 4800, FOUNDRY),
    Published("30b", "h100-80gb", 32, 2048, 14, 3, True, 2308, FOUNDRY),
    Published("70b", "h100-80gb", 32, 2048, 2, 16, True, 882, FOUNDRY),
    Published("70b", "h100-80gb", 64, 2048, 8, 4, True, 1039, FOUNDRY),
    Published("1b", "a100-80gb", 8, 2048, 14, 4, False, 20513, FOUNDRY),
    Published("7b", "a100-80gb", 8, 2048, 6, 2, False, 4641, FOUNDRY),
    Published("13b", "a100-80gb", 8, 2048, 2, 3, False, 2262, FOUNDRY),
    Published("30b", "a100-80gb", 8, 2048, 3, 21, True, 916, FOUNDRY),
    Published("70b", "a100-80gb", 64, 2048, 8, 4, True, 410, FOUNDRY),
    Published("llama-8b", "a100-80gb", 64, 8192, 1, 1, False, 2973, TITAN),
    Published("llama-70b", "a100-80gb", 64, 8192, 1, 1, True, 331, TITAN),
    Published("llama-8b", "h100-80gb", 8, 8192, 2, 1, False, 6667, TITAN),
    Published("llama-8b", "h100-80gb", 128, 8192, 2, 1, False, 6514, TITAN),
)


def tokens(run: Published) -> float:
    """Tokens a second and GPU by the cost model."""
    shape = MPT[run.model]
    learning = Learning(shape, shape.parameters, 2, recompute=run.recompute)
    row = run.micro * run.micros * run.length
    taken = step(learning, Cluster.of(KINDS[run.kind], run.gpus), row, run.length, 3, run.micros)
    return row / taken.seconds


def chat_hours() -> float:
    """DeepSpeed-Chat's OPT-13B on 8 A100-80GB: 131.9k prompts of 256 tokens, each answered by 256, batches of 1,024.

    One PPO pass, all weights of the actor; critic and preference model are of 350M and left out. Published: 9 hours
    (microsoft/DeepSpeed, blogs/deepspeed-chat/README.md, table 1).
    """
    shape = Shape(13_200_000_000, 40, 5120, 20480, 40, 40, 50272)
    cluster = Cluster.of(KINDS["a100-80gb"], 8)
    answers = 1024 / 8
    learning = Learning(shape, shape.parameters, 2)
    trained = step(learning, cluster, answers * 512, 512, 3)
    scores = Learning(shape, 0, 2, passes=2, models=0).flops(answers * 512, 512) / (cluster.kind.peak * cluster.kind.share)
    sampled = rollout(shape, cluster, answers, 256, 256, 2)
    return 131_900 / 1024 * (sampled.seconds + scores + trained.seconds) / 3600


def lines() -> Iterator[str]:
    """The table of docs/scale.md."""
    yield "| model | GPUs | rows x tokens, micro-batches | recompute | published | model | model / published | source |"
    yield "|---|---|---|---|---|---|---|---|"
    for run in RUNS:
        said, source = tokens(run), run.source.split(",")[0]
        cut = f"{run.micro} x {run.length}, {run.micros}"
        start = f"| {run.model} | {run.gpus} {run.kind} | {cut} | {'yes' if run.recompute else 'no'} "
        yield f"{start}| {run.tokens:,.0f} | {said:,.0f} | {said / run.tokens:.2f} | {source} |"
