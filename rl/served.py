"""Rollouts from a server: vLLM, or whatever else speaks OpenAI's completions with token ids and takes adapters.

One request an answer, with its own seed, many at once. Prompts and answers travel as token ids, never as text. After each
update the server is given the policy: by TRL's client, GPU to GPU, or as an adapter in a folder that both can read.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai

from rl.rollout import Batch, collate
from truthward import ranks
from truthward.errors import UserError
from truthward.generate import Completion

TOGETHER = 64  # requests under way at once, from each rank
SILENCE = 600.0  # seconds that the server may be silent
RETRIES = 6  # of a request after faults of the network or the server, with growing pauses


class Served:
    """Samples on a server from the policy, as it was at the last :meth:`refresh`. Used by every rank, as a local sampler is.

    Args:
        actor_critic: gives ``policy_weights()`` and ``save_adapter``.
        tokenizer: of the chat model.
        max_new_tokens, temperature: as for :func:`truthward.generate.generate`.
        url: of the server, with ``/v1``.
        deliver: how it gets the policy: :class:`Adapters`, or :class:`Weights` for vLLM.
    """

    def __init__(
        self, actor_critic: Any, tokenizer: Any, *, max_new_tokens: int, temperature: float, url: str, deliver: Any
    ) -> None:
        self.actor_critic, self.tokenizer, self.url, self.deliver = actor_critic, tokenizer, url, deliver
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.client = openai.OpenAI(base_url=url, api_key="none", timeout=SILENCE, max_retries=RETRIES)
        self.model = ranks.lead(self._first_model)

    def _first_model(self) -> str:
        return self._asked(lambda: self.client.models.list().data[0].id)

    def refresh(self) -> None:
        """Give the server the policy's current weights; called by every rank."""
        self.model = self._asked(lambda: self.deliver(self.actor_critic)) or self.model

    def release(self) -> None:
        """Nothing is held here."""

    def sample(self, prompts: list[list[int]], seeds: list[int], tick: Callable[[int], None] = lambda n: None) -> Batch:
        """One answer for each prompt.

        Raises:
            UserError: the server cannot be reached, refuses, or gives no token ids with their log-probabilities.
        """
        with ThreadPoolExecutor(TOGETHER) as pool:
            asked = [pool.submit(self._answer, prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
            completions = []
            for answer in asked:
                completions.append(self._asked(answer.result))
                tick(1)
        return collate(prompts, completions)

    def _answer(self, prompt: list[int], seed: int) -> Completion:
        said = self.client.completions.create(
            model=self.model,
            prompt=prompt,
            max_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=1.0,
            logprobs=0,  # of the sampled tokens alone
            seed=seed % 2**31,
            extra_body={
                "top_k": 0,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "stop_token_ids": [self.tokenizer.eos_token_id],
                "return_token_ids": True,
                "return_tokens_as_token_ids": True,
            },
        )
        choice = said.choices[0]
        ids, logprobs = getattr(choice, "token_ids", None), choice.logprobs and choice.logprobs.token_logprobs
        if not ids or not logprobs or len(ids) != len(logprobs) or max(ids) >= len(self.tokenizer):
            what = "it gives no token ids of ours with a log-probability each"
            fix = "serve the base model of this recipe by a server that knows return_token_ids, such as vLLM"
            raise UserError(what, where=self.url, fix=fix)
        return Completion(list(ids), [float(p) for p in logprobs], ids[-1] == self.tokenizer.eos_token_id)

    def _asked(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except (openai.OpenAIError, httpx.HTTPError, OSError) as error:
            fix = "see whether the server runs and what it says; the same command goes on from the last checkpoint"
            raise UserError(f"no answer: {type(error).__name__}: {error}", where=self.url, fix=fix) from error


class Adapters:
    """Writes the policy's adapter where the server reads it, under a new name each time, and has it loaded.

    vLLM takes adapters at runtime where it was started with ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 … --enable-lora``.

    Args:
        url: of the server, with ``/v1``.
        folder: on a disk that the server sees under the same path.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder, self.times, self.loaded = url.rstrip("/"), folder, 0, ""

    def __call__(self, actor_critic: Any) -> str:
        """Deliver; returns the name under which the server now knows the policy."""
        self.times += 1
        name = f"{self.folder.parent.name}-{self.times}"
        actor_critic.save_adapter("policy", self.folder / name)
        ranks.lead(lambda: self._load(name))
        return name

    def _load(self, name: str) -> None:
        with httpx.Client(timeout=SILENCE) as client:
            body = {"lora_name": name, "lora_path": str((self.folder / name).resolve())}
            client.post(f"{self.url}/load_lora_adapter", json=body).raise_for_status()
            if self.loaded:
                client.post(f"{self.url}/unload_lora_adapter", json={"lora_name": self.loaded}).raise_for_status()
                shutil.rmtree(self.folder / self.loaded, ignore_errors=True)
        self.loaded = name


class Weights:
    """Sends the policy's matrices to vLLM by TRL's client, over NCCL; for ``vllm serve`` with a weight-transfer engine."""

    def __init__(self, url: str, device: Any) -> None:
        self.client: Any = None
        ranks.lead(lambda: self._connect(url.removesuffix("/v1"), device))

    def _connect(self, url: str, device: Any) -> None:
        try:
            from trl.generation.vllm_client import VLLMClient

            client = VLLMClient(base_url=url, connection_timeout=60.0)
            client.init_communicator(device)
        except (ImportError, NotImplementedError, RuntimeError, ConnectionError) as error:
            fix = 'install vllm beside a GPU, or set ppo.engine = "openai", which hands over adapters by disk'
            raise UserError(f"weights cannot be sent: {error}", where="ppo.engine", fix=fix) from error
        self.client = client

    def __call__(self, actor_critic: Any) -> None:
        """Deliver. Every rank goes through the weights, since ZeRO-3 brings each together; the first one sends them."""
        weights = ((f"{name}.weight", weight) for name, weight in actor_critic.policy_weights())
        if not ranks.first():
            for _ in weights:
                pass
            return
        with self.client.weight_update():
            for name, weight in weights:
                self.client.update_named_param(name, weight)
        self.client.reset_prefix_cache()
