"""Answers in batches are those one by one, whatever the order, and a resumed run asks only what is missing."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from tests.tiny_models import llava_next
from transformers import AddedToken

from visgain.config import WorldConfig
from visgain.data import open_dataset
from visgain.errors import ModelError
from visgain.evaluation.generate import GREEDY, Ask, Prompt, answers, end_ids, generate_answers, pad_id
from visgain.types import Sample
from visgain.vlm.encode import Encoder
from visgain.vlm.load import VLM, load_vlm
from visgain.vlm.template import make_encoder
from visgain.world.dataset import write_world
from zoo import ZOO


@pytest.fixture(scope="module")
def embedded() -> VLM:
    return load_vlm("embedded", device="cpu")


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    world = tmp_path_factory.mktemp("generate") / "world"
    dataset = open_dataset(write_world(WorldConfig(out=world, split="align", rows=40, seed=4)))
    return [sample for row in range(40) if isinstance(sample := dataset[row], Sample)]


@torch.inference_mode()
def one_by_one(vlm: VLM, sample: Sample) -> str:
    """The plain loop: the most likely token after the whole sequence so far, without any cache."""
    ask = Ask.first_of(sample)
    prompt = make_encoder(vlm).prompt(ask.turns, [image.open() for image in ask.images])
    ids = torch.from_numpy(prompt.input_ids)[None]
    said: list[int] = []
    for _ in range(30):
        token = int(vlm.model(input_ids=ids, **prompt.model_inputs).logits[0, -1].argmax())
        if token in end_ids(vlm):
            break
        said.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return str(vlm.tokenizer.decode(said, skip_special_tokens=True)).strip()


def test_batches_answer_as_one_by_one(embedded: VLM, samples: list[Sample]) -> None:
    found = generate_answers(embedded, make_encoder(embedded), samples[:12], max_new_tokens=30, batch_size=5)
    assert found == [one_by_one(embedded, sample) for sample in samples[:12]]
    assert len(set(found)) > 6


def test_what_is_known_is_not_asked_again(embedded: VLM, samples: list[Sample]) -> None:
    asks = [Ask.first_of(sample) for sample in samples]
    encoder = make_encoder(embedded)
    batches = list(answers(embedded, encoder, asks, max_new_tokens=8, batch_size=3))
    whole = dict(itertools.chain.from_iterable(batches))
    assert sorted(whole) == list(range(len(asks)))
    for done in (1, 5, len(batches)):
        known = {i for batch in batches[:done] for i, _ in batch}
        rest = list(answers(embedded, encoder, asks, max_new_tokens=8, batch_size=3, known=known))
        assert rest == batches[done:]


def test_a_batch_that_is_half_known_is_asked_as_it_was(embedded: VLM, samples: list[Sample]) -> None:
    asks = [Ask.first_of(sample) for sample in samples[:6]]
    [batch] = answers(embedded, make_encoder(embedded), asks, max_new_tokens=8, batch_size=6)
    [again] = answers(embedded, make_encoder(embedded), asks, max_new_tokens=8, batch_size=6, known=[0, 3])
    assert again == batch


def test_pictures_of_several_shapes_and_none_are_answered() -> None:
    vlm = llava_next()
    ask = [Ask.plain("What is this?", [_Flat(size)] if size else []) for size in ((24, 24), (0, 0), (48, 20), (20, 48))]
    ask[1] = Ask.plain("What is this?")
    found = dict(itertools.chain.from_iterable(answers(vlm, make_encoder(vlm), ask, max_new_tokens=3, batch_size=4)))
    alone = [dict(next(iter(answers(vlm, make_encoder(vlm), [one], max_new_tokens=3, batch_size=1))))[0] for one in ask]
    assert [found[i] for i in range(4)] == alone


class _Flat:
    """A picture of one colour."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size, self.key = size, str(size)

    def hint(self) -> None:
        return None

    def open(self):
        from PIL import Image

        return Image.new("RGB", self.size, (200, 30, 60))


class _Scarce:
    """A device that has memory for two prompts."""

    spec = "scarce"

    def __init__(self, room: int) -> None:
        self.room, self.asked = room, []

    def __call__(self, vlm: VLM, encoder: Encoder, prompts: list[Prompt], max_new_tokens: int) -> torch.Tensor:
        self.asked.append(len(prompts))
        if len(prompts) > self.room:
            raise torch.OutOfMemoryError
        return GREEDY(vlm, encoder, prompts, max_new_tokens)


