"""Principle distillation: gradients by full logits, the trainer, exact resume, the stage, refusals."""

import copy
import json

import pytest
import torch
from lab import ROOT, Lab, distillation, write
from peft import get_peft_model
from ppo_lab import lasting, place
from torch import tensor
from transformers import TrainingArguments

from constitution import distill, student
from constitution.student import DistillTrainer, collate
from evals import __main__ as evals
from truthward import models
from truthward.check import Facts
from truthward.check.rows import leaked, unreadable
from truthward.errors import TrainingFault, UserError
from truthward.ledger import Run, plan
from truthward.products import quicken
from truthward.recipe import load_recipe
from truthward.records import Question, read_rows
from truthward.stage import run_stage
from truthward.tables import Distill, Launch
from truthward.tracking import read_metrics
from truthward.trainers import trainer_arguments

# --------------------------------------------------------------------------------------------------------- the trainer

LENGTHS = [((4, 9, 7), (5, 2)), ((3, 12, 12), (1,)), ((6, 8, 10), (4, 9, 3)), ((2, 5, 4), (8,))]  # of prompts, of answers
ALPHA, CUTOFF = 1.5, 0.01


@pytest.fixture
def rows() -> list[dict]:
    generator = torch.Generator().manual_seed(4)
    drawn = [[[torch.randint(3, 259, (n,), generator=generator).tolist() for n in side] for side in row] for row in LENGTHS]
    return [{"prompts": prompts, "answers": answers} for prompts, answers in drawn]


def build(sharp, tmp_path, rows, *, micro=4, tune="lora", alpha=ALPHA, moved=False, **options) -> DistillTrainer:
    """A trainer as the stage makes it, with SGD; ``moved``: the policy has left its parent."""
    table = Distill(batch_size=4, micro_batch_size=micro)
    arguments = trainer_arguments(table, Launch(), torch.float32, Run(tmp_path), seed=0)
    arguments |= {"max_grad_norm": 1e9, "learning_rate": 0.01, "warmup_steps": 0, "save_strategy": "no", "optim": "sgd"}
    del arguments["max_length"]
    model = copy.deepcopy(sharp[0]).requires_grad_(True)
    torch.manual_seed(0)
    trainer = DistillTrainer(
        Run(tmp_path),
        alpha=alpha,
        cutoff=CUTOFF,
        model=quicken(get_peft_model(model, models.lora_config(4, 8)) if tune == "lora" else model),
        args=TrainingArguments(**arguments | options, remove_unused_columns=False),
        data_collator=collate,
        train_dataset=rows,
    )
    trainer.run.record(status="running")
    if moved:
        generator = torch.Generator().manual_seed(0)
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        trainer.state.global_step = 1  # past the first step, at which the loss has to be the shift
    trainer.model.train()
    return trainer


def plain_loss(policy, parent, rows: list[dict], alpha: float = ALPHA) -> torch.Tensor:
    """Every (prompt, answer) alone, with all logits; tokens averaged over an answer, answers over a prompt, then prompts."""
    total = torch.zeros(())
    for row in rows:
        for answer in row["answers"]:

            def said(model, prompt, answer=answer):
                return model(input_ids=tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]

            with torch.no_grad():
                plain, follow, violate = (said(parent, prompt).double().log_softmax(-1) for prompt in row["prompts"])
            contrast = torch.where(plain.exp() >= CUTOFF * plain.exp().amax(-1, keepdim=True), follow - violate, 0)
            target = (plain + alpha * contrast).softmax(-1).float()
            divergence = torch.nn.functional.kl_div(
                said(policy, row["prompts"][0]).log_softmax(-1), target, reduction="none"
            )
            total = total + divergence.sum(-1).mean() / len(row["answers"]) / len(rows)
    return total


def gradients(trainer: DistillTrainer, loss: torch.Tensor) -> torch.Tensor:
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


