"""A draft of a model: the language part's matrix products in float8 (e4m3), twice as fast as 16 bits on some GPUs.

Weights are scaled once by the largest value of each output, states by the largest of each token, as they come. Three
bits of mantissa are left, so scores are rough: `visgain.scoring.draft` says how rough, on the user's own rows.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import ScalingType, scaled_mm
from transformers import PreTrainedModel

from visgain.errors import ModelError
from visgain.vlm.families import part_modules

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max  # 448
MULTIPLE = 16
"""Kernels take matrices whose inner and output sizes are multiples of this."""


class Float8Linear(nn.Module):
    """`linear` with products in float8 and sums in float32; the output has the dtype of the input.

    A token's row of the output depends on its own states alone, so packs stay exact to their own rounding.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = rounded(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, states: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]:
        rows, scale = rounded(states.reshape(-1, self.in_features))
        product = scaled_mm(
            rows,
            self.weight.t(),
            scale,
            ScalingType.RowWise,
            self.scale.t(),
            ScalingType.RowWise,
            output_dtype=torch.bfloat16 if states.dtype == torch.float16 else states.dtype,
        ).to(states.dtype)
        product = product if self.bias is None else product + self.bias
        return product.reshape(*states.shape[:-1], self.out_features)


def rounded(values: Float[Tensor, "n k"]) -> tuple[Tensor, Tensor]:
    """(float8 [n, k], float32 scale [n, 1]) whose product is nearly `values`; each row's largest value becomes 448."""
    largest = values.abs().amax(dim=1, keepdim=True).float()
    scale = torch.where(largest > 0, largest / LARGEST, 1.0)
    return (values / scale).clamp(-LARGEST, LARGEST).to(FLOAT8), scale


def multiplies(device: torch.device) -> bool:
    """Whether there are float8 products on `device`: GPUs before 2022 have none, nor has PyTorch 2.11 on CPUs."""
    layer = nn.Linear(MULTIPLE, MULTIPLE, device=device, dtype=torch.bfloat16)
    try:
        Float8Linear(layer)(torch.ones(MULTIPLE, MULTIPLE, device=device, dtype=torch.bfloat16))
    except RuntimeError:  # of many kinds
        return False
    return True


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"this {device.type.upper()}"


def make_draft(model: PreTrainedModel) -> int:
    """Replace the linear layers of the language part, its head apart, in place; returns how many there were.

    Raises ModelError if the device has no float8 products, or none of the layers has a size that they take.
    """
    if not multiplies(model.device):
        raise ModelError(
            f"--dtype float8: torch {torch.__version__} does not multiply float8 on {_name(model.device)}; "
            "use --dtype auto"
        )
    head = model.get_output_embeddings()
    done: set[int] = set()
    for part in part_modules(model, "language"):
        for parent in part.modules():
            for name, layer in parent.named_children():
                if type(layer) is nn.Linear and layer is not head and _fits(layer):
                    setattr(parent, name, Float8Linear(layer))
                    done.add(id(layer))
    if not done:
        raise ModelError("--dtype float8: no layer of the language part has sizes that are multiples of 16")
    return len(done)


def _fits(layer: nn.Linear) -> bool:
    return layer.in_features % MULTIPLE == 0 and layer.out_features % MULTIPLE == 0
