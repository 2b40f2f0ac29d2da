"""Linear layers by oneDNN are ``F.linear``: forward, and the gradients of input, weight and bias."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from truthward import products


def gradients(layer, x, by):
    x = x.clone().requires_grad_()
    out = layer(x)
    out.backward(by)
    return [out, x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (1, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_value_and_gradients_are_torchs(shape, bias):
    plain = nn.Linear(6, 9, bias=bias)
    quick = products.quicken(copy.deepcopy(plain))
    assert type(quick) is products.Linear
    x, by = torch.randn(*shape, 6), torch.randn(*shape, 9)
    for expected, got in zip(gradients(plain, x, by), gradients(quick, x, by), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_a_frozen_layer_keeps_nothing_of_its_input_and_gets_no_gradient():
    layer = products.quicken(nn.Linear(6, 9)).requires_grad_(False)
    x = torch.randn(4, 6, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        out = layer(x)
    assert kept == [(9, 6)]
    out.sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(4, 6))


def test_what_strides_a_gradient_comes_with_does_not_matter():
    """A sum's gradient is expanded (strides 0), a transposed one is not contiguous."""
    plain = nn.Linear(6, 4)
    quick = products.quicken(copy.deepcopy(plain))
    x = torch.randn(4, 6)
    for by in (torch.ones(()).expand(4, 4), torch.randn(4, 4).t()):
        for expected, got in zip(gradients(plain, x, by), gradients(quick, x, by), strict=True):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        plain.zero_grad()
        quick.zero_grad()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_are_left_to_torch(dtype):
    layer = products.quicken(nn.Linear(6, 9, dtype=dtype))
    x = torch.randn(4, 6, dtype=dtype)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_autocast_does_its_part():
    layer = products.quicken(nn.Linear(6, 9))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(4, 6)).dtype == torch.bfloat16


def test_only_plain_layers_are_quickened():
    class Special(nn.Linear):
        pass

    model = products.quicken(nn.Sequential(nn.Linear(2, 2), Special(2, 2)))
    assert [type(m) for m in model] == [products.Linear, Special]


def adapted(dtype=torch.float32, **options):
    """A layer of 6 to 9 with one adapter of rank 3 whose B is not zero."""
    model = get_peft_model(
        nn.Sequential(nn.Linear(6, 9, dtype=dtype)), LoraConfig(r=3, lora_alpha=12, target_modules=["0"], **options)
    )
    layer = model.base_model.model[0]
    nn.init.normal_(layer.lora_B["default"].weight)
    return layer


@pytest.mark.parametrize("shape", [(7,), (2, 3, 4)])
def test_an_adapted_layer_is_pefts(shape):
    plain = adapted()
    quick = products.quicken(copy.deepcopy(plain))
    assert type(quick) is products.LoraLinear
    x, by = torch.randn(*shape, 6), torch.randn(*shape, 9)
    expected, got = ([t for t in gradients(layer, x, by) if t is not None] for layer in (plain, quick))
    assert len(got) == len(expected) == 4  # the output, and gradients of input, A and B
    for e, g in zip(expected, got, strict=True):
        torch.testing.assert_close(g, e, atol=1e-5, rtol=1e-5)


def test_an_adapted_layer_by_hand():
    """x = [1, 2], W = [[1, 0]], A = [[1, 1]], B = [[2]], scale 3: 1 + 3 * 3 * 2 = 19."""
    w, a, b = (torch.tensor(t, requires_grad=g) for t, g in (([[1.0, 0.0]], False), ([[1.0, 1.0]], True), ([[2.0]], True)))
    x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    out = products._LoraLinear.apply(x, w, None, a, b, 3.0)
    out.backward(torch.ones(1, 1))
    assert (out.item(), a.grad.tolist(), b.grad.tolist(), x.grad.tolist()) == (19.0, [[6.0, 12.0]], [[9.0]], [[7.0, 6.0]])


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no bf16")
def test_an_adapted_layer_in_bfloat16_is_near_pefts_and_gives_gradients_in_fp32():
    plain = adapted(torch.bfloat16)
    for weights in (plain.lora_A, plain.lora_B):
        weights["default"].weight.data = weights["default"].weight.data.float()
    quick = products.quicken(copy.deepcopy(plain))
    x, by = torch.randn(5, 6).bfloat16(), torch.randn(5, 9).bfloat16()
    expected, got = ([t for t in gradients(layer, x, by) if t is not None] for layer in (plain, quick))
    for e, g in zip(expected, got, strict=True):
        assert g.dtype == e.dtype
        assert (g - e).float().norm() < 0.02 * e.float().norm()


def test_what_is_not_one_plain_adapter_is_left_to_peft():
    x = torch.randn(4, 6)
    off, merged, dropping, dora = adapted(), adapted(), adapted(lora_dropout=0.5), adapted(use_dora=True)
    off.enable_adapters(False)
    merged.merge()
    for plain in (off, merged, dropping, dora):
        quick = products.quicken(copy.deepcopy(plain))
        results = []
        for layer in (plain, quick):
            torch.manual_seed(0)
            results.append(layer(x))
        torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)
