"""The lean decoder against the models' own forward passes, and what its precisions, blocks and refreshes promise."""

from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from rl.rollout import Sampler
from truthward import products
from truthward.decoder import Decoder, supports
from truthward.errors import UserError
from truthward.generate import PlainModel, engine_for, generate

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MODELS = {
    "grouped heads, tied": lambda: LlamaForCausalLM(
        LlamaConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    ),
    "one group, untied": lambda: LlamaForCausalLM(
        LlamaConfig(**SMALL, num_attention_heads=4, num_key_value_heads=1, tie_word_embeddings=False)
    ),
    "heads wider than the model, biases": lambda: LlamaForCausalLM(
        LlamaConfig(**SMALL, num_attention_heads=4, num_key_value_heads=4, head_dim=12, attention_bias=True, mlp_bias=True)
    ),
    "stretched positions": lambda: LlamaForCausalLM(
        LlamaConfig(
            **SMALL,
            num_attention_heads=4,
            num_key_value_heads=2,
            rope_parameters={"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4},
        )
    ),
    "qwen": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, num_attention_heads=4, num_key_value_heads=2)),
}
PROMPTS = [[5, 9, 3], [7], [11, 12, 13, 14, 15, 16, 17, 18], [5, 9, 3], [8, 8]]


@pytest.fixture(params=MODELS, ids=lambda name: name)
def model(request):
    model = MODELS[request.param]().eval().requires_grad_(False)
    for parameter in model.parameters():  # biases start at 0 and norms at 1: a fault in them would not show
        if parameter.dim() == 1:
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def decoders(model):
    everything = [(n, m.weight) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    return {
        "shared": Decoder.share(model),
        "packed": Decoder.pack(model, everything, "exact"),
        "in part": Decoder.pack(model, everything[1:3], "exact"),
    }


@torch.inference_mode()
def test_logits_are_those_of_transformers(model):
    """Prompts of different length, one of them twice; then steps, with rows dropped and a second block beside."""
    assert supports(model)
    for decoder in decoders(model).values():
        first, logits = decoder.prefill(PROMPTS, 9)
        second, more = decoder.prefill([[6, 1, 4, 2]], 9)
        texts, logits = [[*p] for p in PROMPTS] + [[6, 1, 4, 2]], torch.cat([logits, more])
        for step in range(6):
            for text, row in zip(texts, logits, strict=True):
                torch.testing.assert_close(row, model(torch.tensor([text])).logits[0, -1], atol=1e-5, rtol=1e-5)
            if step in (2, 4):
                alive = torch.tensor([step == 4, True, False, True, True][: len(first)])
                texts = [texts[i] for i in first.keep(alive).tolist()] + texts[-1:]
            tokens = torch.randint(3, 61, (len(texts),))
            texts = [[*text, int(token)] for text, token in zip(texts, tokens, strict=True)]
            logits = decoder.step([first, second], tokens)


def test_prompts_that_are_equal_are_computed_once(tiny, monkeypatch):
    decoder, seen = Decoder.share(tiny[0]), []
    forward = decoder._forward
    monkeypatch.setattr(decoder, "_forward", lambda ids, *rest: seen.append(len(ids)) or forward(ids, *rest))
    decoder.prefill([[5, 6, 7]] * 4 + [[8]], 2)
    assert seen == [4]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_rows_that_take_others_places_answer_as_alone(sharp, batch_size):
    """Seventeen answers to five prompts pass through a few places."""
    model, tokenizer = sharp
    options = {"eos": tokenizer.eos_token_id, "pad_id": 0, "max_new_tokens": 12, "temperature": 1.0}
    prompts = [[3 + (7 * i + k) % 200 for k in range(1 + 5 * (i % 5))] for i in [j % 5 for j in range(17)]]
    together = generate(model, prompts, list(range(17)), batch_size=batch_size, **options)
    alone = [generate(PlainModel(model, 0), [p], [i], **options)[0] for i, p in enumerate(prompts)]
    assert {a.finished for a in alone} == {True, False}
    assert [a.ids for a in together] == [a.ids for a in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_fast_precisions_return_what_they_sampled_from(tiny, precision):
    """Log-probabilities are those of the fast decoder itself on the same words, near the exact ones and not equal."""
    model, tokenizer = tiny
    fast = Decoder.pack(model, [], precision)
    options = {"eos": tokenizer.eos_token_id, "pad_id": 0, "max_new_tokens": 6, "temperature": 0.7}
    answers = generate(fast, PROMPTS, [1, 2, 3, 4, 5], **options)
    own, exact, got = [], [], []
    with torch.inference_mode():
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            for k, word in enumerate(answer.ids):
                text = prompt + answer.ids[:k]
                own.append((fast.prefill([text], 1)[1][0].float() / 0.7).log_softmax(-1)[word].item())
                exact.append((model(torch.tensor([text])).logits[0, -1] / 0.7).log_softmax(-1)[word].item())
            got += answer.logprobs
    assert got == pytest.approx(own, abs=0.02 if precision == "bfloat16" else 1e-3)
    assert got == pytest.approx(exact, abs=0.2)
    assert max(abs(a - b) for a, b in zip(got, exact, strict=True)) > 1e-5


def test_a_product_of_integers_does_not_mix_rows():
    """Beside a row a thousand times as large, a small row's result is the same to the last bit."""
    product = products.int8(torch.randn(24, 16), torch.randn(24))
    small, large = torch.randn(1, 16), 1000 * torch.randn(1, 16)
    assert torch.equal(product(torch.cat([small, large]))[:1], product(small))


def test_a_product_of_integers_by_hand(monkeypatch):
    """W = [[63, -32], [1, 0.25]] has scales 1 and 1/63; x = [2, -1] has 2/127: steps [127, -64] (63.5 rounds to even).

    63 steps are what any processor can add up; 127 need VNNI.
    """
    monkeypatch.setattr(products, "STEPS", 63)
    got = products.int8(torch.tensor([[63.0, -32.0], [1.0, 0.25]]))(torch.tensor([[2.0, -1.0]]))
    first = (127 * 63 + 64 * 32) * 2 / 127
    second = (127 * 63 - 64 * 16) / 63 * 2 / 127  # 15.75 rounds to 16
    torch.testing.assert_close(got, torch.tensor([[first, second]]))


@pytest.mark.parametrize("make", [products.shared, products.packed, products.bfloat16, products.int8])
def test_a_product_reads_a_transposed_weight(make):
    """A weight may lie in memory either way."""
    x, weight, bias = torch.randn(5, 48), torch.randn(48, 32).t(), torch.randn(32)
    dtype = torch.bfloat16 if make is products.bfloat16 else torch.float32
    got = make(weight, bias)(x.to(dtype)).float()
    assert (got - (x @ weight.t() + bias)).abs().max() < 0.3


def test_other_architectures_go_through_their_own_forward():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=64, n_embd=16, n_layer=2, n_head=2)).eval()
    assert not supports(model)
    assert isinstance(engine_for(model, 0), PlainModel)
    options = {"eos": 2, "pad_id": 0, "max_new_tokens": 5, "temperature": 1.0}
    together = generate(model, PROMPTS, [1, 2, 3, 4, 5], batch_size=2, **options)
    assert [a.ids for a in together] == [
        generate(model, [p], [s], **options)[0].ids for p, s in zip(PROMPTS, [1, 2, 3, 4, 5], strict=True)
    ]