@pytest.mark.parametrize("chunk", [3, 64])
@pytest.mark.parametrize("tune", ["lora", "full"])
def test_loss_and_gradient_are_those_of_full_logits(sharp, tmp_path, rows, monkeypatch, tune, chunk):
    """Trees, chunks and adapters off, against plain passes of a separate parent; with the head trained, its part too."""
    monkeypatch.setattr(student, "CHUNK", chunk)
    trainer = build(sharp, tmp_path, rows, tune=tune, moved=True)
    loss = trainer.compute_loss(trainer.model, collate(rows))
    expected = plain_loss(trainer.model, sharp[0], rows)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert abs(loss.item() - trainer.shifts[0]) > 0.1
    assert trainer.shifts[0] == pytest.approx(plain_loss(sharp[0], sharp[0], rows).item(), rel=1e-5)
    ours, reference = gradients(trainer, loss), gradients(trainer, expected)
    torch.testing.assert_close(ours, reference, atol=1e-5 * reference.abs().max().item(), rtol=0)


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_at_the_start_the_loss_is_the_shift_and_without_alpha_nothing(sharp, tmp_path, rows, tune):
    trainer = build(sharp, tmp_path, rows, tune=tune)
    loss = trainer.compute_loss(trainer.model, collate(rows))
    assert loss.item() == pytest.approx(trainer.shifts[0], rel=1e-5)
    assert loss.item() > 0.1
    trainer = build(sharp, tmp_path, rows, tune=tune, alpha=0.0)
    loss = trainer.compute_loss(trainer.model, collate(rows))
    assert abs(loss.item()) < 1e-5
    assert gradients(trainer, loss).abs().max() < 1e-4


def test_a_policy_that_does_not_start_as_its_parent_stops_the_run(sharp, tmp_path, rows):
    trainer = build(sharp, tmp_path, rows, moved=True)
    trainer.state.global_step = 0
    with pytest.raises(TrainingFault, match="distillation loss must be"):
        trainer.compute_loss(trainer.model, collate(rows))
    assert trainer.run.manifest["incidents"][0]["kind"] == "wrong-start"


def test_in_bf16_the_loss_is_near_that_of_fp32(sharp, tmp_path, rows):
    exact = plain_loss(sharp[0], sharp[0], rows, 0.5).item()
    trainer = build((copy.deepcopy(sharp[0]).bfloat16(), sharp[1]), tmp_path, rows, alpha=0.5)
    trainer.state.global_step = 1
    loss = trainer.compute_loss(trainer.model, collate(rows, torch.bfloat16))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact, rel=0.1)
    assert gradients(trainer, loss).isfinite().all()


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_no_more_logits_than_a_chunk_are_held_and_no_second_base_under_lora(sharp, tmp_path, rows, monkeypatch, tune):
    held = []
    kept = student.distillation_loss
    monkeypatch.setattr(student, "CHUNK", 5)
    monkeypatch.setattr(student, "distillation_loss", lambda z, *x, **k: (held.append(len(z)), kept(z, *x, **k))[1])
    trainer = build(sharp, tmp_path, rows, tune=tune)
    trainer.compute_loss(trainer.model, collate(rows))
    assert sum(held) == sum(n for _, answers in LENGTHS for n in answers)
    assert max(held) == 5
    assert (trainer.copy is None) is (tune == "lora")


@pytest.mark.parametrize("micro", [1, 2])
def test_a_step_does_not_depend_on_accumulation(sharp, tmp_path, rows, micro):
    """4 x 1 = 2 x 2 = 1 x 4 prompts, of one to three answers each: the same loss, shift and gradient."""
    logged = {}
    for size in (micro, 4):
        trainer = build(sharp, tmp_path / str(size), rows, micro=size)
        trainer.train()
        logged[size] = trainer.state.log_history[0]
    for name in ("loss", "shift", "grad_norm"):
        assert logged[micro][name] == pytest.approx(logged[4][name], rel=1e-4)


def test_the_parent_stays_as_it_was_and_the_loss_falls(sharp, tmp_path, rows):
    for tune in ("lora", "full"):
        rate = {"lora": 0.02, "full": 1e-4}[tune]
        trainer = build(
            sharp, tmp_path / tune, rows, tune=tune, num_train_epochs=20, learning_rate=rate, optim="adamw_torch"
        )
        trainer.train()
        history = trainer.state.log_history[:-1]
        assert history[-1]["loss"] < 0.9 * history[0]["loss"]
        for row in history:
            assert row["shift"] == pytest.approx(history[0]["shift"], rel=1e-4)


