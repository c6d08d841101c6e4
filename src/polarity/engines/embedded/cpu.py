"""What makes PyTorch fast on a CPU: memory that is reused, and float32 products in oneDNN.

Neither changes a result beyond rounding; a GPU needs none of it. Measured with benchmarks/embedded_step.py.
"""

import ctypes
import sys
from typing import Any

import torch
from torch import Tensor

ONEDNN_WEIGHTS = 2**16  # 256 x 256: from here on oneDNN was faster at every number of rows measured
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def keep_freed_memory() -> None:
    """Let glibc reuse freed blocks of any size, instead of returning large ones to the kernel at once.

    Every large temporary tensor is otherwise new memory, cleared and mapped page by page. Other C libraries lack the
    call and are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, 2**30)
        mallopt(M_MMAP_THRESHOLD, 2**30)


class OneDnnLinear(torch.nn.Linear):
    """A linear layer whose three products run in oneDNN: float32 as before, with AVX-512 on every CPU that has it.

    PyTorch sends float32 products to MKL, which keeps to AVX2 on other makers' CPUs and is half as fast there.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype != torch.float32:
            return super().forward(input)
        found: Tensor = _Linear.apply(input, self.weight, self.bias)
        return found


class _Linear(torch.autograd.Function):
    """x (..., in), weight (out, in), bias (out) or None -> x weight^T + bias (..., out)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, (need_x, need_weight, need_bias) = grad.flatten(0, -2), ctx.needs_input_grad
        return (
            _product(grad, weight.t()) if need_x else None,
            _product(rows.t(), x.flatten(0, -2).t()) if need_weight else None,
            rows.sum(0) if need_bias else None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


def use_onednn(model: Any) -> None:
    """Change the model's large linear layers in place; small ones are faster in MKL, where a call costs less."""
    if torch.backends.mkl.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        for module in model.modules():
            if type(module) is torch.nn.Linear and module.weight.numel() >= ONEDNN_WEIGHTS:
                module.__class__ = OneDnnLinear
