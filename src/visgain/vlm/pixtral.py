"""PixtralProcessor without torchvision.

Its module imports one function from the module of the image processor that is written for torchvision; the module of
the one for PIL has the same function. Pixtral and Mistral 3 need nothing else of torchvision.
"""

from __future__ import annotations

import importlib
import sys
from contextlib import suppress

from transformers.utils import is_torchvision_available

_MODELS = "transformers.models.pixtral"
_WANTED = f"{_MODELS}.image_processing_pixtral"


def mend_pixtral() -> None:
    """Make PixtralProcessor known to transformers where torchvision is missing. Does nothing if it cannot."""
    if is_torchvision_available():
        return
    with suppress(ImportError, AttributeError):
        package = importlib.import_module(_MODELS)
        sys.modules[_WANTED] = importlib.import_module(f"{_MODELS}.image_processing_pil_pixtral")
        try:
            processing = importlib.import_module(f"{_MODELS}.processing_pixtral")
        finally:
            del sys.modules[_WANTED]
        vars(package)["PixtralProcessor"] = processing.PixtralProcessor