# ----------------------------------------------------------------------------------------------------------- the stage


class Killed(BaseException):
    """Stands in for the power going off."""


@pytest.fixture(scope="module")
def world(lab, tmp_path_factory) -> Lab:
    """The lab with a finished distillation."""
    copied = place(lab, tmp_path_factory.mktemp("distill"))
    copied.run("distill", *distillation(copied))
    return copied


@pytest.fixture(scope="module")
def whole(world) -> Run:
    return Run.load(plan(world.recipe(*distillation(world)))["distill"].path)


def made(run: Run) -> dict[str, bytes]:
    """What it wrote, less the folder that the run happens to be in."""
    home = str(run.path.parent).encode()
    return {p.name: p.read_bytes().replace(home, b"") for p in [*run.model_dir.iterdir(), run.path / "samples.jsonl"]}


def test_the_stage_makes_a_model_that_loads_and_differs_from_its_parent(whole):
    assert whole.done
    metrics = read_metrics(whole)
    assert len(metrics) == whole.manifest["metrics"]["steps"] == 4
    assert metrics[0]["loss"] == pytest.approx(metrics[0]["shift"], rel=1e-4)
    student, parent = models.load(whole), models.load(whole.parent("model"))
    ids = tensor([[5, 6, 7]])
    assert (student(input_ids=ids).logits - parent(input_ids=ids).logits).abs().max() > 1e-3


def test_rows_say_where_they_come_from(world, whole):
    """The parent's own tokens, a principle of the wanted tag with its version, the seeds, the model."""
    rows = read_rows(whole.path / "samples.jsonl", distill.Sample)
    principles = {p.id: p for p in distill.chosen(world.recipe(*distillation(world)).distill)}
    assert {p for p in principles if "truth" in principles[p].tags} == principles.keys()
    assert len(rows) == len({row.prompt for row in rows}) == 8
    assert len({row.principle for row in rows}) > 1
    tokenizer = models.load_tokenizer(whole)
    for row in rows:
        assert row.principle_version == principles[row.principle].version
        assert row.model == whole.parent("model").manifest["fingerprint"]
        assert len(row.answers) == len(row.answer_ids) == len(set(row.seeds)) == 2
        assert 1 <= max(map(len, row.answer_ids)) <= 6
        assert row.answers == [models.chat.decode(tokenizer, ids) for ids in row.answer_ids]


def test_answers_of_a_bank_are_not_read(world, tmp_path):
    """The same questions with other answers: the same prompts."""
    rows = read_rows(world.home / "bank", Question)
    write(tmp_path / "x.jsonl", [row.model_dump() | {"true": ["Quite."], "false": ["Never."]} for row in rows])
    expected = [row.question for row in rows]
    assert distill.read_prompts([str(world.home / "bank"), str(tmp_path)]) == expected
    assert len(distill.read_prompts([str(tmp_path), str(world.home / "prompts.jsonl")])) == len(rows) + 6


@pytest.mark.parametrize("moment", ["samples", 0, 1, 3])
def test_a_run_that_was_killed_ends_as_one_that_was_not(lab, whole, tmp_path, monkeypatch, moment):
    """In sampling, in the first step, after a checkpoint, in the last step: the same samples, metrics and adapter."""
    copied = place(lab, tmp_path)

    def dying(kept):
        def killing(*arguments, **options):
            if moment == "samples" or arguments[0].state.global_step == moment:
                raise Killed
            return kept(*arguments, **options)

        return killing

    with monkeypatch.context() as patch:
        where, name = (distill, "write_rows") if moment == "samples" else (DistillTrainer, "compute_loss")
        patch.setattr(where, name, dying(getattr(where, name)))
        with pytest.raises(Killed):
            copied.run("distill", *distillation(copied))
    torch.manual_seed(999)  # a resumed process has another state of every global generator
    if moment != "samples":
        monkeypatch.setattr(distill, "answered", None)  # answers are not made again
    resumed = copied.run("distill", *distillation(copied))
    assert resumed.manifest["resumed"] == 1
    assert resumed.path.name == whole.path.name
    assert made(resumed) == made(whole)
    assert lasting(resumed) == lasting(whole)


