"""What a run directory's files hold, checked before a command goes by them: ``manifest.json``, ``evals.json``,
``frontier.json``.

Runs come from elsewhere too: of another version, cut off, edited, or made up. Keys that are not named here may be there
and may be anything; those that are named are what our commands read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError, create_model

from truthward.errors import UserError
from truthward.reading import parse_json, read_text
from truthward.recipe import NAME
from truthward.tables import Recipe, Table

MOST = 5  # faults that are told
FIX = "leave this run out, or make it again"
TRUTH = ("truth.mc1", "truth.mc2", "truth.pairs")  # what every card and report begins with
Name = Annotated[str, StringConstraints(pattern=f"^(?:{NAME.pattern})$", max_length=200)]  # leads out of no folder
Slug = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9]*(-[a-z0-9]+)*$", max_length=100)]
Hash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]*$", max_length=64)]
Word = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z_]*$", max_length=50)]


class Recorded(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class Score(Recorded):
    mean: float
    low: float
    high: float
    n: int


class Calibration(Recorded):
    brier: float
    ece: float


class Metrics(Recorded):
    validation_accuracy: Score | None = None
    principle_accuracy: Score | None = None
    calibration: Calibration | None = None
    longer: Score | None = None
    principles: dict[str, Score | None] = {}


class OfPrinciple(Recorded):
    accuracy: Score


class Method(OfPrinciple, Calibration):
    refused: bool
    longer: Score | None = None
    first: float = 0.0


class Judge(Recorded):
    methods: dict[str, Method]
    principles: dict[Slug, dict[str, OfPrinciple]]
    chosen: dict[str, str]


class Override(Recorded):
    reason: str
    who: str


class Gate(Recorded):
    mode: str
    gated: list[str] = []
    worse: dict[str, str] | list[str] = {}
    text: str = ""
    override: Override | None = None


class Git(Recorded):
    commit: str = ""
    diff: str = ""


class Source(Recorded):
    files: int = 0
    rows: int = 0
    bytes: int = 0
    licence: str = ""
    origin: str = ""


class Author(Recorded):
    by: str
    at: str
    commit: str


class Launched(Recorded):
    by: str = "unknown"
    recipe: str = ""
    overrides: list[str] = []
    why: str = ""


class Decision(Recorded):
    page: str
    title: str


class Told(Recorded):
    """A table of the recipe as it was resolved then; its keys may be fewer or more than today's."""

    why: dict[str, str] = {}


class ToldModel(Told):
    base: str


class ToldConstitution(Told):
    principles: str | list[str] = []


class Whole(Told):
    name: Name
    stages: list[Word]
    model: ToldModel
    constitution: ToldConstitution = ToldConstitution()


OTHERS: Any = {
    name: (Told, Told())
    for name, field in Recipe.model_fields.items()
    if isinstance(field.default, Table) and name not in Whole.model_fields
}
Written: Any = create_model("Written", __base__=Whole, **OTHERS)


class Manifest(Recorded):
    stage: Word
    status: str
    parents: dict[Word, Name]
    recipe: Written
    data: dict[str, str] = {}
    sources: dict[str, Source] = {}
    code: Hash = ""
    launched: Launched = Launched()
    authors: dict[str, Author] = {}
    machine: dict[str, Any] = {}
    decisions: list[Decision] = []
    fingerprint: str = ""
    seed: int = 0
    seconds: float | None = None
    seconds_before: float = 0
    session_start: float = 0
    peak_memory_gb: float | None = None
    resumed: int = 0
    started: str = ""
    finished: str = ""
    dtype: str = ""
    dtype_reason: str = ""
    git: Git = Git()
    packages: dict[str, str] = {}
    metrics: Metrics = Metrics()
    gate: Gate | None = None
    judge: Judge | None = None
    incidents: list[dict[str, Any]] = []


class Difference(Score):
    p_corrected: float
    detectable: float


class Flip(Recorded):
    set: str
    id: str
    better: bool
    before: str
    after: str


class Compared(Recorded):
    stage: str
    differences: dict[str, Difference | None]
    flipped: list[Flip]


class About(Recorded):
    label: str
    better: Literal["higher", "lower", ""]


class Item(Recorded):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    set: str
    id: str
    topic: str
    values: dict[str, float | None]
    picked: str


class FirstAnswer(Recorded):
    prompt: str
    kind: str = ""
    greedy: str
    sampled: str


class Evaluation(Recorded):
    model: Name
    stage: Word
    bank: str
    dtype: str = ""
    dtype_reason: str = ""
    about: dict[str, About]
    metrics: dict[str, Score | None]
    by_topic: dict[str, dict[str, dict[str, Score | None]]]
    baselines: dict[str, dict[str, float]] = {}
    items: list[Item]
    first_questions: list[FirstAnswer] = []
    against_parent: Compared | None = None
    against_base: Compared | None = None


class Point(Recorded):
    scale: float
    metrics: dict[str, Score | None]


class Frontier(Recorded):
    model: Name
    parent: Name
    split: str
    points: list[Point]


def require_manifest(value: Any, where: str) -> None:
    """Refuse a manifest that our commands can't go by.

    Raises:
        UserError: names the keys at fault.
    """
    _require(value, Manifest, where)
    if "calibration" not in value.get("metrics", {}) and "principle_accuracy" in value.get("metrics", {}):
        raise UserError("metrics: principle_accuracy without calibration", where=where, fix=FIX)


def read_evals(path: Path) -> dict[str, Any]:
    """An ``evals.json``.

    Raises:
        UserError: it is not there, is no JSON, or not of the form; names the keys at fault.
    """
    value = parse_json(read_text(path), str(path))
    _require(value, Evaluation, str(path))
    for key, found in _begin_with_truth(value):
        if missing := [name for name in TRUTH if found.get(name) is None]:
            what = f"{key}: {', '.join(missing)} missing; cards and reports begin with them"
            raise UserError(what, where=str(path), fix=FIX)
    return value


def read_frontier(path: Path) -> dict[str, Any]:
    """A ``frontier.json``: what a model scores with its change from its parent taken at several scales.

    Raises:
        UserError: it is no JSON, or not of the form; names the keys at fault.
    """
    value = parse_json(read_text(path), str(path))
    _require(value, Frontier, str(path))
    return value


def _begin_with_truth(value: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Everything in an ``evals.json`` that must hold the three numbers of the truth set, with where it lies."""
    yield "metrics", value["metrics"]
    for key in ("against_parent", "against_base"):
        if value.get(key):
            yield f"{key}.differences", value[key]["differences"]
    for name, scores in value.get("baselines", {}).items():
        yield f"baselines.{name}", scores
    for topic, scores in value["by_topic"].get("truth", {"": {}}).items():
        yield f"by_topic.truth.{topic}", scores
    for number, item in enumerate(value["items"]):
        if item["set"] == "truth":
            yield f"items.{number}.values", {f"truth.{column}": number for column, number in item["values"].items()}


def _require(value: Any, kind: type[Recorded], where: str) -> None:
    try:
        kind.model_validate(value)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, e['loc'])) or kind.__name__.lower()}: {e['msg']}" for e in error.errors()]
        more = f"; and {len(faults) - MOST} more" if len(faults) > MOST else ""
        raise UserError("; ".join(faults[:MOST]) + more, where=where, fix=FIX) from error
