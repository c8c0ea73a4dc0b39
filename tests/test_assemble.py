"""Assembled models: their parts are what they were, to the bit, and the whole is a model like any other."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    LlavaForConditionalGeneration,
)
from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

import golden
from naive import naive_nll, picture
from parts import LANGUAGES, NO_LANGUAGES, NO_TOWERS, PATCH, SIDE, TOWERS, save
from tiny_models import make_sample
from visgain.cli import main
from visgain.config import AssembleConfig, ScoreConfig, TrainConfig
from visgain.data import open_dataset
from visgain.errors import ModelError
from visgain.evaluation.generate import generate_answers
from visgain.scoring.run import run_score
from visgain.storage import read_scores
from visgain.training.assemble import RECORD, Assembled, run_assemble
from visgain.training.run import run_train
from visgain.types import Sample
from visgain.vlm.encode import Encoder
from visgain.vlm.load import EMBEDDED, VLM, load_vlm
from visgain.vlm.template import make_encoder
from zoo.base import byte_tokenizer

PAIRS = [
    *(("clip", language) for language in LANGUAGES),
    *((tower, "llama") for tower in TOWERS if tower != "clip"),
    ("siglip", "qwen2"),
    ("siglip2", "qwen3"),
]

TALKS = {
    "turns": ("<image>\nWhat is this?", "A red cup.", "Is there a dog?", "No, there is a cup.", "Sure?", "Yes"),
    "unicode": ("<image>\nWas ist das?", "Ünïcode 🙂 中文", "Mehr?", "🙂"),
    "two pictures": ("<image>\n<image>\nWhat are these?", "A red cup.", "And?", "A dog."),
    "second turn": ("Hello", "Hi.", "<image>\nWhat is this?", "A red cup."),
    "text alone": ("What is a dog?", "An animal."),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parts")


@cache
def part(folder: Path, name: str) -> Path:
    return save({**TOWERS, **NO_TOWERS, **LANGUAGES, **NO_LANGUAGES}[name], folder / name.replace(" ", "-"))


@cache
def assembled(folder: Path, tower: str, language: str, **options: Any) -> Path:
    out = folder / "-".join([tower, language, *(f"{name}-{value}" for name, value in options.items())])
    parts = {"vision": str(part(folder, tower)), "language": str(part(folder, language))}
    run_assemble(AssembleConfig(**parts, out=out, **options))
    return out


@pytest.fixture(params=PAIRS, ids="+".join)
def pair(request: pytest.FixtureRequest, folder: Path) -> tuple[str, str, VLM]:
    tower, language = request.param
    return tower, language, load_vlm(str(assembled(folder, tower, language)), device="cpu")


def equal(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert some.keys() == others.keys()
    for name, tensor in some.items():
        assert torch.equal(tensor, others[name]), name


def tower_of(folder: Path, name: str) -> Any:
    whole = AutoModel.from_pretrained(part(folder, name))
    return getattr(whole, "vision_model", whole).eval()


# ---------------------------------------------------------------- the parts


def test_the_weights_of_both_parts_are_those_of_their_checkpoints(pair: tuple[str, str, VLM], folder: Path) -> None:
    tower, language, vlm = pair
    source = tower_of(folder, tower).state_dict()
    state = {name: tensor for name, tensor in source.items() if not name.startswith("head.")}
    if tower == "siglip2":
        place = "embeddings.patch_embedding.weight"
        state[place] = state[place].reshape(-1, PATCH, PATCH, 3).permute(0, 3, 1, 2)
    ours = vlm.model.model.vision_tower.state_dict()
    equal({name: tensor for name, tensor in ours.items() if not name.startswith("head.")}, state)  # 5.17 keeps one

    causal = AutoModelForCausalLM.from_pretrained(part(folder, language))
    rows = causal.get_input_embeddings().weight.shape[0]
    body, head = vlm.model.model.language_model.state_dict(), vlm.model.lm_head.weight
    assert torch.equal(head[:rows], causal.get_output_embeddings().weight)
    embeddings = vlm.model.get_input_embeddings().weight
    place = next(name for name, tensor in body.items() if tensor.data_ptr() == embeddings.data_ptr())
    body[place] = body[place][:rows]
    equal(body, causal.base_model.state_dict())


def test_the_projector_sees_what_the_tower_alone_gives(pair: tuple[str, str, VLM], folder: Path) -> None:
    tower, _, vlm = pair
    pixels = vlm.processor.image_processor([picture(0)], return_tensors="pt")["pixel_values"]
    seen: list[torch.Tensor] = []
    vlm.model.model.multi_modal_projector.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        vlm.model.get_image_features(pixels)
        alone = tower_of(folder, tower)
        inputs = {"pixel_values": pixels}
        if tower == "siglip2":
            patches = torch.from_numpy(convert_image_to_patches(pixels[0].numpy(), PATCH))[None]
            mask = torch.ones(1, patches.shape[1], dtype=torch.int64)
            inputs = {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor([[3, 3]])}
        expected = alone(**inputs, output_hidden_states=True).hidden_states[-2]
    expected = expected[:, 1:] if tower.startswith(("clip", "dinov2")) else expected
    assert torch.allclose(seen[0], expected, rtol=0, atol=1e-5 if tower == "siglip2" else 1e-6)
    assert seen[0].shape[1] == (SIDE // PATCH) ** 2


def test_text_has_the_logits_of_the_language_model(pair: tuple[str, str, VLM], folder: Path) -> None:
    _, language, vlm = pair
    causal = AutoModelForCausalLM.from_pretrained(part(folder, language)).eval()
    rows = causal.get_input_embeddings().weight.shape[0]
    ids = torch.randint(1, rows, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = vlm.model(input_ids=ids).logits, causal(input_ids=ids).logits
    assert torch.allclose(found[..., :rows], expected, rtol=1e-4, atol=1e-4)


def test_rows_for_new_tokens_are_the_mean_of_the_others(folder: Path) -> None:
    vlm = load_vlm(str(assembled(folder, "clip", "llama")), device="cpu")
    rows = len(AutoTokenizer.from_pretrained(part(folder, "llama")))
    assert vlm.image_token_id == rows
    for weight in (vlm.model.get_input_embeddings().weight, vlm.model.lm_head.weight):
        assert weight.shape[0] == rows + 1
        assert torch.allclose(weight[rows], weight[:rows].mean(dim=0), atol=1e-6)


def test_a_model_with_room_for_more_tokens_keeps_its_size_and_its_tie(folder: Path) -> None:
    vlm = load_vlm(str(assembled(folder, "siglip", "qwen2")), device="cpu")
    causal = AutoModelForCausalLM.from_pretrained(part(folder, "qwen2"))
    assert vlm.model.lm_head.weight.shape == causal.lm_head.weight.shape
    assert vlm.model.lm_head.weight is vlm.model.get_input_embeddings().weight


def test_the_projector_depends_on_the_seed_alone(folder: Path) -> None:
    states = [
        load_vlm(str(assembled(folder, *parts, seed=seed)), device="cpu").model.model.multi_modal_projector.state_dict()
        for parts, seed in ((("clip", "llama"), 1), (("clip tower", "llama"), 1), (("clip", "llama"), 2))
    ]
    equal(states[0], states[1])
    assert not torch.equal(states[0]["linear_1.weight"], states[2]["linear_1.weight"])
    bound = states[0]["linear_1.weight"].shape[1] ** -0.5
    assert 0.9 * bound < states[0]["linear_1.weight"].abs().max() <= bound


def test_the_embedded_model_gives_both_parts(folder: Path) -> None:
    out = folder / "of-embedded"
    run_assemble(AssembleConfig(vision="embedded", language="embedded", out=out, vision_feature_layer=-1))
    old, new = load_vlm("embedded", device="cpu"), load_vlm(str(out), device="cpu")
    equal(old.model.model.vision_tower.state_dict(), new.model.model.vision_tower.state_dict())
    equal(old.model.model.language_model.state_dict(), new.model.model.language_model.state_dict())
    assert torch.equal(old.model.lm_head.weight, new.model.lm_head.weight)
    assert new.processor.chat_template == old.processor.chat_template
    assert new.image_token_id == old.image_token_id


# ---------------------------------------------------------------- options


def features(vlm: VLM, image: Image.Image) -> torch.Tensor:
    pixels = vlm.processor.image_processor([image], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return torch.cat(list(vlm.model.get_image_features(pixels).pooler_output))


def test_the_class_token_can_be_kept(folder: Path) -> None:
    vlm = load_vlm(str(assembled(folder, "clip", "llama", vision_feature_select="full")), device="cpu")
    encoded = make_encoder(vlm).encode(make_sample(*TALKS["turns"]), [picture(0)])
    assert encoded.n_image_tokens == len(features(vlm, picture(0))) == 10
    assert np.isfinite(naive_nll(vlm, encoded)).all()


@pytest.mark.parametrize("layer", [1, 3, -1, -4])
def test_any_layer_can_be_looked_at(layer: int, folder: Path) -> None:
    vlm = load_vlm(str(assembled(folder, "clip", "llama", vision_feature_layer=layer)), device="cpu")
    pixels = vlm.processor.image_processor([picture(0)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        state = tower_of(folder, "clip")(pixels, output_hidden_states=True).hidden_states[layer][:, 1:]
        expected = vlm.model.model.multi_modal_projector(state)[0]
    assert torch.allclose(features(vlm, picture(0)), expected, atol=1e-5)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_a_larger_picture_gets_the_positions_that_the_tower_itself_would_stretch(tower: str, folder: Path) -> None:
    vlm = load_vlm(str(assembled(folder, tower, "llama", image_size=40)), device="cpu")
    pixels = vlm.processor.image_processor([picture(0)], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 40, 40)
    with torch.no_grad():
        alone = tower_of(folder, tower)(pixels, interpolate_pos_encoding=True, output_hidden_states=True)
        found = vlm.model.model.vision_tower(pixels, output_hidden_states=True)
    assert torch.allclose(found.hidden_states[-1], alone.hidden_states[-1], atol=1e-5)
    assert make_encoder(vlm).encode(make_sample(*TALKS["turns"]), [picture(0)]).n_image_tokens == 25


def test_a_siglip2_of_another_size_stretches_as_it_does_itself(folder: Path) -> None:
    vlm = load_vlm(str(assembled(folder, "siglip2", "llama", image_size=40)), device="cpu")
    pixels = vlm.processor.image_processor([picture(0)], return_tensors="pt")["pixel_values"]
    patches = torch.from_numpy(convert_image_to_patches(pixels[0].numpy(), PATCH))[None]
    with torch.no_grad():
        alone = tower_of(folder, "siglip2")(
            pixel_values=patches,
            pixel_attention_mask=torch.ones(1, 25, dtype=torch.int64),
            spatial_shapes=torch.tensor([[5, 5]]),
            output_hidden_states=True,
        )
        found = vlm.model.model.vision_tower(pixels, output_hidden_states=True)
    assert torch.allclose(found.hidden_states[-1], alone.hidden_states[-1], atol=1e-5)


WIDE = Image.fromarray(np.full((20, 60, 3), 255, dtype=np.uint8))


@pytest.mark.parametrize(("pictures", "white"), [("pad", 1 / 3), ("crop", 1.0), ("squash", 1.0)])
def test_pictures_become_squares_as_the_option_says(pictures: str, white: float, folder: Path) -> None:
    vlm = load_vlm(str(assembled(folder, "siglip", "llama", pictures=pictures)), device="cpu")
    [pixels] = vlm.processor.image_processor([WIDE], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (3, SIDE, SIDE)
    assert list(vlm.processor.image_processor.image_mean) == [0.5, 0.5, 0.5], "the tower's colours, not CLIP's"
    assert float((pixels == 1).float().mean()) == pytest.approx(white, abs=0.1)


@pytest.mark.parametrize("pictures", ["pad", "crop", "squash"])
@pytest.mark.parametrize("tower", ["clip", "siglip", "siglip2"])
@pytest.mark.parametrize("language", ["llama", "qwen2"])
def test_training_sees_pictures_as_the_saved_processor_shows_them(
    language: str, tower: str, pictures: str, folder: Path
) -> None:
    vlm = load_vlm(str(assembled(folder, tower, language, pictures=pictures)), device="cpu")
    for size in ((60, 20), (20, 60), (31, 31)):
        encoded = make_encoder(vlm).encode(make_sample(*TALKS["turns"]), [picture(3, size)])
        own = vlm.processor.image_processor([picture(3, size)], return_tensors="pt")["pixel_values"]
        assert torch.allclose(encoded.model_inputs["pixel_values"], own, atol=1e-6)


def test_padding_is_that_of_the_published_recipe(folder: Path) -> None:
    vlm = load_vlm(str(assembled(folder, "clip", "llama")), device="cpu")
    image = picture(3, (60, 20))
    own = vlm.processor.image_processor([image], return_tensors="pt")["pixel_values"]
    recipe = make_encoder(vlm, "llava-1.5").encode(make_sample(*TALKS["turns"]), [image]).model_inputs["pixel_values"]
    assert torch.allclose(own, recipe, atol=1e-6)


@pytest.mark.parametrize(("dtype", "expected"), [("auto", "float32"), ("bfloat16", "bfloat16")])
def test_weights_are_saved_in_the_precision_that_was_asked_for(dtype: str, expected: str, folder: Path) -> None:
    out = assembled(folder, "siglip", "llama", dtype=dtype)
    model = LlavaForConditionalGeneration.from_pretrained(out, dtype="auto")
    assert {str(p.dtype) for p in model.parameters()} == {f"torch.{expected}"}
    assert json.loads((out / RECORD).read_text())["dtype"] == expected


def test_auto_takes_a_precision_that_holds_both_parts(folder: Path) -> None:
    half = folder / "half-llama"
    AutoModelForCausalLM.from_pretrained(part(folder, "llama"), dtype=torch.bfloat16).save_pretrained(half)
    AutoTokenizer.from_pretrained(part(folder, "llama")).save_pretrained(half)
    done = run_assemble(AssembleConfig(vision=str(part(folder, "clip")), language=str(half), out=folder / "mixed"))
    assert isinstance(done, Assembled)
    assert done.dtype == "float32"


def test_the_record_says_what_it_was_made_of(folder: Path) -> None:
    record = json.loads((assembled(folder, "clip", "llama") / RECORD).read_text())
    assert record["vision"] == str(part(folder, "clip").resolve())
    assert record["language_fingerprint"]
    assert record["image_tokens"] == 9
    assert record["parameters"]["projector"] == 24 * 32 + 32 + 32 * 32 + 32


# ---------------------------------------------------------------- texts


def sample(talk: str) -> Sample:
    return make_sample(*TALKS[talk], images=sum(text.count("<image>") for text in TALKS[talk]))


def encode(encoder: Encoder, talk: str) -> Any:
    one = sample(talk)
    return encoder.encode(one, [picture(number) for number in range(len(one.images))])


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("template", ["auto", "chat"])
def test_supervised_tokens_are_the_answers_with_their_ends(
    pair: tuple[str, str, VLM], template: str, talk: str
) -> None:
    _, language, vlm = pair
    encoded = encode(make_encoder(vlm, template), talk)
    end = "<|im_end|>\n" if language.startswith("qwen") else vlm.tokenizer.eos_token
    for number, answer in enumerate(sample(talk).answers):
        decoded = vlm.tokenizer.decode(encoded.token_id[encoded.turn == number])
        assert decoded in (answer + end, f" {answer}{end}")
    assert encoded.n_image_tokens == 9 * len(sample(talk).images)
    assert encoded.n_image_tokens == (encoded.input_ids == vlm.image_token_id).sum()


@pytest.mark.parametrize("talk", TALKS)
def test_a_language_model_without_a_template_writes_as_llava_does(talk: str, folder: Path) -> None:
    vlm = load_vlm(str(assembled(folder, "clip", "llama")), device="cpu")
    encoder = make_encoder(vlm)
    assert encoder.name == "llava-1.5"
    encoded = encode(encoder, talk)
    tokenize = partial(vlm.tokenizer.encode, add_special_tokens=False)
    said = [(turn.role, turn.text) for turn in sample(talk).turns]
    ids, labels = golden.v1(tokenize, [vlm.tokenizer.bos_token_id], said)
    ids, labels = golden.cut_twice(ids, labels, 2048, [vlm.image_token_id] * 9)
    assert encoded.input_ids.tolist() == ids
    assert encoded.is_answer.tolist() == labels


@pytest.mark.parametrize("pictures", ["crop", "squash"])
def test_where_pictures_are_not_padded_the_chat_template_writes_as_llava_does(pictures: str, folder: Path) -> None:
    vlm = load_vlm(str(assembled(folder, "clip", "llama", pictures=pictures)), device="cpu")
    auto, exact = make_encoder(vlm), make_encoder(vlm, "llava-1.5")
    assert (auto.name, auto.max_length) == ("chat", exact.max_length)
    for talk in TALKS:
        assert encode(auto, talk).input_ids.tolist() == encode(exact, talk).input_ids.tolist()
        assert encode(auto, talk).is_answer.tolist() == encode(exact, talk).is_answer.tolist()


@pytest.mark.parametrize("talk", TALKS)
def test_the_chat_template_for_other_tools_says_the_same(talk: str, folder: Path) -> None:
    vlm = load_vlm(str(assembled(folder, "clip", "llama")), device="cpu")
    exact, chat = (encode(make_encoder(vlm, template), talk) for template in ("llava-1.5", "chat"))
    assert chat.input_ids.tolist() == exact.input_ids.tolist()
    assert chat.is_answer.tolist() == exact.is_answer.tolist()


def test_other_tools_can_write_pictures_with_a_language_models_own_template(folder: Path) -> None:
    vlm = load_vlm(str(assembled(folder, "siglip", "qwen2")), device="cpu")
    parts = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A cup."}]
    text = vlm.processor.apply_chat_template(messages)
    assert text == ("<|im_start|>user\n<image>\nWhat is this?<|im_end|>\n<|im_start|>assistant\nA cup.<|im_end|>\n")


def test_llavas_template_can_be_asked_for(folder: Path) -> None:
    vlm = load_vlm(str(assembled(folder, "clip", "qwen2", template="llava-1.5")), device="cpu")
    assert make_encoder(vlm).name == "llava-1.5"
    text = vlm.tokenizer.decode(encode(make_encoder(vlm), "text alone").token_id)
    assert text == " An animal.<|im_end|>"


# ---------------------------------------------------------------- a model like any other


def test_the_assembled_model_is_scored(pair: tuple[str, str, VLM], small_world: Path, tmp_path: Path) -> None:
    tower, language, vlm = pair
    config = ScoreConfig(
        model=vlm.name, data=small_world / "data.json", out=tmp_path / "scores", limit=8, device="cpu", workers=0
    )
    done = run_score(config)
    assert (done.rows, done.skipped) == (8, 0)
    rows = {row["row"]: row for row in read_scores(tmp_path / "scores").to_pylist()}
    data, encoder = open_dataset(small_world / "data.json"), make_encoder(vlm)
    for number in range(3):
        one = data[number]
        assert isinstance(one, Sample)
        if one.images:
            encoded = encoder.encode(one, [image.open() for image in one.images])
            assert np.allclose(rows[number]["nll_seen"], naive_nll(vlm, encoded), atol=1e-4), (tower, language)


def mean_nll(model: Path, small_world: Path) -> float:
    vlm = load_vlm(str(model), device="cpu")
    data, encoder = open_dataset(small_world / "data.json"), make_encoder(vlm)
    samples = [one for one in (data[row] for row in range(8)) if isinstance(one, Sample)]
    found = [naive_nll(vlm, encoder.encode(one, [image.open() for image in one.images])) for one in samples]
    return float(np.concatenate(found).mean())


@pytest.mark.parametrize(("tower", "language"), [("clip", "llama"), ("siglip", "qwen2"), ("siglip2", "opt")])
def test_a_few_steps_lower_its_loss(tower: str, language: str, folder: Path, small_world: Path, tmp_path: Path) -> None:
    base = assembled(folder, tower, language)
    config = TrainConfig(
        model=str(base),
        data=small_world / "data.json",
        out=tmp_path / "trained",
        recipe="tune",
        learning_rate=3e-3,
        batch_size=8,
        micro_batch=8,
        max_steps=8,
        device="cpu",
    )
    assert run_train(config).steps == 8
    assert mean_nll(tmp_path / "trained", small_world) < 0.9 * mean_nll(base, small_world)
    before, after = (load_vlm(str(path), device="cpu").model.model for path in (base, tmp_path / "trained"))
    equal(before.vision_tower.state_dict(), after.vision_tower.state_dict())
    assert not torch.equal(before.multi_modal_projector.linear_1.weight, after.multi_modal_projector.linear_1.weight)


def test_a_base_model_learns_to_stop_at_the_end_of_its_templates_turn(folder: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    run_assemble(AssembleConfig(vision=str(part(folder, "siglip")), language=str(of_a_base(folder)), out=base))
    data = tmp_path / "data.json"
    said = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A cup."}]
    data.write_text(json.dumps([{"image": f"{n}.png", "conversations": said} for n in range(8)]))
    for number in range(8):
        picture(number).save(tmp_path / f"{number}.png")
    run_train(
        TrainConfig(
            model=str(base),
            data=data,
            out=tmp_path / "trained",
            recipe="tune",
            learning_rate=1e-2,
            batch_size=8,
            micro_batch=8,
            max_steps=60,
            device="cpu",
        )
    )
    vlm = load_vlm(str(tmp_path / "trained"), device="cpu")
    encoder, first = make_encoder(vlm), open_dataset(data)[0]
    assert isinstance(first, Sample)
    assert generate_answers(vlm, encoder, [first], max_new_tokens=30) == ["A cup."]
    # Other tools go by the model's settings.
    assert vlm.tokenizer.convert_ids_to_tokens(vlm.model.generation_config.eos_token_id) == [
        "<|endoftext|>",
        "<|im_end|>",
    ]
    prompt = encoder.prompt(first.turns[:1], [image.open() for image in first.images])
    ids = torch.from_numpy(prompt.input_ids)[None]
    found = vlm.model.generate(input_ids=ids, **prompt.model_inputs, max_new_tokens=30, do_sample=False)
    assert vlm.tokenizer.decode(found[0, ids.shape[1] :]) == "A cup.<|im_end|>"


def test_a_model_whose_settings_know_the_end_of_the_turn_keeps_them(folder: Path) -> None:
    vlm = load_vlm(str(assembled(folder, "siglip", "qwen2")), device="cpu")
    assert vlm.model.generation_config.eos_token_id == vlm.tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_the_command_says_what_it_built(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = ["--vision", str(part(folder, "clip")), "--language", str(part(folder, "llama"))]
    main(["assemble", *parts, "--out", str(tmp_path / "base")])
    sizes, template, model = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"vision [\d,]+, projector 1,856, language [\d,]+ parameters in float32; 9 tokens for a picture of 24 pixels",
        sizes,
    )
    assert (template, model) == ("chat template: llava-1.5", f"model: {tmp_path / 'base'}")


# ---------------------------------------------------------------- what cannot be joined


def no_tokenizer(folder: Path) -> Path:
    out = folder / "no-tokenizer"
    AutoModelForCausalLM.from_pretrained(part(folder, "llama")).save_pretrained(out)
    return out


def no_end(folder: Path) -> Path:
    out = folder / "no-end"
    AutoModelForCausalLM.from_pretrained(part(folder, "phi3")).save_pretrained(out)
    byte_tokenizer(["<|endoftext|>"]).save_pretrained(out)
    return out


def no_pictures(folder: Path) -> Path:
    out = folder / "no-image-processor"
    tower_of(folder, "clip tower").save_pretrained(out)
    return out


def of_a_base(folder: Path) -> Path:
    """As Qwen2.5's base models: a chat template whose end of turn is not the end of text, which alone is known."""
    out = folder / "base"
    model = AutoModelForCausalLM.from_pretrained(part(folder, "qwen2"))
    tokenizer = AutoTokenizer.from_pretrained(part(folder, "qwen2"), eos_token="<|endoftext|>")
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def looks_ahead(folder: Path) -> Path:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokenizer = byte_tokenizer(["<s>"], eos_token="<s>", bos_token="<s>")
    return save(lambda: (BertLMHeadModel(BertConfig(**sizes, vocab_size=len(tokenizer))), tokenizer), folder / "bert")


