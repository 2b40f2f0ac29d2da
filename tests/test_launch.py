"""How stages are started: the words, who leads, what is printed for clusters, and the printed script at work."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import commands
import pytest
from torch.distributed.run import get_args_parser

from truthward import clusters, launch
from truthward.errors import GateFailed, Interrupted, UserError
from truthward.ledger import plan
from truthward.recipe import load_recipe

TINY, GIVEN = "recipes/tiny.toml", ["recipes/tiny.toml", "ppo.kl_coef=0.02", "--why", "it's a test; $HOME"]
TWO = ["launch.ranks=2", "launch.hosts=2", "launch.rendezvous=node0:29501", "launch.restarts=3"]
SIZES = ["sft.batch_size=4", "reward.batch_size=8", "dpo.batch_size=8", "ppo.rollouts=16"]

pytestmark = pytest.mark.usefixtures("at_root")


def recipe(*overrides):
    return load_recipe(TINY, [*SIZES, *overrides])


# ------------------------------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize("stage", ["sft", "distill", "reward", "dpo", "ppo"])
def test_a_trained_stage_is_started_on_all_ranks_as_torchrun_understands_it(stage):
    words = launch.command(recipe(*TWO), stage, ["recipes/tiny.toml", "--why", "x"])
    assert words[:3] == [sys.executable, "-m", "torch.distributed.run"]
    parsed = get_args_parser().parse_args(words[3:])
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.max_restarts) == ("2", "2", 3)
    assert (parsed.rdzv_backend, parsed.rdzv_endpoint, parsed.rdzv_id) == ("c10d", "node0:29501", f"tiny-{stage}")
    assert (parsed.module, parsed.training_script) == (True, launch.MODULES.get(stage, stage))
    assert parsed.training_script_args == ["recipes/tiny.toml", "--why", "x"]


def test_ranks_of_one_host_meet_at_a_port_of_their_own():
    parsed = get_args_parser().parse_args(launch.command(recipe("launch.ranks=2"), "sft", ["x"])[3:])
    assert (parsed.standalone, parsed.nnodes, parsed.nproc_per_node) == (True, "1", "2")


@pytest.mark.parametrize("stage", ["base", "constitution", "evals"])
def test_what_is_for_one_process_is_started_as_one(stage):
    module = launch.MODULES.get(stage, stage)
    assert launch.command(recipe(*TWO), stage, ["x"]) == [sys.executable, "-m", module, "x"]


def test_one_rank_is_started_plainly():
    assert launch.command(recipe(), "ppo", ["x"]) == [sys.executable, "-m", "rl.ppo", "x"]


PROBE = """
import os, signal, sys, time
if sys.argv[1] == "threads":
    sys.exit(int(os.environ.get("OMP_NUM_THREADS", "99")))
