"""The model card of a run, and what it shares with the report: reasons of a recipe and lineage."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truthward.console import inert
from truthward.errors import UserError
from truthward.ledger import CODE, Run
from truthward.recorded import TRUTH, read_evals
from truthward.redaction import tidy, without_secrets
from truthward.tables import Recipe, Table

HUB_NAMES = {"smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}
METRICS = dict(zip(TRUTH, ("MC1", "MC2", "pairs"), strict=True))  # what leads everywhere

LIMITS = """\
- Small models (135M parameters and their like) are often wrong, also where they sound sure. Check what it says.
- The scores are on this project's own bank of English questions, read by log-probability; they do not carry over to
  other banks, other languages, or long free answers.
- An interval covers the draw of questions, not the draw of training seeds: one run was trained.
- Trained on short English conversations; it was not tested for safety, and it is no source of medical, legal or
  financial advice."""


@dataclass(frozen=True)
class Setting:
    """One value of a recipe, its default and the reason that was given for it."""

    table: str
    key: str
    value: Any
    default: Any
    reason: str

    @property
    def changed(self) -> bool:
        return self.value != self.default


def place(run: Path) -> str:
    """A run directory relative to the runs folder."""
    return f"{run.parent.name}/{run.name}"


def recipe_settings(values: dict[str, Any]) -> list[Setting]:
    """Every value of a dumped recipe in its order; ``table`` is empty for the recipe's own keys."""
    rows = _settings("", values, Recipe.model_fields)
    for name, field in Recipe.model_fields.items():
        if isinstance(field.default, Table) and isinstance(values.get(name), dict):
            rows += _settings(name, values[name], type(field.default).model_fields)
    return rows


def _settings(table: str, values: dict[str, Any], fields: Any) -> list[Setting]:
    reasons = values.get("why", {})
    defaults = {key: field.default for key, field in fields.items()}
    return [
        Setting(table, key, value, defaults.get(key), reasons.get(key, "").strip())
        for key, value in values.items()
        if not isinstance(value, dict)
    ]


def lineage(run: Run) -> list[Run]:
    """A run and every run that it came from in any role, each after its parents; lost directories are left out."""
    found: dict[str, Run] = {}
    begun: set[str] = set()

    def visit(this: Run) -> None:
        begun.add(this.path.name)
        for name in this.manifest.get("parents", {}).values():
            if name not in begun:  # a run may name itself, or a child, as its parent
                with contextlib.suppress(UserError):
                    visit(Run.load(this.path.parent / name))
        found[this.path.name] = this

    visit(run)
    return list(found.values())


def interval(value: dict[str, Any], *, sign: bool = False) -> str:
    """``0.457 [0.40, 0.51]``; with ``sign``, ``+0.020 [-0.031, +0.070]``."""
    if sign:
        return f"{value['mean']:+.3f} [{value['low']:+.3f}, {value['high']:+.3f}]"
    return f"{value['mean']:.3f} [{value['low']:.2f}, {value['high']:.2f}]"


def commit(manifest: dict[str, Any]) -> str:
    """The first 12 characters of a run's commit, and whether files differed from it."""
    git = manifest.get("git", {})
    return (git.get("commit", "")[:12] or "no commit") + (" + changes" if git.get("diff") else "")


# -------------------------------------------------------------------------------------------------------------- card


def model_card(run: Run) -> str:
    """Markdown with YAML front matter: what the model is, where it came from, how it scored, how to make it again."""
    runs = lineage(run)
    recipe = run.manifest["recipe"]
    title = f"{recipe['name']}: {run.stage}"
    parts = [
        _front_matter(recipe),
        f"# {title}",
        f"A chat model made by the `{run.stage}` stage of the truthward recipe `{recipe['name']}`, which trains small models"
        " to prefer true answers to common falsehoods. The weights are the base's, with the changes of each model parent"
        " in the lineage below folded in.",
        "Our part is under Apache-2.0. The base model keeps its own licence.",
        "## Lineage\n\n" + _lineage_table(runs),
        "## Truthfulness\n\n" + _evals_text(run),
        "## Data\n\n" + _data_table(runs),
        "## Recipe and reasons\n\nValues in comments are defaults.\n\n" + f"```toml\n{_quoted(recipe_toml(recipe))}```",
        "## Limits\n\n" + LIMITS,
        "## To reproduce\n\n" + _reproduce(run, runs),
    ]
    return without_secrets("\n\n".join(parts)) + "\n"


def recipe_toml(recipe: dict[str, Any]) -> str:
    """A recipe as TOML that loads: changed or explained values with ``why`` tables, defaults as comments."""
    settings = [s for s in recipe_settings(recipe) if s.key != "runs"]
    lines: list[str] = []
    for table in dict.fromkeys(s.table for s in settings):
        rows = [s for s in settings if s.table == table]
        lines += [f"\n[{table}]"] if table else []
        lines += [("" if s.changed or s.reason else "# ") + f"{s.key} = {_toml(s.value)}" for s in rows]
        reasons = [f"{s.key} = {_toml(s.reason)}" for s in rows if s.reason]
        lines += [f"[{table}.why]" if table else "\n[why]", *reasons] if reasons else []
    return "\n".join(lines).lstrip("\n") + "\n"


