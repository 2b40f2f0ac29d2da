"""Rules on the machine that would run the recipe: compute type, threads, memory, disk, time, what its file system keeps."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from truthward.check.facts import TRAINED, Facts
from truthward.check.findings import Found, error, note, rule, warning
from truthward.check.memory import GB, Memory, predict

FULL = 0.85  # share of the memory over which a prediction within 10 % may miss it
SHARE = 0.4  # of the speed of a plain matrix product that training reaches (docs/check.md)
KEPT = 2  # checkpoints that a trainer keeps
ROOM = 2 * GB  # rows, evals, logs


class Machine(NamedTuple):
    """What this machine has; memory in bytes."""

    cores: int
    memory: int
    gpus: int
    gpu_memory: int

    @classmethod
    def here(cls) -> Machine:
        import torch

        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        on_gpu = torch.cuda.get_device_properties(0).total_memory if gpus else 0
        return cls(len(os.sched_getaffinity(0)), _free_memory(), gpus, on_gpu)


def _free_memory() -> int:
    """What a new process could take: free memory, or what a container leaves of its limit."""
    free = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = 1024 * int(line.split()[1])
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        return min(free, int(limit) - int(used)) if limit != "max" else free
    except (OSError, ValueError):
        return free


def elsewhere(facts: Facts, machine: Machine) -> bool:
    """Whether the recipe is evidently for another machine: DeepSpeed on several ranks, and no GPU here."""
    launch = facts.recipe.launch
    return not facts.launching and launch.world > 1 and launch.zero > 0 and not machine.gpus


@rule("machine-other", "threads-many", "ranks-many", "package-absent")
def processes(facts: Facts) -> Found:
    """Processes, threads and packages against what there is."""
    recipe, machine = facts.recipe, Machine.here()
    ranks, threads = recipe.launch.ranks, recipe.model.threads
    if elsewhere(facts, machine):
        text = f"{recipe.launch.world} ranks under DeepSpeed, and no GPU here"
        why = "compute type, memory, disk, time and links are judged where it will run"
        yield note("machine-other", "launch", text, why=why, fix="run truthward check there too")
        return
    most, what = (machine.gpus, "GPUs") if machine.gpus else (machine.cores, "cores")
    if ranks > most:
        text = f"{ranks} ranks on {most} {what}"
        yield error(
            "ranks-many", "launch.ranks", text, why="they would wait for each other", fix=f"set it to {most} or less"
        )
    elif not machine.gpus and threads * ranks > machine.cores:  # 0 shares the cores out
        text = f"{ranks} x {threads} threads on {machine.cores} cores"
        why = "threads that outnumber cores make products many times slower"
        yield error("threads-many", "model.threads", text, why=why, fix=f"set it to {max(1, machine.cores // ranks)}")
    needs = {"deepspeed": ("launch.zero", recipe.launch.zero), "lm_eval": ("evals.lm_eval", recipe.evals.lm_eval)}
    for package, (key, wanted) in needs.items():
        if wanted and importlib.util.find_spec(package) is None:
            text = f"the package {package} is not installed"
            fix = 'pip install "truthward[cluster]"' if package == "deepspeed" else "pip install lm-eval"
            yield error("package-absent", key, text, why="a stage would stop at it", fix=fix)


def speeds_here() -> dict[str, float]:
    """GFLOP/s by compute type, with all cores; measured once."""
    from truthward.hardware import measure_dtypes, use_threads

    use_threads(0)
    return measure_dtypes()


@rule("dtype-slow", "dtype-faster")
def compute_type(facts: Facts) -> Found:
    """The recipe's compute type against what this machine is fast at."""
    wanted = facts.recipe.model.dtype
    if wanted == "auto" or facts.toy or elsewhere(facts, Machine.here()):
        return
    speeds = speeds_here()
    other = "float32" if wanted == "bfloat16" else "bfloat16"
    ratio = speeds[other] / speeds[wanted]
    measured = ", ".join(f"{name} {speed:.0f} GFLOP/s" for name, speed in speeds.items())
    if wanted == "bfloat16" and ratio > 1.25:
        why = "without instructions for it bfloat16 is emulated"
        text = f"bfloat16 is {ratio:.0f} times slower than float32 here: {measured}"
        yield warning("dtype-slow", "model.dtype", text, why=why, fix='set it to "auto" or "float32"')
    elif wanted == "float32" and ratio > 1.5:
        text = f"bfloat16 is {ratio:.1f} times faster here: {measured}"
        yield note("dtype-faster", "model.dtype", text, fix='"auto" would take it')