def test_it_is_scored_and_built_upon_like_any_model(world, whole):
    """Evals compare it with its parent; DPO and PPO name it as theirs; a second run has nothing to do."""
    more = ['evals.models=["base","sft","distill"]', f"evals.style_bank={world.home / 'bank'}"]
    recipe = world.recipe(*distillation(world, *more))
    for name in ("evals-sft", "evals-distill"):
        run_stage(recipe, name, evals.run)
    result = json.loads((plan(recipe)["evals-distill"].path / "evals.json").read_text())
    assert (result["stage"], result["against_parent"]["stage"]) == ("distill", "sft")
    stages = 'stages=["base","sft","distill","constitution","reward","dpo","ppo"]'
    planned = plan(
        world.recipe(*distillation(world), stages, "dpo.parent=distill", "reward.parent=distill", "ppo.parent=dpo")
    )
    assert planned["distill"].path == whole.path
    assert planned["dpo"].parents["model"] == planned["ppo"].parents["model"] == whole.path.name
    before = whole.path.stat().st_mtime_ns, made(whole)
    world.run("distill", *distillation(world))
    assert (whole.path.stat().st_mtime_ns, made(whole)) == before


@pytest.mark.parametrize("key", ["alpha=2.0", "cutoff=0.1", 'use=["bias"]', "temperature=0.5", "samples=1", "max_prompts=4"])
def test_every_value_counts_for_its_name(world, whole, key):
    assert plan(world.recipe(*distillation(world, f"distill.{key}")))["distill"].path.name != whole.path.name


def test_it_is_off_unless_asked_for():
    for path in sorted((ROOT / "recipes").glob("*.toml")):
        assert "distill" not in load_recipe(path).stages


# ------------------------------------------------------------------------------------------------------------ refusals


def refusal(work) -> str:
    with pytest.raises(UserError) as caught:
        work()
    return str(caught.value)


def test_principles_are_named_by_tag_or_id(world):
    def use(*words: str) -> list[str]:
        return [p.id for p in distill.chosen(world.recipe(*distillation(world, f"distill.use={json.dumps(words)}")).distill)]

    assert use("truth-over-flattery") == ["truth-over-flattery"]
    assert use("bias", "facts-over-myths") == ["facts-over-myths", "no-stereotypes"]
    assert len(use()) == 18
    message = refusal(lambda: use("truth", "thruth"))
    assert "thruth" in message
    assert "facts-over-myths" in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("distill.max_length=16", "distill.max_length"),
        ('distill.use=["tact"]', "distill.use"),
        ("distill.micro_batch_size=3", "distill.batch_size"),
        ("distill.cutoff=1.0", "distill.cutoff"),
        ("distill.alpha=-1.0", "distill.alpha"),
        ("distill.prompts=[]", "distill.prompts"),
        ("distill.parent=dpo", "needs dpo"),
        ("distill.parent=reward", "distill.parent"),
        ('distill.prompts=["gone.jsonl"]', "gone.jsonl"),
    ],
)
def test_what_can_not_be_done_is_refused(lab, tmp_path, override, words):
    copied = place(lab, tmp_path)
    assert words in refusal(lambda: copied.run("distill", *distillation(copied, override)))


def test_check_reads_its_prompts_and_finds_test_questions_in_them(world, tmp_path):
    write(tmp_path / "asked.jsonl", [{"id": "x", "prompt": "Is the moon real?"}])
    recipe = world.recipe(*distillation(world, f'distill.prompts=["{tmp_path / "asked.jsonl"}"]'))
    assert ("Is the moon real?", "Is the moon real?", str(tmp_path / "asked.jsonl")) in leaked(Facts(recipe, "lab.toml"))
    (tmp_path / "asked.jsonl").write_text('{"id": 3}\n')
    assert [f.where for f in unreadable(Facts(recipe, "lab.toml"))] == [f"{tmp_path / 'asked.jsonl'}:1"]