def test_a_model_with_a_window_or_changing_frequencies_is_not_ours():
    config = {**SMALL, "num_attention_heads": 4, "num_key_value_heads": 2}
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert not supports(LlamaForCausalLM(LlamaConfig(**config, rope_parameters=dynamic)))
    windowed = Qwen2Config(**config, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    assert not supports(Qwen2ForCausalLM(windowed))


class Policy(SimpleNamespace):
    """Weights that a sampler takes over: one linear layer differs from the shell."""

    def policy_shell(self):
        return self.shell

    def policy_weights(self):
        yield self.name, self.weight


@pytest.mark.parametrize("precision", products.PRECISIONS)
def test_a_refresh_takes_over_the_weights(sharp, precision):
    model, tokenizer = sharp
    name = "model.layers.1.mlp.down_proj"
    policy = Policy(shell=model, name=name, weight=model.get_submodule(name).weight)
    sampler = Sampler(policy, tokenizer, max_new_tokens=8, temperature=1.0, precision=precision)
    sampler.refresh()
    before = sampler.sample(PROMPTS, [1, 2, 3, 4, 5])
    policy.weight = policy.weight * -1
    assert sampler.sample(PROMPTS, [1, 2, 3, 4, 5]).answers == before.answers
    sampler.refresh()
    after = sampler.sample(PROMPTS, [1, 2, 3, 4, 5])
    assert after.answers != before.answers
    policy.weight = policy.weight * -1
    sampler.refresh()
    assert sampler.sample(PROMPTS, [1, 2, 3, 4, 5]).answers == before.answers


def test_a_sampler_of_another_architecture_copies_only_what_differs():
    shell = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=64, n_embd=16, n_layer=2, n_head=2)).eval()
    name = "transformer.h.0.mlp.c_fc"
    policy = Policy(shell=shell, name=name, weight=shell.get_submodule(name).weight.detach() + 1)
    tokenizer = SimpleNamespace(eos_token_id=2, pad_token_id=0)
    sampler = Sampler(policy, tokenizer, max_new_tokens=4, temperature=1.0, precision="exact")
    sampler.refresh()
    ours, theirs = dict(sampler.model.named_parameters()), dict(shell.named_parameters())
    assert [n for n in theirs if ours[n] is not theirs[n]] == [f"{name}.weight"]
    assert torch.equal(ours[f"{name}.weight"], theirs[f"{name}.weight"] + 1)
    with pytest.raises(UserError):
        Sampler(policy, tokenizer, max_new_tokens=4, temperature=1.0, precision="int8").refresh()


def test_an_unknown_precision_is_refused(tiny):
    with pytest.raises(ValueError, match="int4"):
        Decoder.pack(tiny[0], [], "int4")