def test_a_batch_that_is_too_large_is_halved(embedded: VLM, samples: list[Sample]) -> None:
    asks = [Ask.first_of(sample) for sample in samples[:5]]
    scarce = _Scarce(2)
    [found] = answers(embedded, make_encoder(embedded), asks, max_new_tokens=8, batch_size=5, decoder=scarce)
    [plain] = answers(embedded, make_encoder(embedded), asks, max_new_tokens=8, batch_size=5)
    assert found == plain
    assert scarce.asked == [5, 2, 3, 1, 2]
    with pytest.raises(ModelError, match="one prompt of"):
        list(answers(embedded, make_encoder(embedded), asks, max_new_tokens=8, batch_size=5, decoder=_Scarce(0)))


class _Counting:
    """Tells how many threads there were to answer with."""

    spec = "counting"

    def __init__(self) -> None:
        self.threads: list[int] = []

    def __call__(self, vlm: VLM, encoder: Encoder, prompts: list[Prompt], max_new_tokens: int) -> torch.Tensor:
        self.threads.append(torch.get_num_threads())
        return torch.zeros(len(prompts), 1, dtype=torch.long)


def test_a_small_model_answers_on_one_thread(embedded: VLM, samples: list[Sample]) -> None:
    before, decoder, ask = torch.get_num_threads(), _Counting(), Ask.first_of(samples[0])
    torch.set_num_threads(2)
    try:
        list(answers(embedded, make_encoder(embedded), [ask], max_new_tokens=1, batch_size=1, decoder=decoder))
        assert (decoder.threads, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)


def test_padding_after_the_end_is_not_text(embedded: VLM, samples: list[Sample]) -> None:
    class Ends:
        spec = "ends"

        def __call__(self, vlm: VLM, encoder: Encoder, prompts: list[Prompt], max_new_tokens: int) -> torch.Tensor:
            a, b = vlm.tokenizer("red cup", add_special_tokens=False)["input_ids"][:2]
            return torch.tensor([[a, end_ids(vlm)[0], b, pad_id(vlm)]] * len(prompts))

    asks = [Ask.first_of(samples[0])]
    [[(_, text)]] = answers(embedded, make_encoder(embedded), asks, max_new_tokens=4, batch_size=1, decoder=Ends())
    first = embedded.tokenizer("red cup", add_special_tokens=False)["input_ids"][:1]
    assert text == embedded.tokenizer.decode(first).strip()


def ends(vlm: VLM) -> set[str]:
    return set(vlm.tokenizer.convert_ids_to_tokens(end_ids(vlm)))


def test_the_end_of_the_templates_turn_ends_an_answer() -> None:
    vlm = ZOO["gemma3"].build()
    assert vlm.model.generation_config.eos_token_id == vlm.tokenizer.convert_tokens_to_ids("<eos>")
    assert ends(vlm) == {"<eos>", "<end_of_turn>"}


def test_of_the_templates_turn_only_a_special_token_ends_an_answer(
    embedded: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = embedded.processor.chat_template
    for end, more in ((r"\n", set()), (r"stop\n", set()), (r"\n<s>\n</s>", {"<s>"})):
        monkeypatch.setattr(embedded.processor, "chat_template", own.replace("{{ eos_token }}", f"{{{{ '{end}' }}}}"))
        assert ends(embedded) == {"</s>"} | more


def test_a_line_break_that_is_a_token_of_its_own_ends_no_answer() -> None:
    vlm = ZOO["gemma3"].build()
    vlm.tokenizer.add_tokens(AddedToken("\n", normalized=False))
    assert ends(vlm) == {"<eos>", "<end_of_turn>"}
    vlm.processor.chat_template = vlm.processor.chat_template.replace("<end_of_turn>", "")
    assert ends(vlm) == {"<eos>"}


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no talk') }}", "{{ messages[0].content }}"])
def test_a_template_that_cannot_be_used_ends_nothing(
    template: str | None, embedded: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded.processor, "chat_template", template)
    assert ends(embedded) == {"</s>"}


def test_a_missing_picture_stops_the_evaluation(embedded: VLM, tmp_path: Path) -> None:
    from visgain.data.images import ImageFile
    from visgain.errors import ImageError

    gone = ImageFile(root=tmp_path, path="gone.png", max_pixels=1000, follow_links=False)
    with pytest.raises(ImageError, match=r"gone\.png"):
        list(answers(embedded, make_encoder(embedded), [Ask.plain("?", [gone])], max_new_tokens=2, batch_size=1))
