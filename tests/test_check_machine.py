"""The machine, memory, storage, ranks and servers: mistakes planted one by one, predictions beside what is measured."""

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import commands
import pytest
import torch
import torch.multiprocessing as processes
from check_lab import Planted, assert_found, facts, find, ids
from lab import ROOT

from truthward import hardware
from truthward.check import machine, ranks
from truthward.check.facts import KNOWN, Shape
from truthward.check.machine import Machine
from truthward.check.memory import GB, States, activations, predict, sharded
from truthward.check.ranks import Link

HERE = Machine(cores=4, memory=64 * GB, gpus=0, gpu_memory=0)

MADE = {"parents": {}, "recipe": {"name": "laptop", "stages": ["sft"], "model": {"base": "x"}}}


@pytest.fixture(autouse=True)
def _a_known_machine(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(Machine, "here", classmethod(lambda _: HERE))
    monkeypatch.setattr(hardware, "measure_dtypes", lambda: {"float32": 100.0, "bfloat16": 10.0})


EIGHT = ["launch.ranks=8", *(f"{k}.batch_size=32" for k in ("sft", "reward", "dpo")), "ppo.rollouts=64"]
DEEPSPEED = ["launch.ranks=2", "launch.zero=2"]
PLANTED = [
    Planted("machine-other", "note", "launch", "no GPU here", DEEPSPEED),
    Planted("ranks-many", "error", "launch.ranks", "8 ranks on 4 cores", EIGHT),
    Planted("threads-many", "error", "model.threads", "16 threads on 4 cores", ["model.threads=16"]),
    Planted("threads-many", "error", "model.threads", "2 x 3 threads", ["launch.ranks=2", "model.threads=3"]),
    Planted("package-absent", "error", "evals.lm_eval", "lm_eval", ['evals.lm_eval=["arc_easy"]']),
    Planted("dtype-slow", "warning", "model.dtype", "10 times slower", ['model.dtype="bfloat16"']),
    Planted("memory-short", "error", "ppo.micro_batch_size", "GB of 64", ["ppo.micro_batch_size=512", "ppo.rollouts=1024"]),
    Planted("memory-short", "error", "model.base", "the base alone", ["model.base=some-org/model-70b"]),
    Planted("time-needed", "note", "stages", "h here", ["dpo.epochs=500.0"]),
]


@pytest.mark.parametrize("planted", PLANTED, ids=ids(PLANTED))
def test_what_a_machine_cannot_do_is_found(planted, tmp_path):
    if planted.rule == "time-needed":
        found = [f.what for f in find("time-needed", facts("laptop", planted.changes))]
        assert " h here" in found[0]
        assert " min here" in find("time-needed", facts("laptop", []))[0].what
    else:
        assert_found(planted, tmp_path)


def test_a_slow_compute_type_is_not_found_where_it_is_fast(monkeypatch):
    monkeypatch.setattr(hardware, "measure_dtypes", lambda: {"float32": 100.0, "bfloat16": 400.0})
    assert find("dtype-slow", facts("laptop", ['model.dtype="bfloat16"'])) == []
    (finding,) = find("dtype-faster", facts("laptop", ['model.dtype="float32"']))
    assert (finding.level, "4.0 times faster" in finding.what) == ("note", True)


def test_what_was_left_to_another_machine_is_judged_when_the_run_is_to_start_here(monkeypatch):
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None)
    assert find("package-absent", facts("laptop", DEEPSPEED)) == []
    (finding,) = find("package-absent", facts("laptop", DEEPSPEED, launching=True))
    assert (finding.level, finding.where) == ("error", "launch.zero")


def test_a_full_disk_is_found_with_what_is_needed(monkeypatch):
    usage = namedtuple("usage", "total used free")
    assert find("disk-short", facts("laptop", [])) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**40, 2**40, 2**30))
    (finding,) = find("disk-short", facts("laptop", []))
    assert finding.level == "error"
    assert "1.0 GB are free" in finding.what
    (more,) = find("disk-short", facts("laptop", ['sft.tune="full"']))
    needed = [float(f.what.split("about ")[1].removesuffix(" GB")) for f in (finding, more)]
    assert needed[1] > needed[0] + 2  # two checkpoints of 135M parameters with both moments


# --------------------------------------------------------------------------------------------------------------- storage


def test_a_place_that_loses_bits_is_found(monkeypatch):
    import safetensors.torch

    whole = safetensors.torch.load_file
    assert find("storage-unfit", facts("laptop", [])) == []
    monkeypatch.setattr(safetensors.torch, "load_file", lambda path: {n: t.half() for n, t in whole(path).items()})
    (finding,) = find("storage-unfit", facts("laptop", []))
    assert (finding.level, "comes back changed" in finding.what) == ("error", True)


