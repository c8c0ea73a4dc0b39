"""Learning rates of single parts: what the original LLaVA calls mm_projector_lr, for any part.

Which parameters there are, and which of them decay, stays Trainer's business: matrices and embeddings do, biases and
norms do not. Its groups are only divided.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch.optim import Optimizer
from transformers import PreTrainedModel

from visgain.vlm.families import part_of


def divide_by_rate(optimizer: Optimizer, model: PreTrainedModel, rates: Mapping[str, float]) -> None:
    """Give the parameters of each part in `rates` a group of their own with that learning rate, before any step.

    `model` is the one that has the parts, whatever is wrapped around it. Adapters belong to the part that they are in.
    A rate of a part that it does not have or train changes nothing.
    """
    rate_of = {parameter: rates[part] for parameter, part in part_of(model).items() if part in rates}
    divided = []
    for group in optimizer.param_groups:
        by_rate: dict[float, list[object]] = {}
        for parameter in group["params"]:
            by_rate.setdefault(rate_of.get(id(parameter), group["lr"]), []).append(parameter)
        divided += [{**group, "params": parameters, "lr": rate} for rate, parameters in by_rate.items()]
    optimizer.param_groups = divided
