"""lmms-eval asks, visgain answers: a model for lmms-eval's tasks with our templates, batches and decodings.

    from lmms_eval.evaluator import simple_evaluate
    from visgain.evaluation.lmms import VisgainModel

    simple_evaluate(model=VisgainModel("llava-hf/llava-1.5-7b-hf", decoding="vcd"), tasks=["pope"])

Tried with lmms-eval 0.7.3, which is no dependency. Its tasks that compare likelihoods are not answered.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lmms_eval.api.model import lmms
from PIL.Image import Image

from visgain.errors import DataError
from visgain.evaluation.decoders import parse_decoder
from visgain.evaluation.generate import Ask, answers
from visgain.types import IMAGE_MARK
from visgain.vlm.load import load_vlm
from visgain.vlm.template import make_encoder


@dataclass(frozen=True)
class _Shown:
    """Picture `number` of a row, taken from it when it is needed: a task's pictures do not fit into memory together."""

    key: str
    pictures: Callable[[], Sequence[Image]]
    number: int

    def hint(self) -> None:
        return None

    def open(self) -> Image:
        return self.pictures()[self.number].convert("RGB")


class VisgainModel(lmms):  # type: ignore[misc]
    """Answers requests of lmms-eval in batches.

    Raises DataError for requests with anything but pictures, and whatever loading the model raises.
    """

    def __init__(
        self,
        model: str,
        *,
        decoding: str = "greedy",
        template: str = "auto",
        batch_size: int = 16,
        dtype: str = "float32",
        device: str = "auto",
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self._decoder = parse_decoder(decoding)
        self._batch_size = batch_size
        self._vlm = load_vlm(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        self._encoder = make_encoder(self._vlm, template)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """An answer to each request, cut before the first of the strings that its task stops at."""
        by_length: defaultdict[int, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            by_length[int(request.args[1].get("max_new_tokens", 256))].append(number)
        said: dict[int, str] = {}
        for length, numbers in by_length.items():
            batches = answers(
                self._vlm,
                self._encoder,
                [self._ask(requests[number]) for number in numbers],
                max_new_tokens=length,
                batch_size=self._batch_size,
                decoder=self._decoder,
            )
            said |= {numbers[place]: text for batch in batches for place, text in batch}
        return [_cut(said[number], request.args[1].get("until")) for number, request in enumerate(requests)]

    def _ask(self, request: Any) -> Ask:
        context, _, pictures_of, row, task, split = request.args

        def pictures() -> Sequence[Image]:
            return pictures_of(self.task_dict[task][split][row]) or []

        shown = pictures()
        if not all(isinstance(picture, Image) for picture in shown):
            raise DataError(f"row {row} of {task} shows something that is no picture; visgain answers about pictures")
        images = [_Shown(f"{task}/{split}/{row}/{number}", pictures, number) for number in range(len(shown))]
        return Ask.plain(context.replace(IMAGE_MARK, "").strip(), images)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("visgain answers tasks that generate; this one compares likelihoods")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("visgain answers tasks of one round")


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    stops = [until] if isinstance(until, str) else list(until or ())
    ends = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text