def chosen_width(facts: Facts) -> int:
    """Bytes of the compute type that a run would take."""
    wanted = facts.recipe.model.dtype
    if wanted != "auto":
        return 4 if wanted == "float32" else 2
    speeds = speeds_here()
    return 2 if speeds["bfloat16"] >= 1.5 * speeds["float32"] else 4


def predictions(facts: Facts, machine: Machine) -> dict[str, Memory]:
    """Peak memory of a rank, by stage."""
    width = chosen_width(facts)
    found = {stage: predict(facts, stage, "cuda" if machine.gpus else "cpu", width) for stage, _ in facts.uses(*TRAINED)}
    return {stage: memory for stage, memory in found.items() if memory}


@rule("memory-short")
def memory(facts: Facts) -> Found:
    """Predicted peaks against what is free."""
    machine = Machine.here()
    if elsewhere(facts, machine):
        return
    ranks = 1 if machine.gpus else facts.recipe.launch.ranks
    room = machine.gpu_memory if machine.gpus else machine.memory
    why = "the stage would be killed in its midst"
    for stage, predicted in predictions(facts, machine).items():
        share = predicted.total * ranks / room
        if share > FULL:
            tell = error if share > 1.1 else warning
            parts = ", ".join(f"{n} {v / GB:.1f}" for n, v in predicted._asdict().items() if v > 0.05 * GB)
            text = f"{stage} will take about {share * room / GB:.1f} GB of {room / GB:.1f} ({parts})"
            fix = (
                f"lower {stage}.micro_batch_size" if predicted.activations > predicted.weights else "more ranks under ZeRO-3"
            )
            yield tell("memory-short", f"{stage}.micro_batch_size", text, why=why, fix=fix)
    held = chosen_width(facts) * facts.shape.parameters
    if machine.gpus and held > FULL * room:
        text = f"constitution and evals hold the whole model in one process: {held / GB:.1f} GB of {room / GB:.1f}"
        yield error("memory-short", "model.base", text, why=why, fix="take a smaller base, or a GPU with more memory")
    whole = 4 * facts.shape.parameters
    if not facts.shape.layers and whole > machine.memory:
        text = f"the base alone is {whole / GB:.0f} GB in fp32, in which it is merged; {machine.memory / GB:.1f} are free"
        yield error("memory-short", "model.base", text, why=why, fix="take a smaller base, or a larger machine")


@rule("disk-short")
def disk(facts: Facts) -> Found:
    """Everything that the runs will write, checkpoints included, against what is free."""
    machine = Machine.here()
    if elsewhere(facts, machine):
        return
    needed, where = bytes_written(facts), existing(Path(facts.recipe.runs))
    free = shutil.disk_usage(where).free
    if free < needed:
        text = f"{free / GB:.1f} GB are free, a run needs about {needed / GB:.1f}"
        yield error("disk-short", str(where), text, why="a stage would stop at a checkpoint", fix="make room")


def bytes_written(facts: Facts) -> float:
    """Of all stages that are not complete: base, adapters or weights, and as many checkpoints as are kept at once."""
    shape, total = facts.shape, float(ROOM)
    if "base" in facts.recipe.stages and not facts.run("base").done:
        total += 4 * shape.parameters
    for stage, table in facts.uses(*TRAINED):
        if not facts.run(stage).done:
            trained = shape.adapter(table.lora_rank) if table.tune == "lora" else shape.parameters
            total += 4 * trained + KEPT * 12 * trained  # weights; and with both moments
    return total


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(p for p in [path.absolute(), *path.absolute().parents] if p.exists())


