"""A judge behind a real server, ``transformers serve``, with faults put in between."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from faulty_server import Server, passed_on, with_text
from lab import sharpen

from constitution.endpoint import Endpoint
from constitution.replies import SPOKEN
from truthward import chat, models
from truthward.tables import Judge

pytestmark = pytest.mark.slow


@pytest.fixture
def speaker():
    """A tiny random model that says nothing but A or B, by the sign of what it thinks, and stops; and its tokenizer."""
    model, tokenizer = models.fetch_base(models.TINY, seed=2)
    sharpen(model, tokenizer.eos_token_id)
    a, b = (tokenizer.convert_tokens_to_ids(letter) for letter in "AB")
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding[a] *= 1000  # louder than any other token
        embedding[b] = -embedding[a]
    model.generation_config.eos_token_id = [a, b]
    return model, tokenizer


@pytest.fixture
def served(tmp_path, speaker):
    """The address at which ``transformers serve`` gives it, and its name there."""
    model, tokenizer = speaker
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with Server(with_text) as free:  # a free port, given back
        port = free.http.server_address[1]
    name = str(tmp_path / "model")
    command = [Path(sys.executable).parent / "transformers", "serve", name, "--port", str(port), "--device", "cpu"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    yield f"http://localhost:{port}/v1", name
    process.kill()
    process.wait()


def test_faults_before_a_real_server_change_nothing(tmp_path, monkeypatch, speaker, served):
    """The letters that the server says, asked for through faults, are those of the model run here."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("constitution.endpoint.BACKOFF", 0.05)
    monkeypatch.setattr("constitution.endpoint.LONGEST_BACKOFF", 0.2)
    (model, tokenizer), (url, name) = speaker, served
    requests = [chat.user(f"Which is right? {i * i}", "One letter.") for i in range(6, 18)]
    letters = [
        tokenizer.decode(int(model(torch.tensor([chat.prompt_ids(tokenizer, r)])).logits[0, -1].argmax())) for r in requests
    ]
    assert min(letters.count("A"), letters.count("B")) >= 2
    assert set(letters) == {"A", "B"}

    def fault(body, attempt):
        return random.Random(f"{body['messages']} {attempt}").choice(["429", "status 500", "cut", "garbage", None])

    with Server(passed_on(url)) as proxy:
        settings = Judge(base_url=proxy.url, model=name, key_env="", retries=300, concurrency=2)
        judge = Endpoint(settings, tmp_path / "replies.jsonl")
        judge.choices(requests[:1])  # until the server is up
        proxy.asked.clear()
        proxy.fault = fault
        assert judge.choices(requests) == [SPOKEN if letter == "A" else -SPOKEN for letter in letters]
        assert judge.counts["replies"] == len(requests)
    assert len(proxy.asked) > 2 * len(requests)