def test_a_place_without_locks_is_found(monkeypatch):
    monkeypatch.setattr(machine.fcntl, "flock", lambda *_: None)
    assert "the same lock" in find("storage-unfit", facts("laptop", []))[0].what


def test_a_place_where_nothing_can_be_written_is_found(monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(machine.tempfile, "TemporaryDirectory", refuse)
    assert "Permission denied" in find("storage-unfit", facts("laptop", []))[0].what


def test_the_round_trip_leaves_nothing_behind(tmp_path):
    assert find("storage-unfit", facts("laptop", [f"runs={tmp_path}"])) == []
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------- memory


def test_states_are_shared_out_as_in_the_zero_paper():
    """7.5B parameters, mixed precision with Adam, 64 ranks: 120, 31.4, 16.6 and 1.9 GB (Rajbhandari et al., fig. 1)."""
    states = States(frozen=0, trained=7.5e9, weight=2, gradient=2, optimizer=12)
    totals = [sum(sharded(states, stage, 64)) / 1e9 for stage in range(4)]
    assert totals == pytest.approx([120, 31.4, 16.6, 1.9], abs=0.05)


def test_frozen_weights_are_shared_at_stage_three_alone_and_a_layer_is_whole():
    states = States(frozen=16e9, trained=1e7, weight=4, gradient=4, optimizer=8)
    assert sharded(states, 2, 8)[0] == 16e9 + 4e7
    assert sharded(states, 3, 8, layer=5e8)[0] == pytest.approx((16e9 + 4e7) / 8 + 5e8)
    assert sharded(states, 3, 1, layer=5e8) == sharded(states, 0, 1)


@pytest.mark.parametrize("name", KNOWN)
def test_the_shape_of_a_known_base_counts_its_parameters(name):
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**KNOWN[name]))
    assert Shape.of(KNOWN[name]).parameters == sum(p.numel() for p in model.parameters())


def test_an_adapter_has_as_many_parameters_as_peft_gives_it(tiny):
    import copy

    from peft import get_peft_model

    from truthward import models

    adapted = get_peft_model(copy.deepcopy(tiny[0]), models.lora_config(4, 8))
    assert Shape.of(KNOWN["tiny-random"]).adapter(4) == sum(p.numel() for n, p in adapted.named_parameters() if "lora_" in n)


def kept_by_autograd(model, **inputs):
    """Bytes that a forward pass keeps for the backward pass, beside parameters."""
    own, seen = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        hidden = model.get_base_model().get_decoder()(**inputs, use_cache=False).last_hidden_state
    return sum(size for place, size in seen.items() if place not in own), hidden


@pytest.mark.parametrize("trees", [0, 4])
def test_activations_are_counted_as_autograd_keeps_them(trees):
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from truthward import models
    from truthward.branches import Item, attend_by_tree, plant
    from truthward.products import quicken

    config = {**KNOWN["smollm2-135m-instruct"], "num_hidden_layers": 2, "vocab_size": 64}
    model = attend_by_tree(quicken(LlamaForCausalLM(LlamaConfig(**config)))).requires_grad_(False)
    adapted = quicken(get_peft_model(model, models.lora_config(16, 32))).train()
    if trees:
        forest = plant([Item([1] * 30, [[2] * 10] * 6)] * trees)
        inputs, longest = forest.inputs(torch.float32), forest.sees.shape[2]
        tokens = forest.ids.shape[1]
    else:
        tokens = longest = 256
        inputs = {"input_ids": torch.ones(1, 256, dtype=torch.long), "position_ids": torch.arange(64).repeat(4)[None]}
    measured, _hidden = kept_by_autograd(adapted, **inputs)
    counted = activations(Shape.of(config), tokens, longest, trees, rank=16, width=4)
    assert counted == pytest.approx(measured, rel=0.03)


def test_predictions_grow_with_what_they_are_made_of():
    few, many = (predict(facts("laptop", [f"dpo.micro_batch_size={n}"]), "dpo", "cpu", 4) for n in (2, 8))
    assert many.activations > 3 * few.activations
    assert many[:4] == few[:4]
    lora, full = (predict(facts("laptop", [f'sft.tune="{t}"']), "sft", "cpu", 4) for t in ("lora", "full"))
    assert full.optimizer / lora.optimizer == pytest.approx(134_515_008 / 4_884_480)
    named = facts("cluster-8b", ["model.base=some-org/model-8b"])
    assert predict(named, "sft", "cuda", 2) is None  # only its number of parameters is known


