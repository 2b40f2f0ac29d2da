"""``truthward``: run a whole recipe, check it, talk to a stage, write the report, export a model."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from truthward import launch, processes, stage
from truthward.console import console, plain, say, tell
from truthward.errors import GateFailed, UserError
from truthward.ledger import Run, is_done, plan
from truthward.recipe import load_recipe
from truthward.record.commands import register as commands_of_the_record
from truthward.tables import Recipe

PRINCIPLES = Recipe().constitution.principles


def main() -> None:
    """Entry point of the ``truthward`` command."""
    parser = argparse.ArgumentParser(prog="truthward", description="alignment post-training with a record of reasons")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, about in (("run", "run every stage"), ("check", "check a recipe"), ("report", "write report.html")):
        sub = commands.add_parser(name, help=about, description=about, parents=[stage.arguments(about, add_help=False)])
        sub.set_defaults(work=globals()[f"_{name}"])
        _shrinkable(sub)
        if name == "check":
            sub.add_argument("--brief", action="store_true", help="what was found alone, as a run starts with it")
        if name == "run":
            sub.add_argument("--override", default="", metavar="REASON", help="go on where a gate says stop; on record")
    _plan(commands)
    lines = commands.add_parser(
        "launch", help="print the commands of every stage for a cluster", parents=[stage.arguments("", add_help=False)]
    )
    lines.add_argument("--print", dest="kind", choices=["torchrun", "deepspeed", "slurm"], default="torchrun")
    lines.set_defaults(work=_launch)
    talk = commands.add_parser("chat", help="talk to the model of any stage")
    talk.add_argument("run", help="run directory, e.g. runs/laptop/ppo-…")
    talk.add_argument("--compare", metavar="RUN", help="another run directory, whose model answers beside it")
    talk.add_argument("--temperature", type=float, default=0.0)
    talk.add_argument("--max-new-tokens", type=int, default=128)
    talk.add_argument("--system", default="")
    talk.set_defaults(work=_chat)
    out = commands.add_parser("export", help="write plain Hugging Face weights, tokenizer and model card")
    out.add_argument("run", help="run directory")
    out.add_argument("target", help="new folder")
    out.set_defaults(work=_export)
    compares = commands.add_parser(
        "evals", help="compare two models, or what lies between one and its parent"
    ).add_subparsers(dest="action", required=True)
    pair = compares.add_parser("compare", help="two models, paired question by question")
    pair.add_argument("a", help="run directory of a model, or of its evals")
    pair.add_argument("b", help="the same")
    pair.set_defaults(work=_compare)
    curve = compares.add_parser("frontier", help="truth against voice as a stage's change of the weights is scaled")
    curve.add_argument("run", help="run directory of a trained chat model")
    curve.add_argument("--scales", type=float, nargs="+", default=[], help="shares of the change (0.25 0.5 0.75 1)")
    curve.set_defaults(work=_frontier)
    _principles(commands.add_parser("principles", help="list and check a constitution, or compare two"))
    commands_of_the_record(commands)
    options, rest = parser.parse_known_args(_words(sys.argv[1:]))
    late = [word for word in rest if "=" in word and not word.startswith("-")] if "overrides" in options else []
    if others := [word for word in rest if word not in late]:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if late:  # argparse knows no settings behind options
        options.overrides += late
    work: Callable[[argparse.Namespace], None] = options.work
    sys.exit(stage.guarded(lambda: work(options)))


def _shrinkable(parser: argparse.ArgumentParser) -> None:
    about = "the recipe on a tiny model of the same kind, cut to minutes, on at most so many ranks (2)"
    parser.add_argument("--shrink", nargs="?", type=int, const=2, metavar="RANKS", help=about)


def _plan(commands: Any) -> None:
    """``plan RECIPE --gpus N --kind K``."""
    about = "memory, network, time and money of a recipe on another machine"
    sub = commands.add_parser("plan", help=about, description=about, parents=[stage.arguments(about, add_help=False)])
    sub.add_argument("--gpus", type=int, required=True, help="devices in all")
    sub.add_argument("--kind", required=True, help="of machine, e.g. h100-80gb")
    sub.add_argument("--hosts", type=int, default=0, help="they are spread over (8 devices each)")
    sub.add_argument("--price", type=float, help="dollars an hour and device, instead of the assumed one")
    sub.add_argument("--zero", type=int, choices=range(4), help="stage of ZeRO, instead of the recipe's")
    _shrinkable(sub)
    sub.set_defaults(work=_planned)


def _planned(options: argparse.Namespace) -> None:
    from truthward.plan.show import show

    words = {"gpus": options.gpus, "name": options.kind, "hosts": options.hosts}
    show(_load(options), options.recipe, **words, price=options.price, zero=options.zero)


def _principles(parser: argparse.ArgumentParser) -> None:
    """``principles [FILE ...]``, ``principles diff A B`` and ``principles effect RUN``."""
    actions = parser.add_subparsers(dest="action", required=True)
    lists = actions.add_parser("list", help="list and check; the word may be left out")
    lists.add_argument("files", nargs="*", default=PRINCIPLES, help=f"TOML files or a run directory ({PRINCIPLES[0]})")
    lists.add_argument("--long", action="store_true", help="show every text and reason")
    lists.set_defaults(work=_list)
    effect = actions.add_parser("effect", help="what each principle of a constitution run brought")
    effect.add_argument("run", help="directory of a run of the constitution stage")
    effect.add_argument("--leave-out", default="", metavar="ID", help="train the preference model again without its rows")
    effect.set_defaults(work=_effect)
    differs = actions.add_parser("diff", help="what two constitutions differ in, and which runs used which")
    differs.add_argument("old", help="TOML file, or directory of a run of the constitution stage")
    differs.add_argument("new", help="the same")
    differs.add_argument("--runs", default="runs", help="where to look for runs that used them (runs)")
    differs.set_defaults(work=_diff)


def _words(words: list[str]) -> list[str]:
    """Command-line words, with ``list`` put in where ``principles`` stands without an action."""
    if words[:1] == ["principles"] and not {*words[1:2]} & {"list", "diff", "effect", "-h", "--help"}:
        return ["principles", "list", *words[1:]]
    return words


def _load(options: argparse.Namespace) -> Recipe:
    """The recipe; with ``--shrink`` the cut one, which from then on is what was given."""
    recipe = load_recipe(options.recipe, options.overrides, options.why)
    if getattr(options, "shrink", None) is None:
        return recipe
    from truthward.shrink import write

    options.recipe, options.overrides, options.why = str(write(recipe, options.shrink)), [], ""
    options.shrink = None
    say(f"shrunk to [bold]{plain(options.recipe)}[/]: it shows that the recipe runs, and nothing of what it would learn")
    return load_recipe(options.recipe)


def _check(options: argparse.Namespace) -> None:
    from truthward.check import check

    check(_load(options), options.recipe, brief=options.brief, launching=options.brief)


def _run(options: argparse.Namespace) -> None:
    """Each stage in a process of its own, so that its memory is given back and a crash cannot reach the next."""
    recipe = _load(options)
    launch.lead_or_follow(recipe, lambda hosts: _lead(options, recipe, hosts), lambda hosts: _follow(options, recipe, hosts))


def _lead(options: argparse.Namespace, recipe: Recipe, hosts: launch.Hosts) -> None:
    """Run every stage that is not done, and check before it; the other hosts are told of what runs on all."""
    if not all(_settled(planned.path) for planned in plan(recipe).values()):
        hosts.tell(launch.CHECK)
        launch.prepare(recipe)
        stage.check_first(options, recipe, processes.call)
    try:
        for name, planned in plan(recipe).items():
            if _settled(planned.path):
                say(f"[bold]{name}[/] up to date  [dim]{plain(planned.path)}[/]")
                continue
            if launch.on_many(recipe, planned.stage):
                hosts.tell(name)
            _stage(recipe, planned.stage, name, options)
            if name == "base":
                say("the base is on disk: template, masks and lengths are checked by its tokenizer")
                os.environ.pop(stage.CHECKED, None)
                os.environ.pop(launch.MET, None)  # the links are known
                stage.check_first(options, recipe, processes.call)
    finally:
        _report(options)


def _follow(options: argparse.Namespace, recipe: Recipe, hosts: launch.Hosts) -> None:
    """This host's part of what the first host starts."""
    for name in hosts.told():
        if name == launch.CHECK:
            stage.check_first(options, recipe)
        else:
            _stage(recipe, name, name, options)


