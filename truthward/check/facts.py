"""What the rules may ask about: each file parsed once, each text tokenised once, the model's shape, the steps of a stage."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from truthward.banks import BANKS, Labelled
from truthward.errors import UserError
from truthward.ledger import Planned, Run, plan
from truthward.recipe import bank_path, banked, labels_path
from truthward.records import (
    Demonstration,
    Pair,
    Preference,
    Prompt,
    Question,
    Row,
    by_prompt,
    draw,
    read_demonstrations,
    read_rows,
    truth_preferences,
)
from truthward.tables import BANK_OF, Recipe

R = TypeVar("R", bound=Row)
TRAINED = ("sft", "distill", "reward", "dpo", "ppo")
PACKED_TOGETHER = 1000  # rows that TRL packs at a time
TOY = 10_000_000  # parameters below which a model is for tests, and what is usual for models says nothing


class Shape(NamedTuple):
    """Sizes of a decoder; ``layers`` is 0 where only the number of parameters is known, from the model's name."""

    parameters: int
    layers: int = 0
    hidden: int = 0
    inner: int = 0
    heads: int = 0
    kv_heads: int = 0
    vocabulary: int = 0
    positions: int = 0

    @classmethod
    def of(cls, config: dict[str, Any]) -> Shape:
        """From a ``config.json`` of the Llama family (Llama, Mistral, Qwen), embeddings and all."""
        h, inner, layers, words = (
            config[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
        )
        heads = config["num_attention_heads"]
        kv = config.get("num_key_value_heads") or heads
        width = config.get("head_dim") or h // heads
        layer = 2 * h * heads * width + 2 * h * kv * width + 3 * h * inner + 2 * h
        tables = words * h * (1 if config.get("tie_word_embeddings") else 2)
        return cls(layers * layer + tables + h, layers, h, inner, heads, kv, words, config.get("max_position_embeddings", 0))

    @property
    def cached(self) -> float:
        """Elements of a token's keys and values in all layers."""
        return 2 * self.layers * self.hidden * self.kv_heads / max(1, self.heads)

    def adapter(self, rank: int) -> int:
        """Parameters of LoRA on every linear layer: r x (in + out) each (Hu et al. 2021, arXiv 2106.09685)."""
        h, kv = self.hidden, self.hidden * self.kv_heads // max(1, self.heads)
        return self.layers * rank * (2 * (h + h) + 2 * (h + kv) + 3 * (h + self.inner))


def _llama(layers: int, hidden: int, inner: int, heads: int, *, tied: bool = False) -> dict[str, Any]:
    """Llama 3 (Dubey et al. 2024, arXiv 2407.21783, table 3): 8 key-value heads and 128,256 words at every size.

    3.2's 1B is not in the paper: its sizes are those of its published configuration.
    """
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": tied,
    }


