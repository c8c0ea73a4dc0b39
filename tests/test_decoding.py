"""Decoding methods: their formulas against numbers made elsewhere, and the cached, batched loop against a plain one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from tests.tiny_models import llava_next

from visgain.counterfactuals import diffusion_signal, parse_counterfactual
from visgain.errors import ConfigError, ModelError, UnknownName
from visgain.evaluation import contrast
from visgain.evaluation.attend import boosted, redistributed
from visgain.evaluation.decoders import parse_decoder
from visgain.evaluation.decoding import noised
from visgain.evaluation.generate import Ask, Greedy, Prompt, batch_seed, generated
from visgain.types import IMAGE_MARK, Turn
from visgain.vlm.load import VLM, load_vlm
from visgain.vlm.template import make_encoder
from zoo import ZOO

CASES = Path(__file__).parents[2] / "shared" / "fixtures" / "decoding" / "cases.json"
needs_cases = pytest.mark.skipif(
    not CASES.exists(), reason="the recorded cases (../shared/fixtures/decoding) are absent"
)
INF = float("inf")


# ---------------------------------------------------------------- formulas


def rows(values: list[float | None]) -> torch.Tensor:
    return torch.tensor([[-INF if value is None else value for value in values]], dtype=torch.float64)


@needs_cases
def test_formulas_give_the_recorded_numbers() -> None:
    cases = json.loads(CASES.read_text())
    seen, other = rows(cases["cond_logits"]), rows(cases["other_logits"])
    for case in cases["vcd"]:
        torch.testing.assert_close(contrast.vcd(seen, other, case["alpha"], case["beta"]), rows(case["out"]))
    for case in cases["pai_cfg"]:
        torch.testing.assert_close(contrast.pai(seen, other, case["gamma"]), rows(case["out"]), atol=1e-8, rtol=0)
    for case in cases["m3id"]:
        found = contrast.m3id(seen, other, case["alpha"], case["lambda"], case["t"])
        torch.testing.assert_close(found, rows(case["out"]), atol=1e-8, rtol=0)
    for case in cases["lacing_cfg"]:
        torch.testing.assert_close(contrast.guidance(seen, other, case["scale"]), rows(case["out"]))


@needs_cases
def test_attention_and_noise_give_the_recorded_numbers() -> None:
    cases = json.loads(CASES.read_text())
    case = cases["pai_attention"]
    scores = torch.tensor(case["scores"], dtype=torch.float64)
    is_image = torch.zeros(1, scores.shape[-1], dtype=torch.bool)
    is_image[:, slice(*case["image_slice"])] = True
    last = boosted(scores[:, :, -1:], is_image, case["alpha"])[:, :, 0]
    torch.testing.assert_close(last, torch.tensor(case["modified_last_query_scores"], dtype=torch.float64))
    for step, (signal, noise) in cases["vcd_noise_sqrt_alpha_bar"].items():
        kept = diffusion_signal(int(step))
        assert (math.sqrt(kept), math.sqrt(1 - kept)) == pytest.approx((signal, noise), abs=1e-5)


@given(st.integers(0, 2**32 - 1), st.floats(0.1, 3), st.floats(0.01, 1))
@settings(max_examples=30, deadline=None)
def test_vcd_token_by_token(seed: int, alpha: float, beta: float) -> None:
    rng = np.random.default_rng(seed)
    seen, other = rng.normal(0, 3, (2, 9)), rng.normal(0, 3, (2, 9))
    found = contrast.vcd(torch.from_numpy(seen), torch.from_numpy(other), alpha, beta).numpy()
    for row in range(2):
        for token in range(9):
            plausible = math.exp(seen[row, token]) >= beta * math.exp(max(seen[row])) * (1 - 1e-12)
            expected = (1 + alpha) * seen[row, token] - alpha * other[row, token] if plausible else -INF
            assert found[row, token] == pytest.approx(expected)


@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.floats(0.1, 0.9), st.floats(0, 0.5))
@settings(max_examples=30, deadline=None)
def test_redistribution_head_by_head(seed: int, p: float, rho: float, least: float) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.full(7, 0.5), size=(2, 3, 4))
    image, sink = rng.random((2, 7)) < 0.6, rng.random((2, 7)) < 0.3
    found = redistributed(*(torch.from_numpy(one) for one in (weights, image, sink)), p=p, rho=rho, least=least).numpy()
    for b, h, q in np.ndindex(2, 3, 4):
        row = weights[b, h, q]
        to_image = sum(row[k] for k in range(7) if image[b, k])
        to_sinks = sum(row[k] for k in range(7) if image[b, k] and sink[b, k])
        receivers = [k for k in range(7) if image[b, k] and not sink[b, k]]
        room = sum(row[k] for k in receivers)
        expected = row.copy()
        if to_image >= least and to_sinks <= rho * to_image and room > 0:
            freed = (1 - p) * sum(row[k] for k in range(7) if sink[b, k])
            for k in range(7):
                expected[k] = p * row[k] if sink[b, k] else row[k]
                if k in receivers:
                    expected[k] += freed * row[k] / room
        np.testing.assert_allclose(found[b, h, q], expected, atol=1e-12)
        assert found[b, h, q].sum() == pytest.approx(1)


# ---------------------------------------------------------------- the loop


class Painted:
    """A picture of coloured noise."""

    def __init__(self, seed: int, size: tuple[int, int] = (72, 72)) -> None:
        self.seed, self.size, self.key = seed, size, str(seed)

    def hint(self) -> None:
        return None

    def open(self) -> Image.Image:
        rng = np.random.default_rng(self.seed)
        return Image.fromarray(rng.integers(0, 255, (*self.size[::-1], 3), np.uint8))


def prompts_of(vlm: VLM, asks: list[Ask]) -> list[Prompt]:
    made = []
    for ask in asks:
        images = tuple(image.open() for image in ask.images)
        made.append(Prompt(ask=ask, images=images, encoded=make_encoder(vlm).prompt(ask.turns, images)))
    return made


def asks(n: int = 3) -> list[Ask]:
    texts = ["What is in the picture?", "Is there a cup?", "Describe what you see in the middle left of it."]
    return [Ask.plain(texts[i % 3], [Painted(i)]) for i in range(n)]


def logits(vlm: VLM, encoded, said: list[int]) -> torch.Tensor:
    """Of the next token after the prompt and what was said, without a cache."""
    ids = torch.cat([torch.from_numpy(encoded.input_ids), torch.tensor(said, dtype=torch.int64)])[None]
    own = {}
    for name, value in encoded.model_inputs.items():
        grows = name in ("token_type_ids", "mm_token_type_ids")
        own[name] = torch.cat([value, value.new_zeros(1, len(said))], dim=1) if grows else value
    with torch.inference_mode():
        return vlm.model(input_ids=ids, attention_mask=torch.ones_like(ids), **own).logits[0, -1:].float()


def plain(vlm: VLM, prompt: Prompt, second, combine: Callable[..., torch.Tensor], steps: int) -> list[int]:
    said: list[int] = []
    for t in range(1, steps + 1):
        mixed = combine(logits(vlm, prompt.encoded, said), logits(vlm, second, said), t)
        said.append(int(mixed.argmax()))
    return said


@pytest.fixture(scope="module", params=["embedded", "llava_next", "qwen2_vl"])
def vlm(request: pytest.FixtureRequest) -> VLM:
    if request.param == "embedded":
        made = load_vlm("embedded", device="cpu")
    elif request.param == "llava_next":
        made = llava_next()
    else:
        made = ZOO["qwen2_vl"].build()
    # No end of turn: an answer has as many tokens as are asked for.
    made.model.generation_config.eos_token_id = None
    return made


@pytest.fixture(autouse=True)
def no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visgain.evaluation.generate.end_ids", lambda vlm: None)


STEPS = 6


@pytest.mark.parametrize(
    ("spec", "second", "combine"),
    [
        (
            "vcd:alpha=1.5,beta=0.01,second=blur:sigma=0.3",
            "blur:sigma=0.3",
            lambda s, o, t: contrast.vcd(s, o, 1.5, 0.01),
        ),
        ("m3id:alpha=0.9,forgetting=0.3", "text", lambda s, o, t: contrast.m3id(s, o, 0.9, 0.3, t)),
        ("guidance:scale=2.5,second=mean", "mean", lambda s, o, t: contrast.guidance(s, o, 2.5)),
        ("pai:alpha=0,gamma=2", "text", lambda s, o, t: contrast.pai(s, o, 2.0)),
    ],
)
def test_cached_batches_choose_as_a_plain_loop(
    vlm: VLM, spec: str, second: str, combine: Callable[..., torch.Tensor]
) -> None:
    prompts = prompts_of(vlm, asks())
    with torch.inference_mode():
        found = parse_decoder(spec)(vlm, make_encoder(vlm), prompts, STEPS).tolist()
    greedy = generated(vlm, prompts, STEPS).tolist()
    for prompt, said in zip(prompts, found, strict=True):
        turns, images = prompt.ask.turns, list(prompt.images)
        if second == "text":
            turns, images = (Turn(role="user", text=turns[0].text.replace(f"{IMAGE_MARK}\n", "")),), []
        else:
            replacement = parse_counterfactual(second)
            images = [replacement(image, rng=np.random.default_rng(0), other=lambda: None) for image in images]
        assert said == plain(vlm, prompt, make_encoder(vlm).prompt(turns, images), combine, STEPS)
    assert found != greedy


def test_a_second_branch_that_sees_the_same_changes_nothing(vlm: VLM) -> None:
    prompts = prompts_of(vlm, asks())
    with torch.inference_mode():
        same = parse_decoder("vcd:second=none")(vlm, make_encoder(vlm), prompts, STEPS)
        assert torch.equal(same, Greedy()(vlm, make_encoder(vlm), prompts, STEPS))
        unmoved = parse_decoder("pai:alpha=0,gamma=1")(vlm, make_encoder(vlm), prompts, STEPS)
        assert torch.equal(unmoved, same)


def test_noise_is_on_the_pixels_alone_and_drawn_again_alike(vlm: VLM) -> None:
    [prompt] = prompts_of(vlm, asks(1))
    one, other = (noised(prompt.encoded, 500, torch.Generator().manual_seed(7)) for _ in range(2))
    pixels, before = one.model_inputs["pixel_values"], prompt.encoded.model_inputs["pixel_values"]
    assert torch.equal(pixels, other.model_inputs["pixel_values"])
    noise = (pixels - 0.86302 * before) / 0.50517
    assert float(noise.mean()) == pytest.approx(0, abs=0.1)
    assert float(noise.std()) == pytest.approx(1, abs=0.1)
    for name, value in prompt.encoded.model_inputs.items():
        if name != "pixel_values":
            assert one.model_inputs[name] is value


def test_what_is_drawn_depends_on_the_seed_and_the_prompts(vlm: VLM) -> None:
    prompts, encoder = prompts_of(vlm, asks()), make_encoder(vlm)

    def said(spec: str) -> list[list[int]]:
        with torch.inference_mode():
            return parse_decoder(spec)(vlm, encoder, prompts, STEPS).tolist()

    state = torch.get_rng_state()
    first = said("sample:temperature=3,seed=1")
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(5)
    assert said("sample:temperature=3,seed=1") == first
    assert said("sample:temperature=3,seed=2") != first
    assert said("vcd:temperature=3,seed=1,beta=0.001") == said("vcd:temperature=3,seed=1,beta=0.001")
    assert batch_seed(1, prompts) != batch_seed(1, prompts[::-1])


# ---------------------------------------------------------------- attention


def llama_eager(vlm: VLM, monkeypatch: pytest.MonkeyPatch, change: Callable[..., torch.Tensor]) -> None:
    """Plain attention in transformers' Llama, with `change(layer, scores [B, H, Q, K])` giving the weights."""
    from transformers.models.llama import modeling_llama

    def attend(module, query, key, value, attention_mask, scaling, dropout=0.0, **options):
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        scores = query @ key.transpose(2, 3) * scaling
        causal = torch.ones(scores.shape[-2:]).tril(scores.shape[-1] - scores.shape[-2]).bool()
        scores = scores.masked_fill(~causal, -INF)
        return (change(module.layer_idx, scores) @ value).transpose(1, 2).contiguous(), None

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", attend)
    monkeypatch.setattr(vlm.model.config.text_config, "_attn_implementation_internal", "eager")