print("up", flush=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(30)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """What is started in place of any stage, with one word."""
    (tmp_path / "probe.py").write_text(PROBE)

    def stand(word):
        monkeypatch.setattr(launch, "command", lambda *_: [sys.executable, str(tmp_path / "probe.py"), word])

    return stand


@pytest.mark.parametrize(("changes", "forks"), [([], True), (TWO[:1], False), (["launch.zero=2"], False), (TWO, False)])
def test_only_the_single_processes_of_one_host_are_forked(monkeypatch, changes, forks):
    monkeypatch.setattr(launch.processes, "server", None)
    monkeypatch.setattr(launch.processes, "serve", lambda: setattr(launch.processes, "server", "a server"))
    launch.prepare(recipe(*changes))
    assert bool(launch.processes.server) == forks


def test_ranks_share_the_cores_unless_somebody_said_otherwise(stand_in, monkeypatch):
    stand_in("threads")
    monkeypatch.setattr(launch.os, "sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert launch.start(recipe("launch.ranks=2"), "sft", []) == 6
    assert launch.start(recipe("launch.ranks=2"), "evals", []) == 99
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert launch.start(recipe("launch.ranks=2"), "sft", []) == 3


def test_a_stage_that_was_told_to_stop_is_an_interrupted_one_whatever_torchrun_makes_of_it(stand_in):
    stand_in("stop")
    assert launch.start(recipe("launch.ranks=2"), "sft", []) == Interrupted.exit_code
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# ---------------------------------------------------------------------------------------------------------------- hosts


@pytest.mark.parametrize("place", ["node0", "node0:", ":29500", "node0:99999", "node0:x"])
def test_a_place_to_meet_is_host_and_port(place):
    with pytest.raises(UserError, match="is not host:port"):
        launch.endpoint(recipe(*TWO[:2], f"launch.rendezvous={place}").launch)


def test_this_machine_knows_its_own_addresses_and_no_others():
    assert launch.is_here("127.0.0.1")
    assert launch.is_here("localhost")
    assert not launch.is_here("192.0.2.1")  # kept for documentation (RFC 5737): nobody's
    assert launch.address_towards("127.0.0.1") == "127.0.0.1"
    with pytest.raises(UserError, match="is not known on"):
        launch.addresses("no-such-host.invalid")


@pytest.fixture
def meeting(monkeypatch):
    """A recipe of two hosts that meet at a free port of this one, and who of the threads that ask is the first."""
    monkeypatch.setattr(launch, "POLL", 0.02)
    monkeypatch.setattr(launch, "PATIENCE", 20)
    monkeypatch.setattr(launch, "is_here", lambda _: threading.current_thread().name == "first")
    for name in (launch.MET, "PET_RDZV_CONF", "PET_LOCAL_ADDR"):
        monkeypatch.setenv(name, "")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return recipe(*TWO[:2], f"launch.rendezvous=127.0.0.1:{port}")


def together(meeting, lead, follow):
    """Both hosts as threads; what each of them met in the end."""
    met = {}

    def host(name):
        try:
            launch.lead_or_follow(meeting, lead, follow)
        except Exception as fault:
            met[name] = fault

    threads = [threading.Thread(target=host, args=(name,), name=name) for name in ("other", "first")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return met


def test_the_first_host_tells_the_other_what_to_start_and_when_it_is_over(meeting):
    heard = []

    def lead(hosts):
        for step in ("check", "sft", "ppo"):
            hosts.tell(step)

    assert together(meeting, lead, lambda hosts: heard.extend(hosts.told())) == {}
    assert heard == ["check", "sft", "ppo"]
    assert (os.environ[launch.MET], os.environ["PET_RDZV_CONF"]) == ("1", "is_host=0")
    assert os.environ["PET_LOCAL_ADDR"] == "127.0.0.1"


def test_a_gate_on_the_first_host_ends_the_other_with_its_exit_code(meeting):
    def lead(hosts):
        hosts.tell("sft")
        raise GateFailed("worse")

    met = together(meeting, lead, lambda hosts: list(hosts.told()))
    assert "worse" in str(met["first"])
    assert "the first host stopped the run" in str(met["other"])
    assert met["other"].exit_code == GateFailed.exit_code


def test_a_host_that_gives_up_ends_the_first_by_name(meeting):
    def lead(hosts):
        for _ in range(500):
            hosts.tell("sft")
            time.sleep(0.01)

    def follow(hosts):
        raise UserError("no memory here")

    met = together(meeting, lead, follow)
    assert f"{socket.gethostname()} has given up" in str(met["first"])


def test_hosts_that_do_not_come_are_counted_and_named(meeting, monkeypatch):
    monkeypatch.setattr(launch, "PATIENCE", 0.2)
    monkeypatch.setattr(launch, "is_here", lambda _: True)
    with pytest.raises(UserError, match=f"1 of 2 hosts came within 0.2 s: {socket.gethostname()}"):
        launch.Hosts(meeting)


def test_a_first_host_that_is_not_there_is_named_with_what_to_look_at(meeting, monkeypatch):
    monkeypatch.setattr(launch, "PATIENCE", 1)
    with pytest.raises(UserError, match=r"could not reach the first host at 127.0.0.1:\d+") as caught:
        launch.Hosts(meeting)
    assert "firewall" in caught.value.fix


def test_one_host_meets_nobody():
    hosts = launch.Hosts(recipe("launch.ranks=2"))
    hosts.tell("sft")
    hosts.part(0)
    assert (hosts.first, hosts.store) == (True, None)


# -------------------------------------------------------------------------------------------------------------- printed


def lines(text):
    return [shlex.split(line) for line in text.splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize("changes", [TWO, ["launch.ranks=2"], []])
def test_what_is_printed_for_torchrun_is_what_a_run_starts(changes, monkeypatch):
    subject = recipe(*changes)
    printed = lines(clusters.torchrun_lines(subject, GIVEN))
    wanted = [[this.stage, "--only", name] if this.stage == "evals" else [name] for name, this in plan(subject).items()]
    stages = printed[1:] if changes else printed
    assert len(stages) == len(wanted)
    for words, (stage, *more) in zip(stages, wanted, strict=True):
        assert ["python", *launch.command(subject, stage, [*GIVEN, *more])[1:]] == words
    assert not changes or "truthward.check.ranks" in printed[0]


def test_what_is_for_the_first_host_alone_says_so():
    text = clusters.torchrun_lines(recipe(*TWO), GIVEN).splitlines()
    assert "# base: on the first host" in text
    assert "# evals-sft: on the first host" in text
    assert "# sft: on every host" in text


def test_the_launcher_of_deepspeed_understands_its_lines():
    from deepspeed.launcher.runner import parse_args

    printed = lines(clusters.deepspeed_lines(recipe(*TWO), GIVEN))
    (sft,) = [words[1:] for words in printed if "sft" in words and words[0] == "deepspeed"]
    parsed = parse_args(sft)
    assert (parsed.num_nodes, parsed.num_gpus, parsed.hostfile) == (2, 2, "hostfile")
    assert (parsed.master_addr, parsed.master_port) == ("node0", 29501)
    assert (parsed.module, parsed.no_local_rank, parsed.user_script, parsed.user_args) == (True, True, "sft", GIVEN)
    assert ["python", "-m", "constitution", *GIVEN] in printed


def test_a_hostfile_names_every_host_with_its_slots(tmp_path):
    text = clusters.deepspeed_lines(recipe(*TWO), GIVEN).partition("# check")[0]
    subprocess.run(["bash", "-c", text], cwd=tmp_path, check=True)
    assert (tmp_path / "hostfile").read_text() == "node0 slots=2\nhost2 slots=2\n"


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ([], "deepspeed", "the recipe runs on one process"),
        ([*TWO[:2], "launch.rendezvous=node0"], "slurm", "'node0' is not host:port"),
        ([*TWO[:2], "launch.rendezvous=node0"], "torchrun", "'node0' is not host:port"),
    ],
)
def test_what_cannot_be_launched_is_one_clear_error(changes, kind, message):
    with pytest.raises(UserError, match=message):
        clusters.printed(recipe(*changes), GIVEN, kind)


def test_the_command_prints_and_refuses(tmp_path):
    words = ["truthward", "launch", TINY, *SIZES, *TWO, "--print"]
    done = commands.run(*words, "slurm", timeout=60, light=True)
    assert done.stdout.startswith("#!/bin/bash\n#SBATCH --job-name=tiny\n#SBATCH --nodes=2\n")
    done = commands.run(*words, "pbs", timeout=60, light=True)
    assert done.returncode == 2
    assert "invalid choice: 'pbs'" in done.stderr


# ---------------------------------------------------------------------------------------------------------------- slurm

SRUN = """#!/bin/bash
printf '%s\\n' "$*" >> "$LOG"
[[ "$*" == *"-m $SLOW "* ]] || { [[ "$*" != *"-m $WRONG "* ]]; exit; }
trap 'echo stopped >> "$LOG"; exit 1' TERM
echo $$ > "$LOG.pid"
for _ in $(seq 200); do sleep 0.05; done
"""
SCANCEL = """#!/bin/bash
[ "$*" = "--signal=TERM 42" ] && kill -TERM "$(cat "$LOG.pid")"
"""
SCONTROL = """#!/bin/bash
case "$1" in
show) printf 'node7\\nnode8\\n' ;;
requeue) echo "requeue $2" >> "$LOG" ;;
esac
"""


@pytest.fixture
def slurm(tmp_path):
    """The printed script, with stand-ins for Slurm's commands: how it ends, and what they were asked for."""
    for name, text in {"srun": SRUN, "scancel": SCANCEL, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    script = tmp_path / "job.sh"
    script.write_text(clusters.slurm_script(recipe(*TWO), GIVEN))
    told = {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "node[7-8]", "LOG": str(tmp_path / "log"), "HOME": "/"}
    told["PATH"] = f"{tmp_path}:{os.environ['PATH']}"

    def run(slow="none", wrong="none"):
        with subprocess.Popen(["bash", str(script)], env={**told, "SLOW": slow, "WRONG": wrong}) as process:
            while slow != "none" and not Path(f"{told['LOG']}.pid").exists():
                time.sleep(0.02)
            if slow != "none":
                process.send_signal(signal.SIGUSR1)
            code = process.wait(30)
        return code, [
            shlex.split(line) if "it's" not in line else line for line in Path(told["LOG"]).read_text().splitlines()
        ]

    return script, run


def test_the_slurm_script_is_bash_that_asks_for_what_the_recipe_needs(slurm):
    script, _ = slurm
    subprocess.run(["bash", "-n", str(script)], check=True)
    asked = dict(line[8:].partition("=")[::2] for line in script.read_text().splitlines() if line.startswith("#SBATCH "))
    assert (asked["--nodes"], asked["--ntasks-per-node"], asked["--gpus-per-node"]) == ("2", "1", "2")
    assert "--requeue" in asked
    assert asked["--signal"].partition("@")[0] == "B:USR1"
    assert int(asked["--signal"].partition("@")[2]) > launch.GRACE


def test_the_slurm_script_runs_every_stage_in_order_and_meets_at_its_first_node(slurm):
    _, run = slurm
    code, asked = run()
    assert code == 0
    subject = recipe(*TWO)
    assert len(asked) == 1 + len(plan(subject))
    for text, (stage, more) in zip(asked, clusters.steps(subject), strict=True):
        words = launch.command(subject, stage, [*GIVEN, *more], "python")
        assert " ".join(words).replace("node0:29501", "node7:29501") in text
        assert ("--nodelist=node7" in text) == (stage not in launch.MANY)


def test_the_slurm_script_stops_at_a_stage_that_failed(slurm):
    _, run = slurm
    code, asked = run(wrong="reward")
    assert code == 1
    assert "-m reward " in asked[-1]


def test_the_slurm_script_is_requeued_behind_the_checkpoint_that_a_signal_asks_for(slurm):
    _, run = slurm
    code, asked = run(slow="sft")
    assert code == 0
    assert "-m sft " in asked[-3]
    assert asked[-2:] == [["stopped"], ["requeue", "42"]]
