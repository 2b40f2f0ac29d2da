"""Two hosts for real: they meet, compare notes, and name the link that is slow and what it costs."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lab import ROOT, furnish
from net_lab import NAMES, TwoHosts, missing, two_hosts
from test_ranks import ALIKE, WARN, assert_alike, found

from truthward.errors import Interrupted
from truthward.launch import torchrun
from truthward.ledger import Run, is_done, plan
from truthward.recipe import load_recipe

LACK = missing()
pytestmark = pytest.mark.skipif(bool(LACK), reason=f"no two hosts here: {LACK}")
RECIPE = "recipes/tiny.toml"


def confer(hosts: TwoHosts) -> str:
    """What the check of ranks says on two hosts of one rank each."""
    changes = ["launch.hosts=2", f"launch.rendezvous={hosts.rendezvous}"]
    recipe = load_recipe(RECIPE, changes)
    words = [*torchrun(recipe, "check"), "-m", "truthward.check.ranks", RECIPE, *changes]
    (code, first), (other, second) = hosts.both(*words)
    assert (code, other) == (0, 0), first + second
    return first + second


@pytest.mark.parametrize("carried", [False, True], ids=["veth", "wire"])
def test_a_clean_link_between_two_hosts_gives_no_warning(carried):
    """Also none where packets go the way of the lossy and late ones below, and none is lost or late."""
    with two_hosts(carried=carried) as hosts:
        said = confer(hosts)
    assert re.search(r"note: launch.ranks: 1 links; slowest between ranks 0 \((alpha|beta)\) and 1 \((alpha|beta)\)", said)
    assert "link-slow" not in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ({"delay": 0.1}, r"a message takes [12]\d\d ms"),  # gloo asks before it sends
        ({"loss": 0.05}, r"\d+% of messages stall, and take [12]\d\d ms more"),
        ({"rate": "1mbit"}, r"0\.[123]\d MB/s"),
    ],
    ids=["late", "lossy", "narrow"],
)
def test_a_bad_link_is_named_with_both_hosts_and_what_it_costs(fault, told):
    with two_hosts(**fault) as hosts:
        said = confer(hosts)
    warned = re.findall(r"warning: launch.ranks: between (.*)\n  why: (.*)\n", said)
    assert [what for what, _ in warned if re.search(told, what)], said
    for what, why in warned:
        assert {"alpha", "beta"} <= set(re.findall(r"\w+", what))
        assert re.search(r"a step of sft [\d.]+ m?s instead of [\d.]+ m?s", why)


@pytest.mark.slow
def test_two_hosts_train_the_weights_that_one_rank_does_under_zero_2_and_3(tmp_path):
    made = furnish(tmp_path)
    made.run("base")
    ways = {zero: made.copy(tmp_path / f"zero{zero}") for zero in (2, 3)}
    expected = made.run("sft", WARN, *ALIKE["sft"])
    with two_hosts() as hosts:
        launched = ["launch.hosts=2", f"launch.rendezvous={hosts.rendezvous}"]
        jobs = [
            {
                **{"home": str(lab.home), "runs": str(lab.runs), "stage": "sft"},
                "overrides": [WARN, *launched, f"launch.zero={zero}", *ALIKE["sft"]],
            }
            for zero, lab in ways.items()
        ]
        (tmp_path / "jobs.json").write_text(json.dumps(jobs))
        words = [*torchrun(made.recipe(*launched), "sft"), str(ROOT / "tests" / "rank_jobs.py"), str(tmp_path / "jobs.json")]
        for code, said in hosts.both(*words, timeout=240):
            assert code == 0, said[-4000:]
    for lab in ways.values():
        assert_alike(found(lab, "sft", *ALIKE["sft"]), expected)


RUN = ['stages=["base", "sft"]', "sft.packing=false", "sft.micro_batch_size=1", "sft.epochs=0.1"]


def running(hosts: TwoHosts, runs: Path, *changes: str) -> list[str]:
    """The words of one run for both hosts."""
    launched = ["launch.hosts=2", f"launch.rendezvous={hosts.rendezvous}", f"runs={runs}", *RUN]
    return ["-m", "truthward", "run", RECIPE, *launched, *changes]


def planned(runs: Path, *changes: str) -> dict[str, Path]:
    recipe = load_recipe(RECIPE, [f"runs={runs}", *RUN, *changes])
    return {name: this.path for name, this in plan(recipe).items()}


def await_checkpoint(path: Path, *running: subprocess.Popen) -> None:
    """Wait for the fifth step's, while all of these go on."""
    for _ in range(2400):
        if (path / "checkpoints" / "checkpoint-5" / "trainer_state.json").exists():
            break
        assert [process.poll() for process in running] == [None] * len(running)
        time.sleep(0.05)


@pytest.mark.slow
def test_one_command_on_both_hosts_runs_everything_once(tmp_path):
    """The first host alone makes the base and scores, both train, and each has checked its links before."""
    scored = 'evals.models=["sft"]'
    with two_hosts() as hosts:
        (code, first), (other, second) = hosts.both(*running(hosts, tmp_path, scored), timeout=280)
    assert (code, other) == (0, 0), first[-3000:] + second[-3000:]
    assert f"{NAMES[0]} leads" in first
    assert f"{NAMES[1]} follows" in second
    assert all(is_done(path) for path in planned(tmp_path, scored).values())
    assert ("base" in first, "base runs in" in second, "report:" in second) == (True, False, False)
    assert Run.load(planned(tmp_path)["sft"]).manifest["recipe"]["launch"]["hosts"] == 2


@pytest.mark.slow
def test_a_signal_to_the_first_host_ends_both_behind_a_checkpoint(tmp_path):
    unscored, long = 'evals.models=["ppo"]', "sft.epochs=2"
    path = planned(tmp_path, unscored, long)["sft"]
    with two_hosts() as hosts:
        one, two = (hosts.start(host, *running(hosts, tmp_path, unscored, long)) for host in (0, 1))
        await_checkpoint(path, one, two)
        one.terminate()
        assert one.wait(60) == Interrupted.exit_code
        assert two.wait(60) != 0
    assert Run.load(path).manifest["incidents"][-1]["kind"] == "interrupted"


@pytest.mark.slow
def test_a_host_that_is_gone_ends_the_other_and_the_run_goes_on_from_its_checkpoint(tmp_path):
    """Without power nothing says goodbye; then both go on to the weights of a whole run."""
    long = ['evals.models=["ppo"]', "sft.epochs=0.5", "guard.hang_seconds=20"]
    path = planned(tmp_path / "cut", *long)["sft"]
    with two_hosts() as hosts:
        one, two = (hosts.start(host, *running(hosts, tmp_path / "cut", *long)) for host in (0, 1))
        await_checkpoint(path, one, two)
        hosts.lose()
        said, _ = one.communicate(timeout=90)
        assert (one.returncode, two.wait(5)) == (1, -signal.SIGKILL), said
        told = rf"error: rank 0 on {NAMES[0]}(: step \d+ .* did not end| waited for another rank in vain)"
        assert re.search(told, said), said
        hosts.find()
        for code, said in hosts.both(*running(hosts, tmp_path / "cut", *long), timeout=280):
            assert code == 0, said[-4000:]
    assert Run.load(path).manifest["resumed"] == 1
    words = ["-m", "truthward", "run", RECIPE, f"runs={tmp_path / 'whole'}", *RUN, *long]
    subprocess.run([sys.executable, *words], check=True, cwd=ROOT, capture_output=True)
    assert_alike(Run.load(path), Run.load(planned(tmp_path / "whole", *long)["sft"]))
