"""Linear layers whose float32 products are oneDNN's, for CPUs where it multiplies faster than what torch asks.

Only they ask it: for the small products of attention its calls cost more than they save.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distributed import ONEDNN, Processes, onednn_linear, own_precision

Model = TypeVar("Model", bound=nn.Module)

# Of a layer's in and out the smaller one, from which on the call is worth its cost whatever the number of rows.
NARROWEST = 128


def place(model: Model, processes: Processes) -> Model:
    """The same model on the device of its process, its linear layers multiplied as the precision says."""
    _use(model, processes.precision == ONEDNN)
    return model.to(processes.device)


def continued(processes: Processes, wanted: str, earlier: str, *trained: nn.Module | None) -> Processes:
    """As whom a run goes on that was computed in `earlier`: another machine's CPU takes the same library for float32.

    Args:
        wanted: of the flags; what they name is taken as they say.
        trained: the run's models, placed again where that changes.
    """
    if wanted != "auto" or earlier == processes.precision or {earlier, processes.precision} != {"fp32", ONEDNN}:
        return processes
    processes = replace(processes, precision=own_precision(earlier, processes.device))
    for model in filter(None, trained):
        place(model, processes)
    return processes


def _use(model: nn.Module, wanted: bool) -> None:
    """Have linear layers multiply by oneDNN, but for narrow ones, or as ever; weights and their names stay."""
    for module in model.modules():
        # What else is derived from a linear layer, or parametrized, may compute something else.
        if wanted and type(module) is nn.Linear and min(module.in_features, module.out_features) >= NARROWEST:
            module.__class__ = OneDNNLinear
        elif not wanted and type(module) is OneDNNLinear:
            module.__class__ = nn.Linear  # pyright: ignore[reportAttributeAccessIssue]


class OneDNNLinear(nn.Linear):
    """A linear layer whose float32 products on a CPU are oneDNN's; anything else it computes as ever."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        tensors = [t for t in (input, self.weight, self.bias) if t is not None]
        others = any(t.dtype != torch.float32 or t.device.type != "cpu" for t in tensors)
        if others or torch.is_autocast_enabled("cpu") or input.ndim < 2 or not input.numel():
            return super().forward(input)
        return _Product.apply(*tensors)  # type: ignore[return-value]


class _Product(torch.autograd.Function):
    """F.linear and its gradients, each product by oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        return onednn_linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (grad,) = ctx.saved_tensors, grads
        needs_x, needs_weight, *needs_bias = ctx.needs_input_grad
        rows, of_weight = grad.flatten(0, -2), None  # (n, o)
        if needs_weight:  # a sum over few rows takes oneDNN nine times as long
            inputs = x.flatten(0, -2)  # (n, i)
            of_weight = onednn_linear(rows.t(), inputs.t()) if len(rows) >= NARROWEST else rows.t() @ inputs
        return (
            onednn_linear(grad, weight.t()) if needs_x else None,
            of_weight,
            *(rows.sum(0) if needed else None for needed in needs_bias),
        )