def one_at_a_time(vlm: VLM, prompt: Prompt, steps: int) -> list[int]:
    said: list[int] = []
    for _ in range(steps):
        said.append(int(logits(vlm, prompt.encoded, said).argmax()))
    return said


@pytest.fixture(scope="module")
def embedded() -> VLM:
    made = load_vlm("embedded", device="cpu")
    made.model.generation_config.eos_token_id = None
    return made


def test_boosted_attention_is_that_of_a_plain_loop(embedded: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last token's scores over the picture are raised; without a cache, those of all generated tokens are."""
    prompts = prompts_of(embedded, asks())
    with torch.inference_mode():
        found = parse_decoder("pai:alpha=2,gamma=1,first=1,last=3")(embedded, make_encoder(embedded), prompts, STEPS)
    greedy = generated(embedded, prompts, STEPS)
    for prompt, said in zip(prompts, found.tolist(), strict=True):
        is_image = torch.from_numpy(prompt.encoded.input_ids == embedded.image_token_id)
        size = len(is_image)

        def change(layer: int, scores: torch.Tensor, is_image=is_image, size=size) -> torch.Tensor:
            if 1 <= layer < 3:
                scores = scores.clone()
                rows = scores[:, :, size - 1 :, :size]
                rows[..., is_image] += 2 * rows[..., is_image].abs()
            return scores.softmax(-1)

        with monkeypatch.context() as patched:
            llama_eager(embedded, patched, change)
            assert said == one_at_a_time(embedded, prompt, STEPS)
    assert not torch.equal(found, greedy)


def test_redistributed_attention_is_that_of_a_plain_loop(embedded: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = prompts_of(embedded, asks())
    options = "p=0,rho=1,least=0,tau=1,first=0,dims=3/40/77/101"
    with torch.inference_mode():
        found = parse_decoder(f"var:{options}")(embedded, make_encoder(embedded), prompts, STEPS)
    greedy = generated(embedded, prompts, STEPS)
    layers = embedded.model.get_decoder().layers
    states: dict[int, torch.Tensor] = {}
    for prompt, said in zip(prompts, found.tolist(), strict=True):
        is_image = np.asarray(prompt.encoded.input_ids == embedded.image_token_id)
        last = int(np.flatnonzero(is_image).max())

        def change(layer: int, scores: torch.Tensor, is_image=is_image, last=last) -> torch.Tensor:
            weights = scores.softmax(-1)
            if layer == len(layers) - 1:
                return weights
            h = states[layer][0]
            normal = h / h.pow(2).mean(-1, keepdim=True).sqrt()
            sink = (normal[:, [3, 40, 77, 101]].abs() > 1).any(-1).numpy()
            image = np.concatenate([is_image, np.zeros(len(h) - len(is_image), bool)])
            moved = redistributed(
                weights, torch.from_numpy(image)[None], torch.from_numpy(sink)[None], p=0, rho=1, least=0
            )
            return torch.cat([weights[:, :, : last + 1], moved[:, :, last + 1 :]], dim=2)

        hooks = [
            layer.register_forward_pre_hook(
                lambda module, args, kwargs, n=n: states.__setitem__(n, (args or [kwargs.get("hidden_states")])[0]),
                with_kwargs=True,
            )
            for n, layer in enumerate(layers)
        ]
        with monkeypatch.context() as patched:
            llama_eager(embedded, patched, change)
            assert said == one_at_a_time(embedded, prompt, STEPS)
        for hook in hooks:
            hook.remove()
    assert not torch.equal(found, greedy)


def test_the_model_is_as_before_after_an_edit(embedded: VLM) -> None:
    prompts = prompts_of(embedded, asks())
    before = generated(embedded, prompts, STEPS)
    with torch.inference_mode():
        parse_decoder("pai:alpha=2")(embedded, make_encoder(embedded), prompts, STEPS)
        parse_decoder("var:tau=1,dims=3")(embedded, make_encoder(embedded), prompts, STEPS)
    assert torch.equal(generated(embedded, prompts, STEPS), before)
    assert not any(module._forward_pre_hooks for module in embedded.model.modules())


def test_sink_dimensions_must_be_known(embedded: VLM) -> None:
    prompts = prompts_of(embedded, asks(1))
    with pytest.raises(ModelError, match="sink dimensions"):
        parse_decoder("var")(embedded, make_encoder(embedded), prompts, 1)
    with pytest.raises(ConfigError, match="no such"):
        parse_decoder("var:dims=100000")(embedded, make_encoder(embedded), prompts, 1)


# ---------------------------------------------------------------- soft images and names


def test_a_soft_image_stands_where_the_picture_was(embedded: VLM, tmp_path: Path) -> None:
    prompts, encoder = prompts_of(embedded, asks()), make_encoder(embedded)
    width = embedded.model.get_input_embeddings().weight.shape[1]
    torch.manual_seed(0)
    save_file({"soft": torch.randn(width)}, tmp_path / "soft.safetensors")
    with torch.inference_mode():
        found = parse_decoder(f"guidance:scale=3,second=soft:{tmp_path}/soft.safetensors")(
            embedded, encoder, prompts, 1
        )
        torch.manual_seed(0)
        soft = torch.randn(width)
        for prompt, said in zip(prompts, found.tolist(), strict=True):
            ids = torch.from_numpy(prompt.encoded.input_ids)[None]
            embeds = embedded.model.get_input_embeddings()(ids)
            embeds[ids == embedded.image_token_id] = soft
            other = embedded.model(inputs_embeds=embeds).logits[0, -1:]
            assert said == [int((other + 3 * (logits(embedded, prompt.encoded, []) - other)).argmax())]
    save_file({"soft": torch.randn(5, width)}, tmp_path / "odd.safetensors")
    with pytest.raises(ModelError, match="5 rows"):
        parse_decoder(f"guidance:second=soft:{tmp_path}/odd.safetensors")(embedded, encoder, prompts, 1)
    with pytest.raises(ModelError, match="cannot read the soft image"):
        parse_decoder("guidance:second=soft:nowhere")(embedded, encoder, prompts, 1)


@pytest.mark.parametrize("name", ["greedy", "sample", "vcd", "pai", "m3id", "guidance", "var"])
def test_a_spec_reads_back(name: str) -> None:
    decoder = parse_decoder(name)
    assert parse_decoder(decoder.spec) == decoder
    assert decoder.spec.startswith(name)


@pytest.mark.parametrize(
    ("spec", "seed"), [("sample", 5), ("vcd:alpha=2", 5), ("vcd:seed=0", 0), ("sample:temperature=2,seed=3", 3)]
)
def test_the_runs_seed_counts_where_the_spec_says_none(spec: str, seed: int) -> None:
    assert f"seed={seed}" in parse_decoder(spec, 5).spec
    assert parse_decoder("greedy", 5).spec == "greedy"


@pytest.mark.parametrize("spec", ["vcd:beta=0", "vcd:step=1000", "vcd:gamma=1", "m3id:alpha=0", "vcd:alpha=x"])
def test_a_wrong_option_is_told(spec: str) -> None:
    with pytest.raises(ConfigError, match=spec.partition(":")[0]):
        parse_decoder(spec)


def test_an_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(UnknownName, match="vcd"):
        parse_decoder("vdc")