def _toml(value: Any) -> str:
    return '""' if value is None else json.dumps(value, ensure_ascii=False)


def _quoted(text: str) -> str:
    """Text for a code block of the card."""
    return inert(tidy(text)).replace("```", "'''")


def _front_matter(recipe: dict[str, Any]) -> str:
    base = recipe["model"]["base"]
    name = HUB_NAMES.get(base, Path(base).name if Path(base).is_absolute() else base)
    tags = ["truthward", "alignment", "truthfulness", *[s for s in recipe["stages"] if s != "base"]]
    rows = ["license: apache-2.0", f"base_model: {json.dumps(name)}", "library_name: transformers", "language: en", "tags:"]
    return "\n".join(["---", *rows, *[f"- {tag}" for tag in tags], "---"])


def _lineage_table(runs: list[Run]) -> str:
    rows = []
    for run in runs:
        m = run.manifest
        parents = ", ".join(f"{role}: {_code(name)}" for role, name in m.get("parents", {}).items())
        dtype = str(m.get("dtype", "")).removeprefix("torch.") or "-"
        seconds, memory = m.get("seconds"), m.get("peak_memory_gb")
        cost = f"{seconds:.0f} s, {memory} GB" if seconds is not None and memory is not None else "-"
        rows.append([run.stage, _code(place(run.path)), parents or "-", _words(commit(m)), _words(dtype), cost])
    return _table(["stage", "run", "from", "commit", "dtype", "time, peak memory"], rows)


def _evals_text(run: Run) -> str:
    found = newest_evals(run)
    if not found:
        return "This model was not scored."
    rows = [[label, interval(found["metrics"][m]), str(found["metrics"][m]["n"])] for m, label in METRICS.items()]
    columns = ["metric", "score", "questions"]
    for key in ("against_parent", "against_base"):
        if found.get(key) and f"difference to {found[key]['stage']}" not in columns:
            columns.append(f"difference to {found[key]['stage']}")
            for row, m in zip(rows, METRICS, strict=True):
                row.append(interval(found[key]["differences"][m], sign=True))
    note = (
        f"On {_code(tidy(found['bank']))}, held-out topics; brackets are 95 % bootstrap intervals, differences are paired."
    )
    style = [[_words(name), *[f"{scores[m]:.3f}" for m in METRICS]] for name, scores in found.get("baselines", {}).items()]
    text = f"{note}\n\n{_table(columns, rows)}"
    if style:
        about = "What the style of the answers alone scores, without reading a question:"
        text += f"\n\n{about}\n\n{_table(['judge', *METRICS.values()], style)}"
    return text


def newest_evals(run: Run) -> dict[str, Any] | None:
    """The newest complete evals of this very model."""
    found: list[tuple[str, dict[str, Any]]] = []
    for path in sorted(run.path.parent.glob("evals-*/evals.json")):
        with contextlib.suppress(UserError):
            evals_run, value = Run.load(path.parent), read_evals(path)
            if evals_run.done and value["model"] == run.path.name:
                found.append((evals_run.manifest.get("finished", ""), value))
    return max(found, key=lambda pair: pair[0])[1] if found else None


def _data_table(runs: list[Run]) -> str:
    used: dict[tuple[str, str], list[str]] = {}
    for run in runs:
        for path, value in run.manifest.get("data", {}).items():
            used.setdefault((path, value), []).append(run.stage)
    rows = [[_code(tidy(path)), _code(value), ", ".join(stages)] for (path, value), stages in used.items()]
    return _table(["file or folder", "SHA-256 of its content", "read by"], rows) if rows else "No data files were read."


def _reproduce(run: Run, runs: list[Run]) -> str:
    git = run.manifest.get("git", {})
    where = f"commit {_code(git['commit'])}" if git.get("commit") else "the same source (no commit was recorded)"
    changed = " The source differed from that commit; the difference is in `truthward.json`." if git.get("diff") else ""
    packages = ", ".join(f"{name} {version}" for name, version in run.manifest.get("packages", {}).items())
    stages = dict.fromkeys(r.stage for r in runs)
    commands = "\n".join(f"python -m {CODE.get(stage, stage)} recipe.toml" for stage in [*stages, "evals"])
    return (
        f"Check out {where}.{changed} Save the recipe above as `recipe.toml`, make sure that the data have the hashes above,"
        f" and run:\n\n```sh\n{commands}\n```\n\n"
        f"Seed {run.manifest.get('seed')}. Packages: {_words(packages) or 'not recorded'}. Other processors and packages may"
        " round differently, so expect scores inside the intervals rather than equal weights."
    )


def _code(text: str) -> str:
    """Text between backticks, in which nothing works."""
    return f"`{inert(' '.join(text.split())).replace('`', chr(39))}`"


def _words(text: str) -> str:
    """Somebody's words, in which Markdown finds no code, HTML or link."""
    return inert(text).replace("`", "'").replace("<", "&lt;").replace("](", "] (")


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(" ".join(c.replace("|", "\\|").split()) for c in line) + " |" for line in lines)
