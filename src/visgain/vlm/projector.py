"""Projectors of original LLaVA runs (mm_projector.bin) for an assembled Hugging Face LLaVA.

What LLaVA's pre-training stage leaves behind is the projector alone, as a pickled dictionary of tensors. It is read as
tensors and nothing else: a pickle that needs more could run any program, and is refused.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from visgain.errors import ModelError
from visgain.vlm.load import VLM

NAMES = {
    ("0.weight", "0.bias", "2.weight", "2.bias"): (
        "linear_1.weight",
        "linear_1.bias",
        "linear_2.weight",
        "linear_2.bias",
    ),
    ("weight", "bias"): ("linear_1.weight", "linear_1.bias"),
}
"""Parameters of LLaVA's projectors mlp2x_gelu and linear, and what Hugging Face's LLaVA calls them."""

_OURS = re.compile(r"(?:base_model\.|model\.|module\.)*(?:mm_projector|multi_modal_projector)\.(?P<rest>.+)")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or PyTorch file by name. Raises ModelError if it holds or needs anything else."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings(action="ignore"):  # advice on pickles, ahead of the error
            found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # what a damaged pickle raises is anybody's guess
        raise ModelError(_why_not(path, error)) from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        odd = (
            [name for name, value in found.items() if not isinstance(value, Tensor)] if isinstance(found, dict) else []
        )
        what = f"{odd[0]} in it is no tensor" if odd else f"it holds a {type(found).__name__}, not tensors by name"
        raise ModelError(f"{path} cannot be used: {what}")
    return {str(name): value for name, value in found.items()}


def _why_not(path: Path, error: Exception) -> str:
    needed = re.search(r"GLOBAL ([\w.]+)", str(error))
    if needed is None:
        return f"{path} is damaged, or no file of tensors as torch.save or safetensors write them"
    return (
        f"{path} needs {needed[1]} to be read, and visgain reads no pickle that needs more than tensors: it could run "
        "any program; save its tensors as .safetensors, on a machine that may run it"
    )


def projector_tensors(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """A projector under the names of Hugging Face's LLaVA: linear_1, and linear_2 unless it is a single matrix.

    Raises ModelError if `tensors` hold anything else, or are not one of the projectors known.
    """
    found = {match["rest"]: tensor for name, tensor in tensors.items() if (match := _OURS.fullmatch(name))}
    others = [name for name in tensors if not _OURS.fullmatch(name)]
    if not found:
        raise ModelError(f"{source} holds no projector: its tensors are {_listed(tensors)}")
    if others:
        raise ModelError(
            f"{source} holds more than a projector: {_listed(others)}; a whole checkpoint goes into --model"
        )
    for theirs, names in NAMES.items():
        for known in (theirs, names):
            if set(found) <= set(known) and set(known[::2]) <= set(found):
                return {names[known.index(name)]: tensor for name, tensor in found.items()}
    raise ModelError(f"the projector in {source} is neither mlp2x_gelu nor linear: its tensors are {_listed(found)}")


def load_projector(model: PreTrainedModel, path: Path) -> None:
    """Put the projector in `path` into `model`, a Hugging Face LLaVA. Raises ModelError if that is impossible."""
    put_projector(model, projector_tensors(read_tensors(path), str(path)), str(path))


def with_projector(path: Path | None, load: Callable[[], VLM]) -> VLM:
    """The model that `load` gives, with the projector in `path` if there is one; a bad file is told before loading."""
    tensors = None if path is None else projector_tensors(read_tensors(path), str(path))
    vlm = load()
    if tensors is not None:
        put_projector(vlm.model, tensors, str(path))
    return vlm


@torch.no_grad()
def put_projector(model: PreTrainedModel, tensors: Mapping[str, Tensor], source: str) -> None:
    """Make `tensors`, as projector_tensors gives them, the projector of `model`.

    A single matrix becomes the first of the two, the second the identity and nothing between them, which is the same
    function. Raises ModelError if the model is of another kind, or the sizes differ.
    """
    projector: Any = getattr(model.model, "multi_modal_projector", None)
    if not all(isinstance(getattr(projector, name, None), nn.Linear) for name in ("linear_1", "linear_2")):
        raise ModelError(f"{type(model).__name__} has no projector like LLaVA's, so {source} cannot be put into it")
    tensors = dict(tensors)
    if "linear_2.weight" not in tensors:
        width = projector.linear_2.weight.shape[0]
        tensors |= {"linear_2.weight": torch.eye(width), "linear_2.bias": torch.zeros(width)}
        projector.act = nn.Identity()
        model.config.projector_hidden_act = "linear"
    places = dict(projector.named_parameters())
    for name in sorted(places.keys() | tensors.keys()):
        here, there = (_size(group.get(name)) for group in (places, tensors))
        if here != there:
            raise ModelError(
                f"the projector in {source} is not for this model: {name} is {there} there and {here} here; it goes "
                "with another vision tower or language model"
            )
    for name, parameter in places.items():
        parameter.copy_(tensors[name])


def _size(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else " x ".join(map(str, tensor.shape))


def _listed(names: Mapping[str, Tensor] | list[str]) -> str:
    first = [*names][:4]
    return ", ".join(first) + (f" and {len(names) - len(first)} more" if len(names) > len(first) else "")
