"""Answer tokens are proved by decoding, and LLaVA's templates by an independent construction from their rules."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import processors

from tiny_models import CHATML, SYSTEM, make_sample
from visgain.data import open_dataset
from visgain.errors import EncodingError, ModelError
from visgain.types import Sample, Turn
from visgain.vlm.batch import pad_batch
from visgain.vlm.chat import chat_messages
from visgain.vlm.encode import Encoder, align_expansion, without_end_of_turn
from visgain.vlm.frozen import FrozenEncoder, pad_to_square
from visgain.vlm.load import VLM, load_vlm
from visgain.vlm.profiles import images_first
from visgain.vlm.template import make_encoder
from visgain.world.model import IMAGE_SIDE, PATCH_SIDE

N_PATCHES = (IMAGE_SIDE // PATCH_SIDE) ** 2


def encode(encoder: Encoder, sample: Sample):
    return encoder.encode(sample, [image.open() for image in sample.images])


END_OF_TURN = {"chat": ("</s>", "<|im_end|>\n"), "llava-1.5": ("</s>",)}


# ---------------------------------------------------------------- the contract of every family


@pytest.mark.parametrize(
    "texts",
    [
        ("<image>\nWhat is this?", "A red cup."),
        ("What is <image> this?", "A red cup.", "Is there a dog?", "No, there is a cup."),
        ("<image>\nWhat?", "Ünïcode 🙂 and  two  spaces", "More?", "yes", "And?", "line\nbreak."),
    ],
)
def test_supervised_tokens_decode_to_the_answers_and_their_end_of_turn(family: VLM, texts: tuple[str, ...]) -> None:
    encoder = make_encoder(family)
    encoded = encode(encoder, make_sample(*texts))
    for number, answer in enumerate(texts[1::2]):
        decoded = family.tokenizer.decode(encoded.token_id[encoded.turn == number]).removeprefix(" ")
        assert decoded in {answer + end for end in END_OF_TURN[encoder.name]}
    assert encoded.n_image_tokens > 0
    assert (np.diff(encoded.turn) >= 0).all()


@pytest.mark.parametrize("n_images", [0, 1, 2])
def test_character_spans_cover_each_answer_without_gap_or_overlap(family: VLM, n_images: int) -> None:
    marks = "<image>\n" * n_images
    encoded = encode(
        make_encoder(family), make_sample(f"{marks}What is this?", "A red cup.", "And?", "No.", images=n_images)
    )
    for number, answer in enumerate(["A red cup.", "No."]):
        spans = encoded.chars[encoded.turn == number].tolist()
        words = [span for span in spans if span[1] > span[0]]
        assert words[0][0] == 0
        assert words[-1][1] == len(answer)
        assert all(left[1] == right[0] for left, right in itertools.pairwise(words))
        assert spans[-1] == [len(answer), len(answer)]


def test_truncation_keeps_a_prefix_and_says_so(family: VLM) -> None:
    sample = make_sample("<image>\nWhat is this?", "A red cup on a table. " * 8)
    whole = encode(make_encoder(family), sample)
    cut = encode(make_encoder(family, max_length=len(whole.input_ids) - 5), sample)
    assert cut.truncated
    assert not whole.truncated
    assert np.array_equal(cut.input_ids, whole.input_ids[:-5])
    assert np.array_equal(cut.is_answer, whole.is_answer[:-5])
    assert len(cut.turn) == len(cut.chars) == cut.is_answer.sum()


def test_an_image_that_does_not_fit_is_an_error_and_not_a_short_image(family: VLM) -> None:
    with pytest.raises(EncodingError, match=r"image tokens do not fit into --max-length|no answer token fits"):
        encode(make_encoder(family, max_length=10), make_sample("<image>\nWhat is this?", "A red cup."))


def test_a_prompt_ends_where_the_first_answer_begins(family: VLM) -> None:
    encoder = make_encoder(family)
    sample = make_sample("<image>\nWhat is this?", "A red cup.")
    prompt = encoder.prompt(sample.turns[:1], [sample.images[0].open()])
    encoded = encode(encoder, sample)
    first = int(encoded.is_answer.argmax())
    assert np.array_equal(prompt.input_ids, encoded.input_ids[:first])


def test_padding_gives_every_model_input_its_place(family: VLM) -> None:
    encoder = make_encoder(family)
    short = encode(encoder, make_sample("<image>\nWhat is this?", "No."))
    long = encode(encoder, make_sample("<image>\nWhat is this?", "A red cup on a table."))
    batch = pad_batch([short, long], pad_id=0)
    size = len(short.input_ids)
    assert batch.inputs["input_ids"].shape == batch.is_answer.shape == (2, len(long.input_ids))
    assert batch.inputs["attention_mask"][0].tolist() == [1] * size + [0] * (len(long.input_ids) - size)
    assert batch.inputs["pixel_values"].shape[0] == 2 * short.model_inputs["pixel_values"].shape[0]
    left = pad_batch([short, long], pad_id=0, side="left")
    assert left.inputs["input_ids"][0, -size:].tolist() == short.input_ids.tolist()
    assert left.is_answer[0, -size:].tolist() == short.is_answer.tolist()


def test_pictures_of_different_shape_are_refused_side_by_side(llava_next: VLM) -> None:
    encoder = make_encoder(llava_next)
    sample = make_sample("<image>\nWhat is this?", "No.")
    wide, square = (encoder.encode(sample, [Image.new("RGB", size)]) for size in ((96, 20), (40, 40)))
    assert wide.n_image_tokens != square.n_image_tokens
    with pytest.raises(ModelError, match="different shapes"):
        pad_batch([wide, square], pad_id=0)
    assert pad_batch([wide, wide], pad_id=0).is_answer.shape[0] == 2


def test_ignoring_the_end_of_turn_leaves_the_words(family: VLM) -> None:
    encoded = without_end_of_turn(encode(make_encoder(family), make_sample("<image>\nWhat is this?", "A red cup.")))
    assert family.tokenizer.decode(encoded.token_id).removeprefix(" ") == "A red cup."


# ---------------------------------------------------------------- LLaVA to the label


def expected_v1(tokenizer, conversation: list[str], n_patches: int) -> tuple[list[int], list[bool]]:
    """LLaVA-1.5's ids and labels, built piece by piece from the rules and with no regard to our encoder.

    Supervision is found by decoding: whether the text up to and including a token reaches into an answer.
    """
    text = SYSTEM + " "
    is_answer_char: list[bool] = [False] * len(text)
    for question, answer in zip(conversation[0::2], conversation[1::2], strict=True):
        prompt, said = f"USER: {question} ASSISTANT:", f" {answer}</s>"
        text += prompt + said
        is_answer_char += [False] * len(prompt) + [True] * len(said)
    ids, labels, position = [tokenizer.bos_token_id], [False], 0
    image = tokenizer.convert_tokens_to_ids("<image>")
    for number, piece in enumerate(text.split("<image>")):
        if number:
            ids += [image] * n_patches
            labels += [False] * n_patches
            position += len("<image>")
        encoded = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)
        for token, (start, stop) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            ids.append(token)
            labels.append(any(is_answer_char[position + start : position + stop]))
        position += len(piece)
    return ids, labels


def real_conversations(shared_data: Path) -> list[Sample]:
    dataset = open_dataset(shared_data / "mix.json", shared_data)
    return [sample for row in range(0, 4720, 59) if isinstance(sample := dataset[row], Sample)]


def test_llava_ids_and_labels_equal_an_independent_construction_on_real_conversations(
    llava: VLM, shared_data: Path
) -> None:
    encoder = make_encoder(llava, "llava-1.5")
    checked = 0
    for sample in real_conversations(shared_data):
        conversation = [images_first(t.text) if t.role == "user" else t.text for t in sample.turns]
        if len(sample.images) > 1 or any("<" in text.replace("<image>", "") for text in conversation):
            continue
        ids, labels = expected_v1(llava.tokenizer, conversation, n_patches=N_PATCHES)
        encoded = encoder.encode(sample, [image.open() for image in sample.images])
        assert encoded.input_ids.tolist() == ids[:2048]
        assert encoded.is_answer.tolist() == labels[:2048]
        checked += 1
    assert checked > 50


def test_llava_moves_the_image_to_the_front_of_its_turn() -> None:
    assert images_first("What is <image> this?") == "<image>\nWhat is  this?"
    assert images_first("What is this?\n<image>") == "<image>\nWhat is this?"
    assert images_first("<image>") == "<image>"
    assert images_first(" no image ") == " no image "


def test_llava_supervises_the_end_token_of_every_turn_and_nothing_of_the_questions(llava: VLM) -> None:
    encoded = encode(make_encoder(llava), make_sample("<image>\nQ one?", "A red cup.", "Q two?", "No."))
    end = llava.tokenizer.eos_token_id
    assert (encoded.token_id == end).sum() == 2
    rest = llava.tokenizer.decode(encoded.input_ids[~encoded.is_answer])
    assert "cup" not in rest
    assert "Q two?" in rest


def test_the_align_template_is_image_caption_newline_and_drops_the_instruction(llava: VLM) -> None:
    encoder = make_encoder(llava, "llava-1.5-align")
    encoded = encode(encoder, make_sample("<image>\nDescribe it.", "A red cup."))
    tokenizer = llava.tokenizer
    caption = tokenizer("A red cup.\n", add_special_tokens=False)["input_ids"]
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert encoded.input_ids.tolist() == [tokenizer.bos_token_id, *[image] * N_PATCHES, *caption]
    assert encoded.is_answer.tolist() == [False] * (1 + N_PATCHES) + [True] * len(caption)


def test_pictures_are_padded_to_a_centred_square_in_clip_mean_colour() -> None:
    picture = Image.new("RGB", (7, 3), (1, 2, 3))
    square = np.asarray(pad_to_square(picture))
    expected = np.empty((7, 7, 3), dtype=np.uint8)
    expected[:] = (122, 116, 104)
    expected[2:5] = (1, 2, 3)
    assert np.array_equal(square, expected)


def test_llava_counts_as_many_image_tokens_as_the_model_makes_features(llava: VLM) -> None:
    encoder = make_encoder(llava)
    assert isinstance(encoder, FrozenEncoder)
    encoded = encode(encoder, make_sample("<image>\nWhat?", "No."))
    features = llava.model.get_image_features(encoded.model_inputs["pixel_values"]).pooler_output
    assert encoded.n_image_tokens == sum(len(feature) for feature in features)


# ---------------------------------------------------------------- choosing and refusing


def test_auto_takes_the_chat_template_that_supervises_the_end_and_else_the_family_profile(
    embedded: VLM, llava: VLM
) -> None:
    assert make_encoder(embedded).name == "chat"
    assert make_encoder(llava).name == "llava-1.5"


def test_auto_prefers_the_profile_to_a_chat_template_without_end_of_turn(blank_model: Path) -> None:
    vlm = load_vlm(str(blank_model))
    vlm.processor.chat_template = vlm.processor.chat_template.replace("{{ eos_token }}", " ")
    assert make_encoder(vlm).name == "llava-1.5"
    assert make_encoder(vlm, "chat").name == "chat"


def test_a_model_without_template_and_profile_is_refused_with_the_flag_that_helps(llava_next: VLM) -> None:
    llava_next.processor.chat_template = None
    try:
        with pytest.raises(ModelError, match="--template"):
            make_encoder(llava_next)
    finally:
        llava_next.processor.chat_template = CHATML


@pytest.mark.parametrize("images", [0, 1])
def test_a_tokenizer_that_adds_bos_does_not_double_the_templates(images: int, blank_model: Path) -> None:
    vlm = load_vlm(str(blank_model))
    bos = vlm.tokenizer.bos_token_id
    vlm.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    assert vlm.tokenizer("x")["input_ids"][0] == bos
    encoded = encode(make_encoder(vlm), make_sample("<image>\n" * images + "What?", "No.", images=images))
    assert (encoded.input_ids == bos).sum() == 1


def test_messages_keep_images_where_they_stand_in_the_text() -> None:
    turn = Turn(role="user", text="<image>\nfirst\n<image>\nsecond <image>")
    kinds = [part.get("text", "IMAGE") for part in chat_messages([turn])[0]["content"]]
    assert kinds == ["IMAGE", "first", "IMAGE", "second ", "IMAGE"]


@given(st.lists(st.integers(0, 5), max_size=20), st.data())
@settings(max_examples=200, deadline=None)
def test_expansion_gives_every_id_the_span_of_what_it_came_from(plain: list[int], data: st.DataObject) -> None:
    offsets = np.asarray([(k, k + 1) for k in range(len(plain))]).reshape(-1, 2)
    expanded, expected = [], []
    for k, token in enumerate(plain):
        run = [99] * data.draw(st.integers(1, 4)) if token == 0 else [token]
        expanded += run
        expected += [[k, k + 1]] * len(run)
    aligned = align_expansion(np.asarray(plain, dtype=int), offsets, np.asarray(expanded, dtype=int), {0})
    if plain.count(0) == 0 or all(a != 0 or b != 0 for a, b in itertools.pairwise(plain)):
        assert aligned.tolist() == expected
    assert len(aligned) == len(expanded)


def test_text_that_the_processor_changed_is_an_error() -> None:
    with pytest.raises(EncodingError, match="changed the text around an image"):
        align_expansion(np.array([1, 0, 2]), np.array([(0, 1), (1, 2), (2, 3)]), np.array([1, 9, 9, 3]), {0})


def test_the_real_mixture_encodes_with_the_embedded_template(embedded: VLM, shared_data: Path) -> None:
    encoder = make_encoder(embedded)
    for sample in real_conversations(shared_data)[:30]:
        encoded = encoder.encode(sample, [image.open() for image in sample.images])
        answers = "".join(f" {answer}</s>" for answer in sample.answers)
        if not encoded.truncated:
            assert embedded.tokenizer.decode(encoded.token_id) == answers
