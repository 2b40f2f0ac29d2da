"""How every stage script starts and ends: read the recipe, enter the run directory, run, report errors in one line."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from truthward import ranks
from truthward.console import inert, plain, say
from truthward.errors import GateFailed, Interrupted, TrainingFault, UserError
from truthward.fingerprint import digest
from truthward.guard.storage import refusal
from truthward.ledger import TRAINED, Run, is_done, open_run, plan
from truthward.reasons import require_reasons
from truthward.recipe import load_recipe
from truthward.redaction import without_secrets
from truthward.tables import Launch, Recipe

Work = Callable[[Recipe, Run], None]
Call = Callable[[list[str], dict[str, str]], int]  # runs a command in an environment, and returns its exit code
CHECKED = "TRUTHWARD_CHECKED"  # environment variable: digest of a plan that was checked on the way here


def arguments(description: str, *, add_help: bool = True) -> argparse.ArgumentParser:
    """The command line that all stages share."""
    parser = argparse.ArgumentParser(description=description, add_help=add_help)
    parser.add_argument("recipe", help="TOML file, e.g. recipes/laptop.toml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. ppo.kl_coef=0.02")
    parser.add_argument("--why", default="", help="the reason for the overrides")
    return parser


def given(options: argparse.Namespace) -> list[str]:
    """The words of the shared command line again, for a process that is to read the same recipe."""
    return [options.recipe, *options.overrides, *(["--why", options.why] if options.why else [])]


def guarded(work: Callable[[], None]) -> int:
    """Run and turn the errors that a user can meet into one clear message and an exit code."""
    try:
        work()
    except (UserError, GateFailed, TrainingFault, Interrupted) as error:
        if not getattr(error, "told", False):  # by the first rank, for all
            print(f"error: {inert(without_secrets(str(error)))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except Exception as error:
        if getattr(error, "told", False):
            return 2
        refused, gone = refusal(error), ranks.lost(error)
        if not refused and not gone:
            raise
        fix = "make room, give write permission or take another path; run the same command"
        if gone:
            fix = "see what the others say; the same command goes on from the last checkpoint, also on fewer ranks"
        print(f"error: {inert(refused or gone)}\n  to do: {fix}", file=sys.stderr)
        return TrainingFault.exit_code if gone else 2
    return 0


def run_stage(recipe: Recipe, name: str, work: Work, again: Work | None = None) -> None:
    """Do a stage unless its run directory is already complete; then only ``again``, if there is any."""
    with open_run(recipe, name) as this:
        if this.done:
            say(f"[bold]{name}[/] up to date  [dim]{plain(this.path)}[/]")
            if again:
                again(recipe, this)
            return
        say(f"[bold]{name}[/] {'resumes in' if this.manifest['resumed'] else 'runs in'} [dim]{plain(this.path)}[/]")
        work(recipe, this)


def _gated(recipe: Recipe, name: str, work: Work, again: Work | None, override: str) -> None:
    """A stage that a gate may stop; with a reason to go on, the reason is put on record instead."""
    try:
        run_stage(recipe, name, work, again)
    except GateFailed as failure:
        if not override.strip():
            raise
        Run.load(plan(recipe)[name].path).override(override)
        say(f"  [yellow]gate overridden[/]: {plain(failure)}")


def plan_digest(recipe: Recipe) -> str:
    """Of everything that the check could find otherwise: settings, data and code of all stages."""
    return digest({name: planned.fingerprint for name, planned in plan(recipe).items()})


def _call(words: list[str], env: dict[str, str]) -> int:
    return subprocess.run(words, check=False, env=env).returncode


def check_first(
    options: argparse.Namespace, recipe: Recipe, call: Callable[[list[str], dict[str, str]], int] = _call
) -> None:
    """The check before launch, unless it was made on the way here for this very plan.

    It runs in a process of its own: it can stop a stage, but nothing that it imports, draws or holds in memory can reach the
    result. So its rules are no part of the stage's code, and may change without a new fingerprint.

    Args:
        options: of the command line.
        recipe: what they stand for.
        call: what runs it.
    """
    plan_now = plan_digest(recipe)
    if os.environ.get(CHECKED) == plan_now:
        return
    words = [sys.executable, "-m", "truthward", "check", *given(options), "--brief"]
    alone = {k: v for k, v in os.environ.items() if k not in ranks.ALONE}
    if code := call(words, alone):
        sys.exit(code)
    os.environ[CHECKED] = plan_now


def _fetch_base(recipe: Recipe) -> None:
    """The base model is what every stage needs and no one thinks of: fetch it when it is not there."""
    from truthward import base

    if not is_done(plan(recipe)["base"].path):
        run_stage(recipe, "base", base.run)


def main(name: str, work: Work, *, expand: Callable[[Recipe], list[str]] | None = None, again: Work | None = None) -> None:
    """Entry point of a stage script.

    Args:
        name: the stage.
        work: does it, given the recipe and an open run.
        expand: for a stage that runs once for each of several models, their planned names.
        again: what is done instead where the run is already complete.
    """
    parser = arguments(f"truthward stage {name}")
    if expand:
        parser.add_argument("--only", help="one of the runs that the stage has, e.g. evals-sft")
        parser.add_argument("--override", default="", metavar="REASON", help="go on though the gate says stop; on record")
    options = parser.parse_intermixed_args()

    def begin() -> None:
        recipe = load_recipe(options.recipe, options.overrides, options.why)
        require_reasons(recipe, options.recipe)
        planned = plan(recipe)
        if expand and options.only and options.only not in planned:
            named = [n for n, this in planned.items() if this.stage == name]
            raise UserError(f"there is no run {options.only}", where="--only", fix=f"they are {', '.join(named)}")
        ranks.join(recipe.launch if name in TRAINED else Launch(), recipe.guard.hang_seconds)
        if name not in planned or not is_done(planned[name].path):
            ranks.lead(lambda: check_first(options, recipe))
        if name != "base":
            ranks.lead(lambda: _fetch_base(recipe))
        names = [name] if expand is None else [n for n in expand(recipe) if options.only in (None, n)]
        for each in names:
            _gated(recipe, each, work, again, getattr(options, "override", ""))
        ranks.leave()

    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.path[:0] = [] if str(Path.cwd()) in sys.path else [str(Path.cwd())]
    sys.exit(guarded(begin))
