"""Models that would give wrong numbers are refused before anything is computed."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, LlamaConfig, LlamaForCausalLM

from truthward.branches import Item, attend_by_tree, plant
from truthward.errors import UserError
from truthward.ledger import Run, plan
from truthward.models import cast, compose, load, refuse_scaled_logits


@pytest.mark.parametrize("config", [Gemma2Config(), CohereConfig()])
def test_logits_that_change_after_the_head_are_refused(config):
    with pytest.raises(UserError, match="after the head"):
        refuse_scaled_logits(config)


@pytest.mark.parametrize(
    "config", [LlamaConfig(), Gemma2Config(final_logit_softcapping=None), CohereConfig(logit_scale=1.0)]
)
def test_logits_that_are_the_heads_are_taken(config):
    refuse_scaled_logits(config)


def test_attention_that_cannot_be_exchanged_is_refused(monkeypatch):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    monkeypatch.setattr(LlamaForCausalLM, "_can_set_attn_implementation", lambda self: False)
    with pytest.raises(UserError, match="LlamaForCausalLM does not attend"):
        attend_by_tree(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_by_products_is_torchs(sharp, monkeypatch, dtype):
    """Grouped heads, trees of unequal length: against scaled_dot_product_attention on the same padded batch."""
    model = copy.deepcopy(sharp[0]).to(dtype)
    inputs = plant([Item([5, 6, 7], [[8, 9], [10]]), Item([11], [[12]]), Item([20] * 9, [[13, 14]])]).inputs(dtype)
    ours = model(**inputs).logits
    monkeypatch.setattr("truthward.branches._by_products", torch_attention)
    theirs = model(**inputs).logits
    assert (ours - theirs).abs().max() < (1e-4 if dtype == torch.float32 else 0.05) * theirs.abs().max()


def test_in_bf16_positions_are_those_of_transformers(lab):
    """Rotary frequencies are no weights and stay in fp32: a long row's logits are those of a plain load, to the bit."""
    run = Run.load(plan(lab.recipe())["base"].path)
    plain = AutoModelForCausalLM.from_pretrained(run.model_dir, dtype=torch.bfloat16)
    ids = torch.arange(3, 259).repeat(6).unsqueeze(0)
    expected = plain(input_ids=ids).logits
    assert torch.equal(cast(compose(run), torch.bfloat16)(input_ids=ids).logits, expected)
    assert {b.dtype for b in load(run, torch.bfloat16).buffers() if b.is_floating_point()} == {torch.float32}
    assert not torch.equal(compose(run).to(torch.bfloat16)(input_ids=ids).logits, expected)


def torch_attention(module, query, key, value, attention_mask, scaling, **options):
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2), None
