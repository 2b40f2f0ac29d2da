"""What users of other PPO trainers complained of, one test each.

In the order of the list that they were collected in. That ZeRO-3 saves policy and critic whole is in
tests/test_ranks.py.
"""

import json

import pytest
import torch
from peft import PeftModel
from ppo_lab import assert_same, disturb, files, gradient, lasting, place, policy_logprobs, sampled
from test_rewards import letters, llama, save

from rl import actor_critic, state
from rl.ppo import PpoRun
from truthward import models
from truthward.tracking import read_metrics


class Killed(BaseException):
    """Stands in for the power going off."""


@pytest.fixture(scope="module")
def run(lab, tmp_path_factory):
    """A run to the end."""
    return place(lab, tmp_path_factory.mktemp("run")).run("ppo")


@pytest.fixture(scope="module")
def scored(lab):
    """A run before its first step, with a rollout."""
    with lab.ppo("ppo.kl_coef=0.09") as ppo:
        yield ppo, *sampled(ppo)


def test_resume_goes_on_with_step_rate_and_critic(lab, run, tmp_path, monkeypatch):
    """ "Cannot resume: learning rate, step and critic are lost." """
    copy, score, rates = place(lab, tmp_path), PpoRun.score, []

    def killing(self, batch):
        rates.append((self.progress.step, self.optimizer.param_groups[0]["lr"]))
        if self.progress.iteration == 1 and len(rates) == 2:
            raise Killed
        return score(self, batch)

    monkeypatch.setattr(PpoRun, "score", killing)
    with pytest.raises(Killed):
        copy.run("ppo")
    resumed = copy.run("ppo")
    assert [step for step, _ in rates] == [0, 4, 4, 8]
    assert rates[-1][1] == pytest.approx(1e-3 * (1 - 7 / 12))  # as the last step before it left it
    assert files(resumed) == files(run)
    assert lasting(resumed) == lasting(run)


def test_the_critic_is_kept(run):
    """ "The critic is thrown away when saving." It is an ordinary adapter, and its head is beside it."""
    model = PeftModel.from_pretrained(models.load(run.parent("model")), str(run.path / "critic"))
    adapter = [p for n, p in model.named_parameters() if "lora_B" in n]
    assert all(p.abs().max() > 0 for p in adapter)
    assert models.load_head(run.path / "critic")["weight"].abs().max() > 0


def test_the_kl_that_is_reported_is_the_kl_that_is_trained(scored):
    """ "KL negative, and not the one in the reward." k3 is never below 0; beta times it is what rewards lost."""
    ppo, batch, scores, _ = scored
    apart = scores._replace(ref_logprobs=scores.ref_logprobs + torch.randn(batch.mask.shape))
    kept, at = ppo.table, ppo.progress.kl_coef
    ppo.table = kept.model_copy(update={"gae_lambda": 1.0})
    ppo.progress.iteration, totals = 1, {}
    for beta in (0.0, 0.5):
        ppo.progress.kl_coef = beta
        targets, metrics = ppo.advantages(batch, apart)
        totals[beta] = targets.returns[:, 0].mean().item()
    ppo.table, ppo.progress.iteration, ppo.progress.kl_coef = kept, 0, at
    assert totals[0.0] - totals[0.5] == pytest.approx(0.5 * metrics["kl/answer"], abs=1e-5)
    assert metrics["kl/k3"] > 0.1


def test_no_critic_is_asked_for_where_none_is_used(lab, tmp_path):
    """ "value_model is optional by its type and required in fact." """
    made = place(lab, tmp_path).run("ppo", "ppo.advantage=rloo", "ppo.group_size=2", "ppo.iterations=1")
    assert not (made.path / "critic").exists()
    assert "loss/value" not in read_metrics(made)[0]


def test_lora_trains_and_writes_adapters_alone(scored, run):
    """ "No LoRA." """
    ppo, *_ = scored
    assert all(".lora_" in n or n.startswith("value_head") for n in ppo.trainable)
    assert (run.model_dir / "adapter_model.safetensors").exists()
    assert not (run.model_dir / "config.json").exists()


