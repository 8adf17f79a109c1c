"""LoRA's sum in one matrix product: PEFT's forward pass without its passes over whole outputs."""

from typing import Any

import torch
from peft.tuners.lora.bnb import Linear4bit
from peft.tuners.lora.layer import Linear, LoraVariant


class Sum(torch.autograd.Function):
    """W x + s B (A x), written where W x stands.

    Left to autograd, writing into a view of an output has its gradient copied twice on the way
    back.
    """

    @staticmethod
    def forward(
        ctx: Any, result: torch.Tensor, low: torch.Tensor, up: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """`result` [..., out] with scale `low` [..., r] `up` [out, r]^T added to it."""
        ctx.save_for_backward(low, up)
        ctx.scale = scale
        ctx.mark_dirty(result)
        result.view(-1, len(up)).addmm_(low.reshape(-1, up.shape[1]), up.T, alpha=scale)
        return result

    @staticmethod
    def backward(
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, None]:
        low, up = ctx.saved_tensors
        flat, to_low, to_up = grad.reshape(-1, len(up)), None, None
        if ctx.needs_input_grad[1]:
            to_low = (flat @ up).mul_(ctx.scale).view(low.shape)
        if ctx.needs_input_grad[2]:
            to_up = (flat.T @ low.reshape(-1, up.shape[1])).mul_(ctx.scale)
        return grad, to_low, to_up, None


class Fused(LoraVariant):
    """PEFT's LoRA with that sum.

    PEFT scales B A x and adds it to W x in two passes over an output, and once more scales its
    gradient in the backward pass. Beside matrices of a rank of 16 these passes cost as much as the
    products.
    """

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """[..., out] from `x` [..., in] and the base's `result` [..., out], which is changed."""
        low = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        up = module.lora_B[active_adapter].weight
        parts = low.to(result.dtype), up.to(result.dtype)
        found: torch.Tensor = Sum.apply(  # type: ignore[no-untyped-call]
            result, *parts, module.scaling[active_adapter]
        )
        return found


def fuse(model: Any, name: str) -> None:
    """Has an adapter's plain LoRA layers add up that way; DoRA and 8-bit layers keep PEFT's."""
    for layer in model.modules():
        plain = type(layer) in (Linear, Linear4bit) and name in layer.lora_A
        if plain and name not in layer.lora_variant and layer.lora_B[name].bias is None:
            layer.lora_variant[name] = Fused()
