"""Who may import whom, and how long things may be. Every rule is also shown to fail on a planted violation."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = ("sft", "reward", "constitution", "rl", "evals")
PACKAGES = ("truthward", *STAGES)
LOSSES = ("reward/losses.py", "rl/losses.py", "rl/advantages.py")
PURE = {"torch", "typing", "__future__"}


def sources(root: Path, packages: tuple[str, ...] = PACKAGES) -> list[Path]:
    return sorted(path for package in packages for path in (root / package).rglob("*.py"))


def imported(path: Path, root: Path) -> set[str]:
    """Full names of all that a file imports anywhere in it: late, relative and by ``import_module("…")`` as well."""
    package = path.relative_to(root).parent.parts
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            head = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*head, *filter(None, [node.module])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                names.add(str(node.args[0].value))
    return names


def crossings(root: Path) -> list[str]:
    """Imports of a stage from another stage, or from what the stages share."""
    found = []
    for path in sources(root):
        package = path.relative_to(root).parts[0]
        tops = {name.split(".")[0] for name in imported(path, root)}
        found += [f"{path.relative_to(root)} imports {top}" for top in sorted(tops & set(STAGES) - {package})]
    return found


def impure_losses(root: Path) -> list[str]:
    """What the loss files import beside torch, typing and ``truthward.tensors``."""
    found = []
    for name in LOSSES:
        for module in sorted(imported(root / name, root)):
            if module.split(".")[0] not in PURE and f"{module}.".startswith("truthward.tensors.") is False:
                found.append(f"{name} imports {module}")
    return found


def too_long(root: Path, packages: tuple[str, ...] = (*PACKAGES, "tests")) -> list[str]:
    """Files over 400 lines, and functions over 60 in the packages."""
    found = []
    for path in sources(root, packages):
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > 400:
            found.append(str(path.relative_to(root)))
        for node in ast.walk(ast.parse(text)) if path.relative_to(root).parts[0] != "tests" else []:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno + 1 > 60:
                found.append(f"{path.relative_to(root)}:{node.lineno} {node.name}")
    return found


def relative_imports(root: Path) -> list[str]:
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sources(root)}
    return [
        f"{path.relative_to(root)}:{node.lineno}"
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
    ]


@pytest.fixture
def plant(tmp_path):
    """A tree with clean packages, into which a test plants a violation."""
    for package in PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("from truthward import chat\n")
    for name in LOSSES:
        (tmp_path / name).write_text("from torch.nn import functional\nfrom truthward.tensors import pad\n")

    def put(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path

    return put


def test_every_package_is_looked_at():
    assert {path.relative_to(ROOT).parts[0] for path in sources(ROOT)} == set(PACKAGES)
    assert {"rl/ppo.py", "constitution/__main__.py", *LOSSES} <= {str(p.relative_to(ROOT)) for p in sources(ROOT)}


def test_no_stage_imports_another_and_the_core_imports_none():
    assert crossings(ROOT) == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sft/x.py", "import reward.losses"),
        ("rl/x.py", "def late():\n    from reward import losses"),
        ("evals/x.py", "from ..sft import trainer"),
        ("constitution/x.py", "import importlib\nimportlib.import_module('rl.dpo')"),
        ("truthward/x.py", "from evals.truth import METRICS"),
        ("truthward/x.py", "if 1:\n    import os, constitution"),
    ],
)
def test_a_crossing_import_is_found(plant, name, text):
    assert crossings(plant("sft/clean.py", "from sft import trainer\nimport sft, torch")) == []
    assert len(crossings(plant(name, text))) == 1


def test_losses_are_pure_functions_of_tensors():
    assert impure_losses(ROOT) == []


@pytest.mark.parametrize(
    "text", ["import trl", "from truthward import chat", "from truthward.tensors_too import x", "import os"]
)
def test_an_impure_loss_is_found(plant, text):
    assert impure_losses(plant("rl/losses.py", "import torch\nfrom typing import Any\nfrom truthward import tensors")) == []
    assert len(impure_losses(plant("rl/losses.py", text))) == 1


def test_files_and_functions_are_short():
    assert too_long(ROOT) == []


def test_a_long_file_and_a_long_function_are_found(plant):
    assert too_long(plant("rl/fits.py", "x = 1\n" * 400), PACKAGES) == []
    assert too_long(plant("rl/file.py", "x = 1\n" * 401), PACKAGES) == ["rl/file.py"]
    function = "class A:\n    def long(self):\n" + "        x = 1\n" * 60
    assert too_long(plant("rl/file.py", function), PACKAGES) == ["rl/file.py:2 long"]
    assert too_long(plant("rl/file.py", function.removesuffix("        x = 1\n")), PACKAGES) == []


def test_a_command_that_trains_nothing_starts_without_torch():
    """It is most of the seconds that ``truthward why`` would take."""
    asked = "import sys, truthward.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", asked], check=False, cwd=ROOT).returncode == 0


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, ["2000", "0"]), ({"GOMP_SPINCOUNT": "5"}, ["5", "0"]), ({"OMP_WAIT_POLICY": "active"}, [None, None])],
)
def test_how_threads_wait_is_set_before_torch_is_loaded_unless_the_user_said(package, given, expected):
    asked = f"import json, os, sys, {package}; assert 'torch' not in sys.modules"
    asked += "; print(json.dumps([os.environ.get(n) for n in ('GOMP_SPINCOUNT', 'KMP_BLOCKTIME')]))"
    named = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY")
    env = {name: value for name, value in os.environ.items() if name not in named} | given
    done = subprocess.run([sys.executable, "-c", asked], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == expected


def test_imports_are_absolute_as_the_hash_of_the_code_needs():
    """``ledger.hash_code`` follows absolute imports only; a change behind a relative one would go unseen."""
    assert relative_imports(ROOT) == []


def test_a_relative_import_is_found(plant):
    assert relative_imports(plant("rl/x.py", "from . import dpo")) == ["rl/x.py:1"]
