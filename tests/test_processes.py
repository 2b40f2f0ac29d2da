"""Forked commands: they begin as in a fresh interpreter, end as a subprocess does, and compute the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import commands
import pytest
import torch
from commands import environment
from lab import ROOT
from safetensors.torch import load_file

from truthward import cli, processes, stage
from truthward.ledger import Run, plan
from truthward.tracking import read_metrics

PROBE = """
import atexit, json, os, random, signal, sys, threading, time

word = sys.argv[1]
if word == "about":
    shown = ("TRUTHWARD_A", "TRUTHWARD_B", "HOME")
    found = {"argv": sys.argv, "cwd": os.getcwd(), "path": sys.path[0], "environment": {n: os.environ.get(n) for n in shown}}
    found |= {"stdin": sys.stdin.read(), "threads": threading.active_count(), "name": __name__}
    found |= {"main": sys.modules["__main__"].word, "terminal": [f.isatty() for f in (sys.stdin, sys.stdout, sys.stderr)]}
    found |= {"signals": [str(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]}
    found |= {"blocked": [str(n) for n in signal.pthread_sigmask(signal.SIG_BLOCK, [])]}
    print(json.dumps(found))
elif word == "code":
    print("a line before it ends", file=sys.stderr)
    atexit.register(print, "at exit")
    sys.exit(7)
elif word == "text":
    sys.exit("a last word")
elif word == "error":
    raise ValueError("no such thing")
elif word == "thread":
    threading.Thread(target=lambda: (time.sleep(0.2), print("the thread"))).start()
elif word in ("SIGKILL", "SIGTERM", "SIGINT"):
    os.kill(os.getpid(), signal.Signals[word])
    time.sleep(10)
elif word == "handler":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))
    open("up", "w").close()
    time.sleep(30)
elif word == "number":
    print(random.random())
elif word == "parent":
    print(os.getppid(), flush=True)
elif word == "nested":
    from truthward import processes
    sys.exit(processes.call([sys.executable, "-m", "probe", *sys.argv[2:]]))
elif word == "twice":
    with open("begun", "a") as file:
        print(time.monotonic(), file=file)
    while not os.path.exists("go"):
        time.sleep(0.01)
    with open("ended", "a") as file:
        print(time.monotonic(), file=file)
