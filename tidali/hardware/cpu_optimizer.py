"""SGD for channels-last weights on a CPU, without a copy of every gradient.

torch's fused SGD kernel for a CPU (torch 2.14) copies each gradient that is not contiguous into another memory order, and then
does not read the copy: 6.7 ms of the 13 ms that an optimizer step of a ResNet-18 took on two cores, whatever the batch. This
can go when a profile of ``torch.optim.SGD(..., fused=True)``, taken as tests/unit/test_optimizer.py takes one, has no
``aten::clone``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.sgd import sgd


class ChannelsLastSGD(torch.optim.SGD):
    """torch's fused SGD, called with contiguous views of channels-last tensors.

    Parameters and momentum buffers of four dimensions are channels_last; the buffers exist before the first step.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            with_grad = [(p, p.grad) for p in group["params"] if p.grad is not None]
            buffers = [_as_stored(self.state[p]["momentum_buffer"]) if group["momentum"] else None for p, _ in with_grad]
            sgd(
                [_as_stored(p) for p, _ in with_grad],
                [_as_stored(grad).contiguous() for _, grad in with_grad],
                buffers,
                fused=True,
                grad_scale=getattr(self, "grad_scale", None),  # a gradient scaler's
                found_inf=getattr(self, "found_inf", None),
                **{name: group[name] for name in ("lr", "weight_decay", "momentum", "dampening", "nesterov", "maximize")},
            )


def _as_stored(tensor: Tensor) -> Tensor:
    return tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor
