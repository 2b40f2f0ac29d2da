"""The model card of a run: what the model is, where it came from, how it scored, how to make it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from truthward.console import inert
from truthward.ledger import CODE, Run
from truthward.record.archive import evals_runs, lineage, newest_evals
from truthward.record.settings import recipe_toml
from truthward.record.words import METRICS, commit, interval, place
from truthward.redaction import tidy, without_secrets

HUB_NAMES = {"smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}

LIMITS = """\
- Small models (135M parameters and their like) are often wrong, also where they sound sure. Check what it says.
- The scores are on this project's own bank of English questions, read by log-probability; they do not carry over to
  other banks, other languages, or long free answers.
- An interval covers the draw of questions, not the draw of training seeds: one run was trained.
- Trained on short English conversations; it was not tested for safety, and it is no source of medical, legal or
  financial advice."""


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
        "## Incidents and overrides\n\n" + _incidents(runs),
        "## Limits\n\n" + LIMITS,
        "## To reproduce\n\n" + _reproduce(run, runs),
    ]
    return without_secrets("\n\n".join(parts)) + "\n"


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


def _data_table(runs: list[Run]) -> str:
    used: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        for path, value in run.manifest.get("data", {}).items():
            used.setdefault((path, value), []).append(run)
    rows = []
    for (path, value), readers in used.items():
        about = readers[0].manifest.get("sources", {}).get(path, {})
        stages = ", ".join(dict.fromkeys(r.stage for r in readers))
        told = [str(about.get("rows") or "-"), about.get("licence") or "unknown", about.get("origin") or "-"]
        rows.append([_code(tidy(path)), *told, _code(value), stages])
    columns = ["file or folder", "rows", "licence", "origin", "SHA-256 of its content", "read by"]
    return _table(columns, rows) if rows else "No data files were read."


def _incidents(runs: list[Run]) -> str:
    """What the guard met in the lineage, and where somebody went on past a gate."""
    rows = []
    for run in runs:
        met = [(i.get("kind", "-"), i.get("step", "-"), i.get("action", "-")) for i in run.manifest.get("incidents", [])]
        rows += [[f"{_code(run.path.name)}", _words(f"{kind}, step {step}: {action}")] for kind, step, action in met]
        for scored in evals_runs(run):
            gate = scored.manifest.get("gate") or {}
            if said := gate.get("override"):
                told = f"gate overridden by {said['who']}: {said['reason']} ({gate.get('text', '')})"
                rows.append([_code(scored.path.name), _words(told)])
    return _table(["run", "what"], rows) if rows else "None."


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