@pytest.mark.slow
def test_a_prediction_is_near_what_a_stage_takes(tmp_path):
    changes = [f"runs={tmp_path}", "unexplained=warn", 'stages=["base","sft","dpo"]', 'evals.models=["ppo"]']
    changes += ['dpo.preferences=["data/truth/dev"]']
    changes += [f"{stage}.{size}" for stage in ("sft", "dpo") for size in ("micro_batch_size=1", "batch_size=4")]
    commands.run("truthward", "run", "recipes/tiny.toml", *changes, timeout=550).check_returncode()
    for stage in ("sft", "dpo"):
        (manifest,) = [json.loads(p.read_text()) for p in tmp_path.glob(f"tiny/{stage}-*/manifest.json")]
        predicted = predict(facts("tiny", changes), stage, "cpu", 4)
        assert predicted.total / GB == pytest.approx(manifest["peak_memory_gb"], rel=0.2)  # 0.1 where docs/check.md says


# ----------------------------------------------------------------------------------------------------------------- ranks


def test_the_odd_rank_is_named_with_its_host():
    same = {"recipe": "a", "data": "b", "code": "c", "packages": "d", "python": "e"}
    assert list(ranks.differences([same] * 3, ["x", "y", "z"])) == []
    for part in same:
        (finding,) = ranks.differences([same, {**same, part: "other"}, same], ["x", "y", "z"])
        assert (finding.rule, finding.level) == ("ranks-differ", "error")
        assert f"the {part} of rank 1 on y differs" in finding.what


def test_the_slowest_link_is_named():
    links = [Link(0, 1, 5e-5, 1e10), Link(0, 2, 5e-5, 1e9), Link(1, 2, 5e-3, 1e10)]
    slow, late, summary = ranks.judge_links(links, ["x", "y", "z"])
    assert "ranks 0 (x) and 2 (z): 1.0 GB/s, a good link here 10.0 GB/s" in slow.what
    assert "ranks 1 (y) and 2 (z): a message takes 5.00 ms, on a good link here 0.05 ms" in late.what
    assert (slow.rule, summary.level) == ("link-slow", "note")
    even = [Link(a, b, 5e-5, 1e10) for a, b in ((0, 1), (0, 2), (1, 2))]
    assert [f.rule for f in ranks.judge_links(even, ["x", "y", "z"])] == ["links"]


def _confer(rank, folder, odd):
    import time

    import torch.distributed as dist

    os.chdir(ROOT)
    changes = ["dpo.beta=0.2"] if rank == odd else []
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3)
    if rank == 2:  # a rank whose messages take long
        plain = dist.send

        def late(*words):
            time.sleep(0.02)
            plain(*words)

        dist.send = late
    found = ranks.confer(facts("laptop", changes).recipe)
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps([[f.rule, f.what] for f in found]))
    dist.destroy_process_group()


@pytest.mark.parametrize("odd", [1, None])
def test_three_processes_compare_what_they_run_and_find_the_slow_link(tmp_path, odd):
    processes.start_processes(_confer, args=(str(tmp_path), odd), nprocs=3, start_method="spawn")
    found = json.loads((tmp_path / "found.json").read_text())
    differ = [what for rule, what in found if rule == "ranks-differ"]
    assert ["the recipe of rank 1" in what for what in differ] == ([True] if odd else [])
    late = ["2 (" in what for rule, what in found if rule == "link-slow"]
    assert set(late) == {True}


def test_two_ranks_are_started_and_heard(monkeypatch):
    found = find("links", facts("laptop", ["launch.ranks=2", "model.threads=1"], launching=True))
    assert "1 links" in found[0].what


def test_ranks_that_do_not_answer_are_found(monkeypatch):
    monkeypatch.setattr(ranks.sys, "executable", shutil.which("false"))
    found = find("ranks-silent", facts("laptop", ["launch.ranks=2"], launching=True))
    assert [(f.level, f.where) for f in found] == [("error", "launch.ranks")]


def test_a_server_that_is_not_there_is_found_before_a_launch():
    served = ['ppo.engine="openai"', 'ppo.engine_url="http://127.0.0.1:1/v1"']
    (found,) = find("engine-silent", facts("laptop", served, launching=True))
    assert (found.level, found.where) == ("warning", "ppo.engine_url")  # PPO does not come next
    assert find("engine-silent", facts("laptop", served)) == []