def test_any_python_function_is_a_reward(lab, tmp_path):
    """ "The reward must be a module with a base_model_prefix." Then there is no preference model in the run at all."""
    (tmp_path / "mine.py").write_text("def short(completions):\n    return [-len(c) for c in completions]\n")
    made = place(lab, tmp_path).run("ppo", f'ppo.rewards=["{tmp_path}/mine.py:short"]', "ppo.iterations=1", "ppo.parent=sft")
    assert set(made.manifest["parents"]) == {"model"}
    (row,) = read_metrics(made)
    assert -50 < row[f"score/{tmp_path}/mine.py:short"] < -3


def test_the_reward_model_may_have_another_tokenizer_and_template(lab, tmp_path):
    """ "The reward model must share the policy's tokenizer." Here it reads single letters."""
    folder = save(tmp_path / "classifier", llama(1, 0), letters(template=True))
    made = place(lab, tmp_path).run("ppo", f'ppo.rewards=["{folder}"]', "ppo.iterations=1", "ppo.parent=sft")
    (row,) = read_metrics(made)
    assert abs(row[f"score/{folder}"]) > 1e-3
    assert made.manifest["data"].keys() >= {folder}


def test_the_score_is_at_the_end_token_and_the_penalty_only_where_there_is_none(scored):
    """ "Reward at the pad token, an EOS penalty that looks at the prompt." All prompts hold end tokens."""
    ppo, batch, scores, _ = scored
    end = ppo.tokenizer.eos_token_id
    assert all(end in prompt for prompt in batch.prompts)
    assert [answer[-1] == end for answer in batch.answers] == batch.finished.tolist()
    kept = ppo.table
    found = []
    for penalty in (0.0, 2.0):
        ppo.table = kept.model_copy(update={"gae_lambda": 0.0, "truncation_penalty": penalty})
        found.append(ppo.advantages(batch, scores)[0].returns)
    ppo.table = kept
    where = (found[0] - found[1]).nonzero().tolist()
    cut = [i for i, ended in enumerate(batch.finished.tolist()) if not ended]
    assert where == [[i, len(batch.answers[i]) - 1] for i in cut] != []


def test_the_first_ratio_is_one(scored):
    """ "The ratio is not 1 in the first minibatch." """
    ppo, batch, scores, _ = scored
    ratio = (policy_logprobs(ppo, batch) - scores.old_logprobs[batch.mask]).exp()
    assert (ratio - 1).abs().max() < 1e-5


def test_memory_one_base_and_logits_of_answers_alone(scored, monkeypatch):
    """ "Four models, and logits of every position." One base under four adapters; the head sees answer tokens only."""
    ppo, batch, *_ = scored
    layers = ppo.actor_critic.policy_shell().config.num_hidden_layers
    names = [n for n, _ in ppo.actor_critic.named_parameters()]
    assert sum(n.endswith("q_proj.base_layer.weight") for n in names) == layers
    head, seen = actor_critic.head_logprobs, []
    monkeypatch.setattr(
        actor_critic, "head_logprobs", lambda h, states, *a, **k: (seen.append(len(states)), head(h, states, *a, **k))[1]
    )
    with torch.no_grad():
        for task in ("policy", "reference", "value", "reward"):
            ppo.actor_critic(task, batch.forest(list(range(8))))
    assert seen == [batch.answer_tokens] * 2 != [batch.tokens] * 2


def test_accumulation_gives_the_same_gradient(lab):
    """ "Runs on one GPU with accumulation do not reproduce those on eight." """
    with lab.ppo("ppo.kl_coef=0.091") as ppo:
        rollout = sampled(ppo)
        disturb(ppo)
        one, _ = gradient(ppo, *rollout, micro_batch_size=8)
        eight, _ = gradient(ppo, *rollout, micro_batch_size=1)
    assert_same(eight, one, 1e-5)


def test_metrics_do_not_look_at_padding(scored):
    """ "Metrics are means over padding." """
    ppo, batch, scores, _ = scored
    clean = ppo.advantages(batch, scores)[1]
    junk = [x + ~batch.mask * 1e3 for x in scores[1:]]
    assert ppo.advantages(batch, type(scores)(scores.scores, *junk))[1] == clean


def test_the_checkpoint_can_be_read_without_running_code(run):
    """Safetensors and JSON alone, and all that is trained is in it."""
    last = max((run.path / "checkpoints").iterdir())
    assert {p.suffix for p in last.iterdir()} == {".safetensors", ".json"}
    assert state.Progress(**json.loads((last / "progress.json").read_text())).iteration == 3