def truncated(folder: Path) -> Path:
    out = folder / "truncated"
    model = AutoModelForCausalLM.from_pretrained(part(folder, "llama"))
    model.save_pretrained(out, state_dict={n: t for n, t in model.state_dict().items() if "layers.1" not in n})
    AutoTokenizer.from_pretrained(part(folder, "llama")).save_pretrained(out)
    return out


def silent(folder: Path, name: str = "silent", end: str = "") -> Path:
    out = folder / name
    AutoModelForCausalLM.from_pretrained(part(folder, "phi3")).save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(part(folder, "phi3"))
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '" + end + "' }}{% endfor %}"
    tokenizer.save_pretrained(out)
    return out


def ends_in_plain_text(folder: Path) -> Path:
    return silent(folder, "plain-end", r"\n###\n")


Where = Callable[[Path], Path]


def at(name: str) -> Where:
    return partial(part, name=name)


@pytest.mark.parametrize(
    ("vision", "language", "says"),
    [
        (lambda _: Path("/no/such"), at("llama"), "neither a model folder nor a hub name"),
        (at("llama"), at("llama"), "is no vision tower: its configuration has no one image_size"),
        (at("dinov2 with registers"), at("llama"), "gives 14 vectors for 9 patches"),
        (no_pictures, at("llama"), "cannot load the image processor of"),
        (at("clip"), at("siglip"), "is a siglip model, which is no causal language model"),
        (at("clip"), at("clip tower"), "which is no causal language model"),
        (at("clip"), at("phi"), "PhiForCausalLM makes more of its logits than a matrix"),
        (at("clip"), at("gemma2"), "Gemma2ForCausalLM makes more of its logits than a matrix"),
        (at("clip"), at("opt of two widths"), "another width than its layers"),
        (at("clip"), looks_ahead, "BertLMHeadModel"),
        (at("clip"), no_tokenizer, "cannot load the tokenizer of"),
        (at("clip"), no_end, "has no end-of-sequence token"),
        (at("clip"), truncated, "has no weights for"),
        (at("clip"), silent, "writes no special token after an answer.*use --template llava-1.5"),
        (at("clip"), ends_in_plain_text, "writes no special token after an answer"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or getattr(value, "keywords", {}).get("name"),
)
def test_what_cannot_be_joined_is_one_clear_message(
    vision: Where, language: Where, says: str, folder: Path, tmp_path: Path
) -> None:
    config = AssembleConfig(vision=str(vision(folder)), language=str(language(folder)), out=tmp_path / "out")
    with pytest.raises(ModelError, match=says) as error:
        run_assemble(config)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("tower", "options", "says"),
    [
        ("siglip", {"vision_feature_select": "default"}, "has no class token"),
        ("clip", {"vision_feature_layer": -5}, "has 4 hidden states"),
        ("clip", {"vision_feature_layer": 4}, "has 4 hidden states"),
        (
            "clip",
            {"vision_feature_layer": 0},
            "is 0, which transformers' LLaVA takes for no layer at all; -4 is the same",
        ),
        ("clip", {"image_size": 7}, "--image-size is 7; a patch of .*clip alone has 8 pixels"),
        ("siglip2", {"image_size": 7}, "--image-size is 7"),
        ("dinov2", {"image_size": 40}, "cannot be given another size of pictures; leave --image-size 40 out"),
    ],
)
def test_options_that_do_not_fit_the_tower_are_told(
    tower: str, options: dict[str, Any], says: str, folder: Path, tmp_path: Path
) -> None:
    config = AssembleConfig(vision=str(part(folder, tower)), language=str(part(folder, "llama")), out=tmp_path / "out")
    with pytest.raises(ModelError, match=says):
        run_assemble(replace(config, **options))


def test_a_folder_that_is_there_is_not_touched(folder: Path, tmp_path: Path) -> None:
    config = AssembleConfig(vision=str(EMBEDDED), language=str(EMBEDDED), out=tmp_path)
    with pytest.raises(ModelError, match="is there already"):
        run_assemble(config)
    assert list(tmp_path.iterdir()) == []
