"""LoRA's sum in one matrix product: PEFT's forward pass without its passes over whole outputs."""

from typing import Any

import torch
from peft.tuners.lora.bnb import Linear4bit
from peft.tuners.lora.layer import Linear, LoraVariant


class Fused(LoraVariant):
    """W x + s B A x, added up where W x already stands.

    PEFT scales B A x and adds it to W x in two passes over an output, and once more scales its
    gradient in the backward pass. Beside matrices of a rank of 16 these passes cost as much as the
    products; here the scale is the product's own and the sum is written where it belongs.
    """

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """[..., out] from `x` [..., in] and the base's `result` [..., out], which is changed."""
        low = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        up = module.lora_B[active_adapter].weight.to(result.dtype)
        flat = result.view(-1, result.shape[-1])
        flat.addmm_(
            low.to(result.dtype).view(-1, low.shape[-1]), up.T,
            alpha=module.scaling[active_adapter],
        )  # fmt: skip
        return result


def fuse(model: Any, name: str) -> None:
    """Has an adapter's plain LoRA layers add up that way; DoRA and 8-bit layers keep PEFT's."""
    for layer in model.modules():
        plain = type(layer) in (Linear, Linear4bit) and name in layer.lora_A
        if plain and name not in layer.lora_variant and layer.lora_B[name].bias is None:
            layer.lora_variant[name] = Fused()