def _stage(recipe: Recipe, module: str, name: str, options: argparse.Namespace) -> None:
    only = ["--only", name, "--override", options.override] if module == "evals" else []
    code = launch.start(recipe, module, [*stage.given(options), *only])
    if code == GateFailed.exit_code:
        raise GateFailed(f"stopped after {name}: the model became worse than its parent (see above and the report)")
    if code:
        error = UserError(f"stage {name} ended with exit code {code}", fix="see its message above; the same command goes on")
        error.exit_code = code if code > 0 else 1
        raise error


def _launch(options: argparse.Namespace) -> None:
    from truthward.clusters import printed

    tell(printed(_load(options), stage.given(options), options.kind).rstrip("\n"))


def _settled(path: Path) -> bool:
    """Whether a run is complete, and no gate stopped the pipeline at it without being overridden."""
    if not is_done(path):
        return False
    gate = Run.load(path).manifest.get("gate") or {}
    return gate.get("mode") != "block" or bool(gate.get("override"))


def _report(options: argparse.Namespace) -> None:
    from truthward.report import closing_table, write_report

    recipe = _load(options)
    console.print(closing_table(recipe))
    say(f"report: {plain(write_report(recipe))}")


def _compare(options: argparse.Namespace) -> None:
    """In a process of its own, as every stage's code is."""
    sys.exit(processes.call([sys.executable, "-m", "evals.compare", options.a, options.b]))


def _frontier(options: argparse.Namespace) -> None:
    """Likewise."""
    scales = ["--scales", *map(str, options.scales)] if options.scales else []
    sys.exit(processes.call([sys.executable, "-m", "evals.frontier", options.run, *scales]))


def _chat(options: argparse.Namespace) -> None:
    from truthward.talk import talk

    other = None if options.compare is None else Run.load(options.compare)
    talk(Run.load(options.run), options.system, options.temperature, options.max_new_tokens, other)


def _export(options: argparse.Namespace) -> None:
    from truthward.export import export

    export(Run.load(options.run), Path(options.target))
    say(f"wrote {plain(options.target)}")


def _list(options: argparse.Namespace) -> None:
    from truthward.amendments import show

    show(options.files, long=options.long)


def _effect(options: argparse.Namespace) -> None:
    from truthward.effects import show_effect

    show_effect(options.run, options.leave_out)


def _diff(options: argparse.Namespace) -> None:
    from truthward.amendments import show_difference

    show_difference(options.old, options.new, options.runs)


if __name__ == "__main__":
    main()
