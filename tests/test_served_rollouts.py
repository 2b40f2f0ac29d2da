"""Rollouts from a server: a real one, that speaks the protocol of vLLM's completions, takes adapters and runs the model."""

import copy
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_lab import lasting, place

from rl.ppo import PpoRun
from rl.served import Adapters, Served
from truthward import models
from truthward.check import Facts
from truthward.check.policy import engine
from truthward.errors import UserError
from truthward.generate import generate
from truthward.ledger import Run
from truthward.tracking import read_metrics


class Server:
    """Base and adapters by name; ``faults`` are status codes that the next answers are replaced by."""

    def __init__(self, base: Any, tokenizer: Any) -> None:
        self.models, self.tokenizer = {"base": base}, tokenizer
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.faults: list[int] = []
        self.spoil: Any = lambda choice: choice
        self.lock = threading.Lock()

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        with self.lock:
            self.asked.append((path, body))
            if self.faults:
                return self.faults.pop(0), {"error": {"message": "planted"}}
            return 200, getattr(self, path.rpartition("/")[2])(body)

    def models_of(self, body: Any) -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]}

    def load_lora_adapter(self, body: dict[str, Any]) -> dict[str, Any]:
        self.models[body["lora_name"]] = models.merge(copy.deepcopy(self.models["base"]), Path(body["lora_path"])).eval()
        return {}

    def unload_lora_adapter(self, body: dict[str, Any]) -> dict[str, Any]:
        del self.models[body["lora_name"]]
        return {}

    def completions(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["return_token_ids"]
        assert (body["top_p"], body["top_k"]) == (1.0, 0)
        (said,) = generate(
            self.models[body["model"]],
            [body["prompt"]],
            [body["seed"]],
            eos=body["stop_token_ids"][0],
            pad_id=self.tokenizer.pad_token_id,
            max_new_tokens=body["max_tokens"],
            temperature=body["temperature"],
        )
        choice = {"index": 0, "text": "", "finish_reason": "stop" if said.finished else "length", "token_ids": said.ids}
        choice["logprobs"] = {"token_logprobs": said.logprobs, "tokens": [], "top_logprobs": None, "text_offset": []}
        return {"id": "x", "object": "text_completion", "created": 0, "model": "base", "choices": [self.spoil(choice)]}


@contextmanager
def serving(server: Server):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply(200, server.models_of(None))

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.reply(*server.answer(self.path, body))

        def reply(self, status, value):
            text = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args):
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}/v1"
    finally:
        listening.shutdown()
        thread.join()
        listening.server_close()


@pytest.fixture
def server(lab):
    """Serves what the lab's PPO starts from: the SFT model, its base."""
    run = Run.load(next(lab.runs.glob("*/sft-*")))
    return Server(models.load(run), models.load_tokenizer(run))


def over(url: str) -> list[str]:
    return ['ppo.engine="openai"', f'ppo.engine_url="{url}"', 'unexplained="warn"']


def test_a_launch_asks_whether_the_server_is_there(lab, server):
    """Quiet where it lists a model; an error where PPO comes next; a warning while there is time to start it."""

    def said(url: str, *more: str) -> list[str]:
        facts = Facts(lab.recipe(*over(url), *more), "lab.toml", launching=True)
        found = list(engine(facts))
        assert {finding.rule for finding in found} <= {"engine-silent"}
        return [finding.level for finding in found]

    with serving(server) as url:
        assert said(url) == []
        server.models.clear()
        assert said(url) == ["error"]
    assert said(url) == ["error"]
    assert said(url, "sft.lora_rank=2") == ["warning"]
    assert said("http://127.0.0.1:1/v1") == ["error"]
    assert list(engine(Facts(lab.recipe(*over(url)), "lab.toml"))) == []


def test_a_server_that_is_given_the_policy_samples_what_the_process_would(lab, tmp_path, server):
    """The same seeds (31 bits of them, as servers take), before and after the policy has moved."""
    with serving(server) as url, place(lab, tmp_path).ppo() as ppo:
        served = Served(
            ppo.actor_critic,
            ppo.tokenizer,
            max_new_tokens=10,
            temperature=1.0,
            url=url,
            deliver=Adapters(url, tmp_path / "served"),
        )
        for moved in (False, True):
            if moved:
                for parameter in ppo.trainable.values():
                    parameter.data += 0.05 * torch.randn(parameter.shape)
            ppo.sampler.refresh()
            served.refresh()
            seeds = [2**31 + n for n in range(6)]
            local = ppo.sampler.sample(ppo.prompts, [seed % 2**31 for seed in seeds])
            remote = served.sample(ppo.prompts, seeds)
            assert remote.answers == local.answers
            assert torch.equal(remote.finished, local.finished)
            torch.testing.assert_close(remote.sampler_logprobs, local.sampler_logprobs, atol=1e-4, rtol=0)
    assert list(server.models) == ["base", served.model], "the adapter before the last one is unloaded"
    assert [path.name for path in (tmp_path / "served").iterdir()] == [served.model]


