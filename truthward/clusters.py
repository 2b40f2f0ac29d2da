"""What the user of a cluster pastes: each stage's command, for torchrun, DeepSpeed's launcher, or a whole Slurm script.

The words are those of :mod:`truthward.launch`, so that what is printed is what ``truthward run`` starts.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable

from truthward.errors import UserError
from truthward.launch import CHECK, GRACE, MODULES, command, endpoint, on_many
from truthward.ledger import plan
from truthward.tables import Recipe

PYTHON = "python"
HEAD = '"$head:{port}"'  # how Slurm's script names the place to meet
PORT = 29500
ALONE = '--nodes=1 --ntasks=1 --nodelist="$head" '


def steps(recipe: Recipe) -> list[tuple[str, list[str]]]:
    """What a run does one after the other: a stage (or ``evals`` or ``check``) and its own words beside the recipe's."""
    stages = [(this.stage, ["--only", name] if this.stage == "evals" else []) for name, this in plan(recipe).items()]
    return [(CHECK, []), *stages] if on_many(recipe, CHECK) else stages


def torchrun_lines(recipe: Recipe, given: list[str]) -> str:
    """One line a stage. Those on many ranks are for every host, the others for the first.

    Args:
        given: words that name the recipe on a stage's command line.
    """
    return _lines(recipe, lambda stage, more: command(recipe, stage, [*given, *more], PYTHON))


def deepspeed_lines(recipe: Recipe, given: list[str]) -> str:
    """One line a stage, all for the first host, from which DeepSpeed's launcher reaches the others by ssh."""
    table = recipe.launch
    words = ["deepspeed", f"--num_gpus={table.ranks}", "--no_local_rank"]
    if table.hosts > 1:
        host, port = endpoint(table)
        words += [f"--num_nodes={table.hosts}", "--hostfile=hostfile", f"--master_addr={host}", f"--master_port={port}"]

    def started(stage: str, more: list[str]) -> list[str]:
        if not on_many(recipe, stage):
            return command(recipe, stage, [*given, *more], PYTHON)
        return [*words, "--module", MODULES.get(stage, stage), *given, *more]

    return _hostfile(recipe) + _lines(recipe, started, "")


def _hostfile(recipe: Recipe) -> str:
    table = recipe.launch
    if table.hosts == 1:
        return ""
    others = [f"host{number}" for number in range(2, table.hosts + 1)]
    rows = [f"{host} slots={table.ranks}" for host in (endpoint(table)[0], *others)]
    return "\n".join(
        [
            "# put the other hosts' names here; ssh must reach them without a password",
            "cat > hostfile <<END",
            *rows,
            "END",
            "",
        ]
    )


def _lines(recipe: Recipe, words: Callable[[str, list[str]], list[str]], everywhere: str = ": on every host") -> str:
    """Each step's words under its name, and where they are for, if that is more than one place."""
    lines = []
    for stage, more in steps(recipe):
        where = everywhere if on_many(recipe, stage) else ": on the first host"
        lines += [f"# {more[-1] if more else stage}{where if recipe.launch.hosts > 1 else ''}"]
        lines += [shlex.join(words(stage, more))]
    return "\n".join(lines) + "\n"


SCRIPT = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={hosts}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={ranks}
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@{before}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

# The network interface between the hosts, if torch does not find it: ip -brief address
# export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0
export PYTHONUNBUFFERED=1
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# Near the time limit each stage is told to stop. It writes a checkpoint, and the job goes on from there in the queue.
stopping=
trap 'stopping=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

step() {{
    [ -z "$stopping" ] || again
    srun --kill-on-bad-exit=1 "$@" &
    local started=$! code=0
    wait $started || code=$?
    while kill -0 $started 2>/dev/null; do # the signal ended the wait, not the step
        code=0
        wait $started || code=$?
    done
    [ $code -eq 0 ] || [ -z "$stopping" ] || again
    [ $code -eq 0 ] || exit $code
}}

again() {{
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}}

{steps}
"""


def slurm_script(recipe: Recipe, given: list[str]) -> str:
    """A whole ``sbatch`` script: one task a host, torchrun's words under ``srun``, requeued before the time limit."""
    several = recipe.launch.hosts > 1
    place = f"--rdzv-endpoint={recipe.launch.rendezvous}"
    port = endpoint(recipe.launch)[1] if several else PORT

    def srun(stage: str, more: list[str]) -> str:
        words = command(recipe, stage, [*given, *more], PYTHON)
        text = " ".join(
            f"--rdzv-endpoint={HEAD.format(port=port)}" if word == place else shlex.quote(word) for word in words
        )
        alone = several and not on_many(recipe, stage)
        return f"step {ALONE if alone else ''}{text}"

    told = {"name": shlex.quote(recipe.name), "hosts": recipe.launch.hosts, "ranks": recipe.launch.ranks}
    lines = "\n".join(srun(stage, more) for stage, more in steps(recipe))
    return SCRIPT.format(**told, before=GRACE + 60, steps=lines)


PRINTERS = {"torchrun": torchrun_lines, "deepspeed": deepspeed_lines, "slurm": slurm_script}


def printed(recipe: Recipe, given: list[str], kind: str) -> str:
    """The lines for one kind of launcher.

    Raises:
        UserError: the recipe does not say where hosts meet, or runs on one process.
    """
    if recipe.launch.hosts > 1:
        endpoint(recipe.launch)
    if recipe.launch.world == 1 and kind == "deepspeed":
        fix = f"set launch.ranks, or use: truthward run {shlex.join(given)}"
        raise UserError("the recipe runs on one process", where="launch.ranks", fix=fix)
    return PRINTERS[kind](recipe, given)
