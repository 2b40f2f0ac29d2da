"""What a slow link costs a step: worked numbers, the planner's own count beside them, and how it is told."""

from __future__ import annotations

import pytest
from check_lab import facts
from lab import ROOT

from truthward import hardware
from truthward.check import machine
from truthward.check.links import Link, Traffic, judge_links, price, traffic
from truthward.check.machine import GB, Machine
from truthward.check.memory import micro_batches
from truthward.plan.cost import Learning, volume

HOSTS = ["alpha", "beta", "gamma"]
GOOD = Link(0, 1, 5e-5, 1e10)
PSI = 134_515_008  # parameters of the 135M model
TWO = [
    "launch.ranks=2",
    "launch.hosts=2",
    "launch.rendezvous=a:1",
    *(f"{s}.batch_size=16" for s in ("sft", "dpo", "reward")),
]


@pytest.fixture(autouse=True)
def _a_known_machine(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(Machine, "here", classmethod(lambda _: Machine(cores=4, memory=64 * GB, gpus=0, gpu_memory=0)))
    monkeypatch.setattr(hardware, "measure_dtypes", lambda: {"float32": 100.0, "bfloat16": 10.0})


@pytest.mark.parametrize(("zero", "psi"), [(0, 2), (1, 2), (2, 2), (3, 3)])
def test_a_step_of_all_weights_sends_what_the_paper_counts(zero, psi):
    """2 Psi, and 3 Psi at stage 3, of each of four ranks' three quarters (Rajbhandari et al. 2020, section 7)."""
    subject = facts("laptop", [*TWO, 'sft.tune="full"', "sft.batch_size=4", f"launch.zero={zero}"])
    assert micro_batches(subject, "sft") == 1
    assert traffic(subject, "sft", 4).size == pytest.approx(psi * 4 * PSI * 3 / 4)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("stage", ["sft", "dpo", "ppo"])
@pytest.mark.parametrize("tune", ["lora", "full"])
def test_the_planner_counts_the_same_bytes(zero, stage, tune):
    """Two counts, written apart; in fp32, where adapters and weights are of one width."""
    changes = [*TWO, f'{stage}.tune="{tune}"', "sft.batch_size=8", "ppo.rollouts=64", f"launch.zero={zero}"]
    subject = facts("laptop", [*changes, *(['stages=["base", "sft", "constitution", "dpo"]'] if stage == "dpo" else [])])
    shape, adapter = subject.shape, subject.shape.adapter(16)
    trained = (adapter if tune == "lora" else shape.parameters) + (adapter if stage == "ppo" else 0)
    learning = Learning(shape, trained, 4, 1 if stage == "dpo" else 0, 2 if stage == "ppo" else 1)
    micros = micro_batches(subject, stage)
    assert micros > 1 or stage == "dpo"
    assert traffic(subject, stage, 4).size == pytest.approx(volume(learning, zero, 4, micros))


def test_gathering_layer_by_layer_makes_many_messages():
    """Three times 30 layers a micro-batch, each in three hops between four ranks; without ZeRO-3 a few buckets."""
    whole = ['sft.tune="full"', "sft.batch_size=4"]
    assert traffic(facts("laptop", [*TWO, *whole, "launch.zero=3"]), "sft", 4).messages == 3 * 30 * 3
    assert traffic(facts("laptop", [*TWO, *whole]), "sft", 4).messages == 2 * 22 * 3  # 538 MB in buckets of 25


def test_a_base_of_unknown_shape_has_no_price_for_its_adapters():
    subject = facts("laptop", [*TWO, "model.base=some-org/model-7b"])
    assert traffic(subject, "dpo", 4) is None
    assert price(subject, GOOD) == ""


def test_the_seconds_of_a_step_are_its_work_and_what_it_sends():
    subject = facts("laptop", [*TWO, "sft.batch_size=4", 'stages=["base", "sft"]', 'sft.tune="full"'])
    alone = machine.flops(subject, "sft") / subject.steps("sft") / (100e9 * machine.SHARE * 2)  # two hosts
    sent = 2 * 4 * PSI * 3 / 4
    slow = Link(0, 1, 0.01, 5e7, 0.1, 0.02)
    assert Traffic(sent, 132).seconds(slow) == pytest.approx(sent / 5e7 + 132 * 0.03)
    said = price(subject, slow)
    assert said == f"a step of sft {alone + sent / 5e7 + 132 * 0.03:.1f} s instead of {alone:.1f} s"


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (Link(1, 2, 5e-5, 1e9), "1.0 GB/s, a good link here 10.0 GB/s"),
        (Link(1, 2, 2e-2, 1e10), "a message takes 20 ms, on a good link here 0.05 ms"),
        (Link(1, 2, 5e-5, 1e10, 0.12, 0.024), "12% of messages stall, and take 200 ms more"),
    ],
)
def test_a_bad_link_is_named_with_its_hosts_and_price(bad, told):
    slow, _ = judge_links([GOOD, GOOD._replace(b=2), bad], HOSTS, lambda link: f"it costs {link.a}{link.b}")
    assert f"ranks 1 (beta) and 2 (gamma): {told}" in slow.what
    assert slow.why.endswith(": it costs 12")


@pytest.mark.parametrize("bad", [Link(0, 1, 0.1, 1e10), Link(0, 1, 5e-5, 1e6), Link(0, 1, 5e-5, 1e10, 0.1, 0.02)])
def test_the_only_link_there_is_can_be_a_bad_one(bad):
    assert [f.rule for f in judge_links([bad], HOSTS)] == ["link-slow", "links"]
    assert [f.rule for f in judge_links([GOOD], HOSTS)] == ["links"]