@rule("storage-unfit")
def storage(facts: Facts) -> Found:
    """A small checkpoint written, locked, renamed and read back where the runs will be: the same bits, or it is no place."""
    where = existing(Path(facts.recipe.runs))
    fix = "put recipe.runs on a local disk, or give write permission"
    try:
        if fault := _round_trip(where):
            yield error("storage-unfit", str(where), fault, why="a run could not go on from its checkpoints", fix=fix)
    except OSError as fault:
        text = f"nothing can be written there: {fault}"
        yield error("storage-unfit", str(where), text, why="a run keeps its record there", fix=fix)


def _round_trip(where: Path) -> str:
    """What is wrong with a place to keep runs; empty if nothing is."""
    import torch
    from safetensors.torch import load_file, save_file

    from truthward.ledger import whole_directory

    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(64, 64, generator=generator)
    tensors = {"float32": drawn, "bfloat16": drawn.bfloat16(), "step": torch.tensor(7)}
    with tempfile.TemporaryDirectory(prefix=".check-", dir=where) as scratch:
        for _ in range(2):  # the second replaces the first, as checkpoints do
            with whole_directory(Path(scratch) / "checkpoint") as folder:
                save_file(tensors, folder / "state.safetensors")
        back = load_file(Path(scratch) / "checkpoint" / "state.safetensors")
        for name, tensor in tensors.items():
            if name not in back or back[name].dtype != tensor.dtype or not torch.equal(back[name], tensor):
                return f"a tensor of {name} comes back changed"
        with open(Path(scratch) / "lock", "w") as one, open(Path(scratch) / "lock", "w") as two:
            fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return ""
            return "two processes can hold the same lock, so that two could train in one directory"


@rule("time-needed")
def time_needed(facts: Facts) -> Found:
    """How long training will take here, from its tokens and the speed of this machine's products."""
    machine = Machine.here()
    if elsewhere(facts, machine) or facts.toy or not facts.shape.parameters:
        return
    rate = speed(facts)
    seconds = {stage: flops(facts, stage) / rate for stage, _ in facts.uses(*TRAINED) if not facts.run(stage).done}
    if known := {stage: s for stage, s in seconds.items() if s}:
        parts = ", ".join(f"{stage} {_spoken(s)}" for stage, s in known.items())
        text = f"training takes about {_spoken(sum(known.values()))} here ({parts}), writing rows and evals apart"
        yield note("time-needed", "stages", text)


def speed(facts: Facts) -> float:
    """Operations a second at which the whole launch trains: of its GPUs, or of all cores of its hosts."""
    launch, gpus = facts.recipe.launch, Machine.here().gpus
    each = speeds_here()["bfloat16" if chosen_width(facts) == 2 else "float32"] * 1e9 * SHARE
    return each * (min(gpus, launch.ranks) if gpus else 1) * launch.hosts


def flops(facts: Facts, stage: str) -> float:
    """Of all passes over a stage's rows: 2 a parameter and token forward, as much back to the inputs, and again to weights
    that are trained (Kaplan et al. 2020, arXiv 2001.08361, section 2.1)."""
    table, parameters = getattr(facts.recipe, stage), facts.shape.parameters
    passes = 4 if table.tune == "lora" else 6
    if stage == "ppo":
        row = sum(facts.lengths([text for _, text in _prompts(facts)])) / max(1, len(_prompts(facts))) + table.max_new_tokens
        scored, updated = 4 * 2, table.epochs * passes * (2 if table.advantage == "gae" else 1)
        return table.iterations * table.rollouts * row * parameters * (scored + 2 + updated)
    tokens, reference = sum(facts.tokens(stage)), 0
    if stage == "dpo":
        reference = 2
        if replayed := facts.replayed(stage):
            answered = sum(replayed) / len(replayed) + table.replay_tokens
            tokens += int(len(facts.tokens(stage)) * table.replay_share * answered)
    return tokens * parameters * (table.epochs * passes + reference)


def _prompts(facts: Facts) -> list[tuple[str, str]]:
    from truthward.records import Prompt

    return [("ppo", p.prompt) for p in facts.rows(facts.recipe.ppo.prompts, Prompt)]


def _spoken(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
