"""The linear layer that runs in oneDNN against PyTorch's own."""

import copy

import pytest
import torch

from polarity.engines.embedded.cpu import OneDnnLinear


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this PyTorch is built without oneDNN")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (300,)])
def test_same_values_and_gradients(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    plain = torch.nn.Linear(256, 320, bias=bias)
    fast = copy.deepcopy(plain)
    fast.__class__ = OneDnnLinear
    x, weights = torch.randn(*shape, 256), torch.randn(*shape, 320)
    found = []
    for layer in (plain, copy.deepcopy(fast)):  # a copy has weights of its own
        x_here = x.clone().requires_grad_()
        out = layer(x_here)
        (out * weights).sum().backward()
        found.append([out, x_here.grad, *(p.grad for p in layer.parameters())])
    for want, have in zip(*found, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)
