"""Linear layers by oneDNN are ``F.linear``: forward, and the gradients of input, weight and bias."""

import copy

import pytest
import torch
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