KNOWN = {  # configurations that need not be on this machine to be known
    "smollm2-135m-instruct": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "tiny-random": {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 259,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": _llama(16, 2048, 8192, 32, tied=True),
    "llama-3.1-8b": _llama(32, 4096, 14336, 32),
    "llama-3.1-70b": _llama(80, 8192, 28672, 64),
    "llama-3.1-405b": _llama(126, 16384, 53248, 128),
}


class Texts(NamedTuple):
    """What a stage trains on: each prompt with its answers, and where it stands."""

    where: str
    messages: list[dict[str, str]]
    answers: list[str]


class Facts:
    """Everything is worked out when it is first asked for, and kept.

    Args:
        recipe: the resolved recipe.
        where: its file.
        launching: whether a run is about to start on this machine.
    """

    def __init__(self, recipe: Recipe, where: str, *, launching: bool = False) -> None:
        self.recipe, self.where, self.launching = recipe, where, launching
        self.faults: list[UserError] = []
        self.unfit: UserError | None = None  # what is wrong with the tokenizer
        self._rows: dict[tuple[str, Any], list[Any]] = {}
        self._lengths: dict[str, list[tuple[int, list[int]]]] = {}

    # ----------------------------------------------------------------------------------------------------------- rows

    def rows(self, path: str, kind: type[R]) -> list[R]:
        """Rows of a file or bank; none where they can't be read, which is put on ``faults`` once."""
        if (path, kind) not in self._rows:
            try:
                self._rows[path, kind] = read_rows(path, kind)
            except UserError as fault:
                self._rows[path, kind] = []
                self.faults.append(fault)
        return self._rows[path, kind]

    def demonstrations(self, path: str) -> list[Demonstration]:
        """Of a file of demonstrations or revisions."""
        key = (path, "demonstrations")
        if key not in self._rows:
            try:
                self._rows[key] = read_demonstrations([path])
            except UserError as fault:
                self._rows[key] = []
                self.faults.append(fault)
        return self._rows[key]

    def uses(self, *stages: str) -> list[Any]:
        """The tables of those stages that the recipe runs, with their names."""
        return [(stage, getattr(self.recipe, stage)) for stage in stages if stage in self.recipe.stages]

    @cached_property
    def banks(self) -> dict[str, list[Any]]:
        """Everything that the evals ask, by the bank's path."""
        paths = {bank_path(self.recipe, name): name for name in ("truth", *banked(self.recipe.evals.sets))}
        return {path: self.rows(path, BANKS[BANK_OF.get(name, name)]) for path, name in paths.items()}

    def read_all(self) -> None:
        """Read every row that the recipe names, so that each fault of the data is on ``faults``."""
        recipe = self.recipe
        _ = self.banks
        if "open" in recipe.evals.sets:
            self.rows(labels_path(recipe), Labelled)
        self.rows(recipe.evals.style_bank, Question)
        self.rows(recipe.evals.first_questions, Prompt)
        for _, table in self.uses("constitution"):
            for path in table.prompts:
                self.rows(path, Prompt)
            self.rows(recipe.judge.bank, Pair)
        for _, table in self.uses("reward"):
            self.rows(table.validation, Question)
            self.rows(table.principle_bank, Pair)
        for _, table in self.uses("ppo"):
            self.rows(table.prompts, Prompt)
        for stage in ("reward", "dpo"):
            self.preferences(stage)
        for _, table in self.uses("sft", "dpo"):
            if table.replay:
                self.rows(table.replay, Prompt)
        for _, table in self.uses("distill"):
            for path in table.prompts:
                self.rows(path, Question if Path(path).is_dir() else Prompt)
        for _, path in self.demonstrated():
            self.demonstrations(path)

    def demonstrated(self) -> Iterator[tuple[str, str]]:
        """Keys and paths of demonstrations."""
        for stage, key in (("sft", "data"), ("ppo", "ptx_data")):
            for _, table in self.uses(stage):
                yield from ((f"{stage}.{key}", path) for path in getattr(table, key))

    def preferences(self, stage: str) -> dict[str, list[Preference]]:
        """Of ``reward`` or ``dpo``, by source; the constitution's where a run of this very plan has made them."""
        found: dict[str, list[Preference]] = {}
        for _, table in self.uses(stage):
            for source in table.preferences:
                if source == "constitution":
                    found[source] = self._constituted
                elif Path(source).is_dir():
                    found[source] = truth_preferences(self.rows(source, Question), source, cross=True)
                else:
                    found[source] = self.rows(source, Preference)
        return found

    @cached_property
    def _constituted(self) -> list[Preference]:
        path = self.run("constitution").path / "preferences.jsonl"
        return self.rows(str(path), Preference) if path.is_file() and path.stat().st_size else []

    # ----------------------------------------------------------------------------------------------------------- runs

    @cached_property
    def planned(self) -> dict[str, Planned]:
        """The plan; empty where a path is wrong, which is put on ``faults``."""
        try:
            return plan(self.recipe)
        except UserError as fault:
            self.faults.append(fault)
            return {}

    def run(self, stage: str) -> Run:
        """The run of a planned stage; its manifest is empty where it has not been run."""
        found = self.planned.get(stage)
        return Run.find(found.path) if found else Run(Path("nowhere"))

    # ---------------------------------------------------------------------------------------------------------- model

    @cached_property
    def folder(self) -> Path | None:
        """Where the base's files lie on this machine, if they do."""
        base = self.run("base")
        named = Path(self.recipe.model.base)
        return base.model_dir if base.done else named if named.is_dir() else None

    @cached_property
    def shape(self) -> Shape:
        """Sizes of the base, from its files or its name; parameters are 0 where neither tells."""
        name = self.recipe.model.base
        if self.folder and (self.folder / "config.json").is_file():
            config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
            return Shape.of(config) if "intermediate_size" in config else Shape(0)
        bare = name.rpartition("/")[2].casefold()
        for known in (bare, bare.removesuffix("-instruct")):
            if known in KNOWN:
                return Shape.of(KNOWN[known])
        said = re.search(r"(\d+(?:\.\d+)?)\s*([bm])(?![a-z])", bare)
        return Shape(round(float(said[1]) * (1e9 if said[2] == "b" else 1e6))) if said else Shape(0)

    @property
    def toy(self) -> bool:
        """Whether the model is one for tests: then nothing is said of rates, ranges and numbers of rows."""
        return 0 < self.shape.parameters < TOY

    @cached_property
    def tokenizer(self) -> Any:
        """The base's tokenizer as the stages prepare it; None where it is not on this machine. Nothing is downloaded."""
        from truthward import chat, models

        if self.folder is None and self.recipe.model.base == models.TINY:
            return models.fetch_base(models.TINY, self.recipe.seed)[1]
        if self.folder is None or not (self.folder / "tokenizer_config.json").is_file():
            return None
        from transformers import AutoTokenizer

        try:
            return chat.prepare_tokenizer(AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False))
        except UserError as fault:
            self.unfit = fault
        except (OSError, ValueError) as fault:
            fix = "give a folder with a tokenizer"
            self.unfit = UserError(f"its tokenizer cannot be loaded: {fault}", where="model.base", fix=fix)
        return None

    def lengths(self, texts: list[str]) -> list[int]:
        """Tokens of each text; a quarter of its bytes where there is no tokenizer (English, byte-pair encodings)."""
        if not texts:
            return []
        if self.tokenizer is None:
            return [max(1, len(text.encode()) // 4) for text in texts]
        return [len(ids) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]

    # ---------------------------------------------------------------------------------------------------------- steps

    @cached_property
    def texts(self) -> dict[str, list[Texts]]:
        """What each stage trains on, by stage, as far as it is known before the run."""
        found: dict[str, list[Texts]] = {}
        for key, path in self.demonstrated():
            for d in self.demonstrations(path):
                turns = [m.model_dump() for m in d.messages]
                found.setdefault(key.partition(".")[0], []).append(
                    Texts(f"{path}: {d.id}", turns[:-1], [turns[-1]["content"]])
                )
        for stage, table in self.uses("reward", "dpo"):
            rows = [p for source in self.preferences(stage).values() for p in source]
            for group in draw(by_prompt(rows), table.max_prompts, self.recipe.seed):
                answers = list(dict.fromkeys(t for p in group for t in (p.chosen, p.rejected)))
                turn = [{"role": "user", "content": group[0].prompt}]
                found.setdefault(stage, []).append(Texts(group[0].source or f"{stage}.preferences", turn, answers))
        return found

    def lengths_of(self, stage: str) -> list[tuple[int, list[int]]]:
        """Tokens of each row's prompt, as it is rendered, and of each of its answers, end token included."""
        if stage not in self._lengths:
            rows = self.texts.get(stage, [])
            heads = self.lengths([self.render(t.messages) for t in rows])
            ends = iter(self.lengths([answer.strip() for t in rows for answer in t.answers]))
            self._lengths[stage] = [(n, [next(ends) + 1 for _ in t.answers]) for n, t in zip(heads, rows, strict=True)]
            if stage == "sft" and rows:
                self._lengths[stage] += [(n, [self.recipe.sft.replay_tokens]) for n in self.replayed(stage)]
        return self._lengths[stage]

    def replayed(self, stage: str) -> list[int]:
        """Tokens of the prompts whose answers by the base a stage replays; each answer has at most ``replay_tokens``."""
        table = getattr(self.recipe, stage)
        if not table.replay:
            return []
        prompts = draw(self.rows(table.replay, Prompt), table.replay_prompts, self.recipe.seed)
        return self.lengths([self.render([{"role": "user", "content": p.prompt}]) for p in prompts])

    def tokens(self, stage: str) -> list[int]:
        """Tokens of each row that a stage trains on: a conversation, or a prompt with all its answers."""
        return [prompt + sum(answers) for prompt, answers in self.lengths_of(stage)]

    def render(self, messages: list[dict[str, str]]) -> str:
        """A prompt as text, up to where the assistant begins; without a tokenizer as ChatML has it."""
        if self.tokenizer is None:
            turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
            return "".join([*turns, "<|im_start|>assistant\n"])
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def sequences(self, stage: str) -> int:
        """Rows that a stage's loader sees in a pass: packed sequences, or conversations or prompts."""
        lengths, table = self.tokens(stage), getattr(self.recipe, stage)
        if stage != "sft" or not table.packing:
            return len(lengths)
        starts = range(0, len(lengths), PACKED_TOGETHER)
        return sum(packed(lengths[i : i + PACKED_TOGETHER], table.max_length) for i in starts)

    def loader(self, stage: str) -> tuple[int, int, int]:
        """Of a stage on a TRL trainer: rows of a micro-batch over all ranks, micro-batches of a step and of a pass.

        A last micro-batch that is not full is dropped (``dataloader_drop_last``).
        """
        table, ranks = getattr(self.recipe, stage), self.recipe.launch.world
        micro = 1 if stage == "sft" and table.packing else min(table.micro_batch_size, table.batch_size)
        return micro * ranks, table.batch_size // (micro * ranks), self.sequences(stage) // (micro * ranks)

    def steps(self, stage: str) -> int:
        """Optimizer steps of a stage; 0 where its rows are not known."""
        table: Any = getattr(self.recipe, stage)
        if stage == "ppo":
            return table.iterations * table.epochs * table.minibatches
        if stage == "distill":
            rows = sum(len(self.rows(p, Question if Path(p).is_dir() else Prompt)) for p in table.prompts)
            return math.ceil(table.epochs * (min(rows, table.max_prompts) // table.batch_size))
        _, accumulated, batches = self.loader(stage)
        return math.ceil(table.epochs * math.ceil(batches / max(1, accumulated)))


def packed(lengths: list[int], room: int) -> int:
    """How many sequences of at most ``room`` tokens best-fit decreasing packing makes, as TRL's ``bfd`` does."""
    free: dict[int, int] = {}  # room left -> sequences that have so much
    count = 0
    for length in sorted((min(n, room) for n in lengths), reverse=True):
        best = min((r for r, n in free.items() if n and r >= length), default=None)
        if best is None:
            count, best = count + 1, room
        else:
            free[best] -= 1
        free[best - length] = free.get(best - length, 0) + 1
    return count