"""


@pytest.fixture
def probe(tmp_path, monkeypatch) -> Path:
    """A folder with a module, without the variables that differ from test to test."""
    (tmp_path / "probe.py").write_text(PROBE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def light():
    """A server that loads next to nothing."""
    server = processes.Server(environment(), ["json", "numpy"])
    yield server
    server.close()
    assert server.process.wait(10) == 0, "it ends when nobody can ask it any more"


@pytest.fixture
def server(light, monkeypatch):
    monkeypatch.setattr(processes, "server", light)
    return light


HEARS_CTRL_C = signal.getsignal(signal.SIGINT) is not signal.SIG_IGN  # which a shell sets for what it runs behind it


def outcome(folder: Path, *words: str, env: dict[str, str] | None = None, forked: bool = True) -> tuple[int, str, str]:
    """Exit code, output and error output of the probe."""
    (folder / "in").write_text("one\ntwo\n")
    with open(folder / "in") as given, open(folder / "out", "w+") as out, open(folder / "err", "w+") as err:
        stdio = (given.fileno(), out.fileno(), err.fileno())
        command = [sys.executable, "-m", "probe", *words]
        with processes.start(command, env or environment(), stdio=stdio) as process:
            assert isinstance(process, processes.Forked) == forked
            code = process.wait(60)
        out.seek(0)
        err.seek(0)
        return code, out.read(), err.read()


def wait_for(path: Path, lines: int = 0) -> None:
    until = time.monotonic() + 60
    while not path.exists() or path.read_text().count("\n") < lines:
        assert time.monotonic() < until
        time.sleep(0.01)


# ------------------------------------------------------------------------------------------------ like a plain subprocess


@pytest.mark.parametrize("word", ["about", "code", "text", "thread", "SIGKILL", "SIGTERM", "SIGINT", "error"])
def test_a_forked_command_begins_and_ends_as_a_plain_one_does(server, probe, monkeypatch, word):
    if word == "SIGINT" and not HEARS_CTRL_C:
        pytest.skip("SIGINT is ignored here")
    words, env = [word, "--more", "x=ü"], environment(TRUTHWARD_A="1")
    code, out, err = outcome(probe, *words, env=env)
    monkeypatch.setattr(processes, "server", None)
    plain = outcome(probe, *words, env=env, forked=False)
    assert (code, out) == plain[:2]
    assert err.splitlines()[-1:] == plain[2].splitlines()[-1:]
    assert code == {"code": 7, "text": 1, "error": 1}.get(word, -signal.Signals[word] if word.startswith("SIG") else 0)
    if word == "about":
        assert json.loads(out)["environment"] | {"HOME": ""} == {"TRUTHWARD_A": "1", "TRUTHWARD_B": None, "HOME": ""}


def test_a_signal_reaches_the_command_and_its_handler(server, probe):
    with processes.start([sys.executable, "-m", "probe", "handler"], environment()) as process:
        wait_for(probe / "up")
        process.terminate()
        assert process.wait(30) == 9
        process.kill()  # of no effect once it has ended


def test_a_command_that_takes_too_long_goes_on_until_it_is_killed(server, probe):
    with processes.start([sys.executable, "-m", "probe", "handler"], environment()) as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.1)
        process.kill()
        assert process.wait(30) == -signal.SIGKILL


def test_forked_commands_draw_different_random_numbers(server, probe):
    assert outcome(probe, "number") != outcome(probe, "number")


def test_what_a_forked_command_starts_comes_from_the_same_server(server, probe):
    _, own, _ = outcome(probe, "parent")
    code, nested, _ = outcome(probe, "nested", "parent")
    assert (code, nested, int(own)) == (0, own, server.process.pid)
    assert outcome(probe, "nested", "SIGKILL")[0] == 256 - signal.SIGKILL


def test_training_gives_the_same_bits(lab, tmp_path):
    """On two threads, and begun by the words that a user would type."""
    found = []
    for name in ("plain", "forked"):
        world = lab.copy(tmp_path / name)
        words = ["sft", str(world.home / "lab.toml"), "sft.epochs=3", "model.threads=2"]
        recipe = world.recipe(*words[2:])
        env = environment(**{stage.CHECKED: stage.plan_digest(recipe)})
        if name == "plain":
            subprocess.run([sys.executable, "-m", *words], cwd=ROOT, env=env, check=True, capture_output=True, timeout=300)
        else:
            assert commands.run(*words, env=env).returncode == 0
            assert isinstance(processes.server, processes.Server)
        run = Run.load(plan(recipe)["sft"].path)
        metrics = [{k: v for k, v in r.items() if not k.startswith(("seconds/", "gemm_share/"))} for r in read_metrics(run)]
        found.append((load_file(run.model_dir / "adapter_model.safetensors"), metrics))
    (plain, logged), (forked, logged_too) = found
    assert plain.keys() == forked.keys() != set()
    assert all(torch.equal(plain[key], forked[key]) for key in plain)
    assert logged == logged_too != []


# ------------------------------------------------------------------------------------------------------- when it is lost


def test_a_command_whose_server_is_killed_is_started_again_once_it_has_ended(probe):
    lost = processes.Server(environment(), ["json"])
    with processes.Forked(lost, [sys.executable, "-m", "probe", "twice"], environment(), probe, (0, 1, 2)) as process:
        wait_for(probe / "begun", 1)
        lost.process.kill()
        lost.process.wait()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)  # it goes on alone
        (probe / "go").touch()
        assert process.wait(30) == 0
    begun, ended = ([float(line) for line in (probe / name).read_text().split()] for name in ("begun", "ended"))
    assert len(begun) == len(ended) == 2
    assert begun[1] > ended[0]


def test_a_command_that_was_told_to_stop_is_not_started_again(probe):
    lost = processes.Server(environment(), ["json"])
    with processes.Forked(lost, [sys.executable, "-m", "probe", "twice"], environment(), probe, (0, 1, 2)) as process:
        wait_for(probe / "begun", 1)
        lost.process.kill()
        lost.process.wait()
        process.terminate()
        assert process.wait(30) == -signal.SIGTERM
    assert not (probe / "ended").exists()


@pytest.mark.parametrize("libraries", [["json"], ["no_such_library"]])
def test_without_a_server_commands_are_started_plainly(probe, monkeypatch, libraries):
    lost = processes.Server(environment(), libraries)
    if libraries == ["json"]:
        lost.process.kill()
    monkeypatch.setattr(processes, "server", lost)
    assert outcome(probe, "code", forked=False) == (7, "at exit\n", "a line before it ends\n")
    assert processes.server is None
    lost.process.wait()


@pytest.mark.skipif(not HEARS_CTRL_C, reason="SIGINT is ignored here")
def test_ctrl_c_ends_all_and_the_server_says_nothing(probe):
    script = "import sys\nfrom truthward import processes\nprocesses.server = processes.Server(libraries=['json'])\n"
    script += "sys.exit(processes.call([sys.executable, '-m', 'probe', 'handler']))"
    words = [sys.executable, "-c", script]
    with subprocess.Popen(words, start_new_session=True, stderr=subprocess.PIPE, text=True) as process:
        wait_for(probe / "up")
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=60)[1]  # ends with the last process that could write: the server is gone too
    assert process.returncode == -signal.SIGINT
    assert said.count("Traceback") <= 2  # of the command and of who waited for it


# ------------------------------------------------------------------------------------------------- where none is started


def test_another_environment_is_not_for_the_server(server, probe):
    assert outcome(probe, "code", env=environment(OMP_NUM_THREADS="3"), forked=False)[0] == 7
    assert server.fits(environment(TRUTHWARD_CHECKED="x"))


def test_what_is_no_command_of_ours_or_has_its_own_session_is_not_forked(server, probe):
    for words, options in (["-c", "0"], {}), (["-m", "probe", "text"], {"new_session": True}):
        with processes.start([sys.executable, *words], environment(), **options) as process:
            assert isinstance(process, subprocess.Popen)


def test_nothing_is_forked_beside_a_gpu_or_on_another_system(monkeypatch, tmp_path):
    assert processes.forkable() == (sys.platform == "linux")
    with monkeypatch.context() as patch:
        patch.setattr(processes, "GPUS", (str(tmp_path),))
        assert not processes.forkable()
    for name in ("darwin", "win32"):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "platform", name)
            assert not processes.forkable()
    monkeypatch.delattr(os, "pidfd_open", raising=False)
    assert not processes.forkable()


def test_a_run_that_is_up_to_date_starts_no_server(monkeypatch):
    monkeypatch.setattr(cli, "_settled", lambda _: True)
    monkeypatch.setattr(cli, "_report", lambda _: None)
    monkeypatch.setattr(processes, "serve", lambda: pytest.fail("a server is started"))
    monkeypatch.chdir(ROOT)
    options = stage.arguments("run").parse_args(["recipes/tiny.toml"])
    cli._run(options)