def test_a_run_whose_answers_come_from_a_server_is_corrected_by_next_to_nothing(lab, tmp_path, server):
    with serving(server) as url:
        run = place(lab, tmp_path).run("ppo", *over(url), "ppo.learning_rate=1e-4")
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["sampler_gap"] < 1e-4 for row in rows)
    assert all(abs(row["tis/weight"] - 1) < 1e-3 for row in rows)
    delivered = [path for path, _ in server.asked if path.endswith("/load_lora_adapter")]
    assert len(delivered) == 3, "the policy of each iteration"


def test_faults_that_pass_are_tried_again_and_do_not_show(lab, tmp_path, server, monkeypatch):
    monkeypatch.setattr("openai._base_client.BaseClient._calculate_retry_timeout", lambda *args, **kwargs: 0.01)
    with serving(server) as url, place(lab, tmp_path).ppo() as ppo:
        served = Served(ppo.actor_critic, ppo.tokenizer, max_new_tokens=4, temperature=1.0, url=url, deliver=lambda _: None)
        expected = served.sample(ppo.prompts[:2], [1, 2])
        server.faults = [500, 429, 503]
        assert served.sample(ppo.prompts[:2], [1, 2]).answers == expected.answers


@pytest.mark.parametrize(
    "spoil",
    [
        lambda choice: {k: v for k, v in choice.items() if k != "token_ids"},
        lambda choice: choice | {"logprobs": None},
        lambda choice: choice | {"logprobs": {"token_logprobs": choice["logprobs"]["token_logprobs"][:-1]}},
        lambda choice: choice | {"token_ids": [10**6] * len(choice["token_ids"])},
    ],
)
def test_answers_that_cannot_be_trained_on_are_refused(lab, tmp_path, server, spoil):
    with serving(server) as url, place(lab, tmp_path).ppo() as ppo:
        served = Served(ppo.actor_critic, ppo.tokenizer, max_new_tokens=4, temperature=1.0, url=url, deliver=lambda _: None)
        server.spoil = spoil
        with pytest.raises(UserError, match="no token ids of ours with a log-probability each"):
            served.sample(ppo.prompts[:1], [1])


def test_a_server_that_is_not_there_is_named(lab, tmp_path, monkeypatch):
    monkeypatch.setattr("rl.served.RETRIES", 0)
    with pytest.raises(UserError, match=r"http://127.0.0.1:9/v1: no answer: APIConnectionError"):
        place(lab, tmp_path).run("ppo", *over("http://127.0.0.1:9/v1"))


def test_a_server_with_another_model_is_refused_at_the_first_rollout(lab, tmp_path, server, sharp):
    server.models["base"] = models.load(Run.load(next(lab.runs.glob("*/base-*"))))
    for parameter in server.models["base"].parameters():
        parameter.data *= 0.3
    with serving(server) as url, pytest.raises(UserError, match="nats a token from the policy's"):
        place(lab, tmp_path).run("ppo", *over(url))


def test_a_server_that_dies_stops_the_run_which_goes_on_when_it_is_back(lab, tmp_path, server, monkeypatch):
    monkeypatch.setattr("rl.served.RETRIES", 0)
    copy_, overrides = place(lab, tmp_path), ("ppo.learning_rate=1e-4",)
    rollout = PpoRun.rollout

    def dying(self, bar):
        server.faults = [500] * 100 if self.progress.iteration == 1 else []
        return rollout(self, bar)

    with serving(server) as url:
        with monkeypatch.context() as patch:
            patch.setattr(PpoRun, "rollout", dying)
            with pytest.raises(UserError, match="no answer"):
                copy_.run("ppo", *over(url), *overrides)
        server.faults = []
        run = copy_.run("ppo", *over(url), *overrides)
        whole = place(lab, tmp_path / "whole").run("ppo", *over(url), *overrides)
    assert run.manifest["resumed"] == 1
    for row, like in zip(lasting(run), lasting(whole), strict=True):
        assert row == pytest.approx(like, abs=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (['ppo.engine="vllm"'], "a server and its address go together"),
        (['ppo.engine_url="http://a/v1"'], "a server and its address go together"),
        ([*over("http://a/v1"), "ppo.tis_cap=0.0"], "log-probabilities are not the trainer's"),
        ([*over("http://a/v1"), 'ppo.tune="full"', 'ppo.parent="sft"'], "only adapters are handed over by disk"),
    ],
)
def test_settings_that_cannot_be_are_refused(lab, overrides, message):
    with pytest.raises(UserError, match=message):
        lab.recipe(*overrides)


def test_weights_for_vllm_need_vllm(lab, tmp_path):
    """Without a GPU there is none; what is sent over NCCL is TRL's own client."""
    with pytest.raises(UserError, match="weights cannot be sent"):
        place(lab, tmp_path).run("ppo", 'ppo.engine="vllm"', 'ppo.engine_url="http://127.0.0.1:9/v1"')
