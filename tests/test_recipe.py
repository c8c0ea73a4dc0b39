"""Recipes: what was published, what the built optimiser has of it, and one clear message for a wrong one."""

from __future__ import annotations

import copy
import json
import math
import re
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from transformers import GPT2Config, GPT2LMHeadModel, LlavaForConditionalGeneration, get_scheduler

from parts import TOWERS, save
from tiny_llava import clip_llava, qwen2_like, siglip_llava, vicuna_like
from visgain.config import AssembleConfig, TrainConfig
from visgain.data import open_dataset
from visgain.errors import ConfigError, ModelError
from visgain.training.arguments import training_arguments
from visgain.training.assemble import run_assemble
from visgain.training.collate import Rows
from visgain.training.prepare import prepare_model
from visgain.training.recipe import RECIPES, Recipe, Schedule, load_recipe, recipe_names, resolve_recipe
from visgain.training.run import build_trainer, run_train
from visgain.training.trainer import SelectiveTrainer
from visgain.vlm.load import VLM, load_vlm
from visgain.vlm.template import make_encoder
from zoo.base import byte_tokenizer


def train_config(blank_model: Path, small_world: Path, out: Path, **options) -> TrainConfig:
    base = {"max_steps": 3, "batch_size": 8, "micro_batch": 4, "recipe": "embedded-tune"}
    return TrainConfig(model=str(blank_model), data=small_world / "data.json", out=out, **{**base, **options})


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_loads(name: str) -> None:
    assert load_recipe(name).learning_rate > 0


def test_general_recipes_are_the_published_ones_for_any_model() -> None:
    """Where they differ is what depends on the model or the machine."""
    free = {"template": "auto", "max_length": None, "dtype": "float32", "gradient_checkpointing": False, "workers": 0}
    for general, published in (("align", "7b-align"), ("tune", "7b-tune"), ("lora", "7b-lora")):
        ours, theirs = load_recipe(general), load_recipe(f"llava-1.5-{published}")
        assert ours == replace(theirs, **free, micro_batch=ours.micro_batch)


# ---------------------------------------------------------------- published values, read back from what was built


@dataclass(frozen=True, kw_only=True)
class Published:
    """One row of a paper's table, or of a script."""

    trained: str  # a regular expression on names of parameters, of adapters too
    rate: float
    batch: int
    template: str
    decay: float = 0.0
    length: int = 2048
    projector_rate: float | None = None
    language: str = "llama"


ALL_WORDS = r"model\.language_model\.|lm_head\."
BRIDGE = r"model\.multi_modal_projector\."
UPPER_EYE = r"model\.vision_tower\.(.+\.)?layers\.(1[2-9]|[2-9][0-9])\."
ADAPTERS = r"base_model\.model\.(model\.language_model\..+\.lora_[AB]\.|model\.multi_modal_projector\.)"

PUBLISHED = {
    "llava-1.5-7b-align": Published(trained=BRIDGE, rate=1e-3, batch=256, template="llava-1.5-align"),
    "llava-1.5-13b-align": Published(trained=BRIDGE, rate=1e-3, batch=256, template="llava-1.5-align"),
    "llava-1.5-7b-tune": Published(trained=f"{BRIDGE}|{ALL_WORDS}", rate=2e-5, batch=128, template="llava-1.5"),
    "llava-1.5-13b-tune": Published(trained=f"{BRIDGE}|{ALL_WORDS}", rate=2e-5, batch=128, template="llava-1.5"),
    "llava-1.5-7b-lora": Published(trained=ADAPTERS, rate=2e-4, projector_rate=2e-5, batch=128, template="llava-1.5"),
    "sharegpt4v-7b-align": Published(
        trained=f"{UPPER_EYE}|{BRIDGE}|{ALL_WORDS}", rate=2e-5, batch=256, template="sharegpt4v-align"
    ),
    "sharegpt4v-7b-tune": Published(trained=f"{BRIDGE}|{ALL_WORDS}", rate=2e-5, batch=128, template="sharegpt4v"),
    "open-qwen2vl-2b-align": Published(
        trained=f"{BRIDGE}|{ALL_WORDS}",
        rate=5e-5,
        batch=512,
        decay=0.01,
        length=4096,
        template="llava-1.5-align",
        language="qwen2",
    ),
    "open-qwen2vl-2b-tune": Published(
        trained=f"{BRIDGE}|{ALL_WORDS}",
        rate=2e-5,
        batch=128,
        decay=0.1,
        length=4096,
        template="open-qwen2vl",
        language="qwen2",
    ),
}
"""Method's tables once more, for tests alone."""

EYES = 14
"""Layers of the vision tower: more than twelve, so that it shows which are trained."""


def deep(language: str) -> VLM:
    """A LLaVA whose vision tower has as many layers as matter, with Llama, or as Open-Qwen2VL is built."""
    vlm = clip_llava(vicuna_like("legacy"), 28) if language == "llama" else siglip_llava(qwen2_like(None), 28)
    config = copy.deepcopy(vlm.model.config)
    config.vision_config.num_hidden_layers = EYES
    return replace(vlm, model=LlavaForConditionalGeneration(config))


def built(name: str, data: Path, out: Path) -> tuple[SelectiveTrainer, VLM, Recipe]:
    """What `visgain train --recipe NAME` builds, on 1,200 rows."""
    config = TrainConfig(model="tiny", data=data, out=out, recipe=name, device="cpu")
    recipe = resolve_recipe(config)
    vlm = deep(PUBLISHED[name].language)
    encoder = make_encoder(vlm, recipe.template, recipe.max_length)
    rows = Rows(open_dataset(data), encoder, [number % 60 for number in range(1200)])
    model = prepare_model(vlm, recipe)
    return build_trainer(model, vlm, rows, recipe, config), vlm, recipe


@pytest.fixture(params=PUBLISHED)
def published(
    request: pytest.FixtureRequest, small_world: Path, tmp_path: Path
) -> tuple[Published, SelectiveTrainer, VLM, Recipe]:
    return PUBLISHED[request.param], *built(request.param, small_world / "data.json", tmp_path)


def test_every_published_recipe_is_looked_at() -> None:
    general = {"align", "tune", "lora"}
    assert {name for name in recipe_names() if not name.startswith("embedded-")} == PUBLISHED.keys() | general


def test_exactly_the_published_parameters_are_trained_with_their_rates_and_decay(published: Any) -> None:
    table, trainer, _, _ = published
    optimizer = trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    trained = {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}
    assert len(trained) == sum(len(group["params"]) for group in optimizer.param_groups)
    assert set(trained) == {name for name in names.values() if re.match(table.trained, name)} != set()
    assert set(trained) == {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    shapes = {name: parameter.ndim for name, parameter in trainer.model.named_parameters()}
    for name, group in trained.items():
        bridge = "multi_modal_projector" in name
        assert group["lr"] == (table.projector_rate if bridge and table.projector_rate else table.rate), name
        assert group["weight_decay"] == (table.decay if shapes[name] > 1 else 0.0), name
        assert (group["betas"], group["eps"]) == ((0.9, 0.999), 1e-8)
    assert type(optimizer).__name__ == "AdamW"


def test_the_rate_rises_for_three_percent_of_the_steps_and_falls_as_a_cosine(published: Any) -> None:
    table, trainer, _, _ = published
    steps, warm = 1000, 30
    trainer.create_optimizer_and_scheduler(steps)
    peaks = [group["initial_lr"] for group in trainer.optimizer.param_groups]
    assert set(peaks) == {table.rate} | ({table.projector_rate} - {None})
    wanted = {0, 1, 15, 30, 31, 270, 515, 999, 1000}
    for step in range(steps + 1):
        if step in wanted:
            share = step / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))
            assert trainer.lr_scheduler.get_last_lr() == pytest.approx([peak * share for peak in peaks], abs=1e-12)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()


def test_batches_template_length_and_precision_are_the_published_ones(published: Any) -> None:
    table, trainer, vlm, recipe = published
    batches = list(trainer.get_train_dataloader().batch_sampler)
    assert {len(batch) for batch in batches[:-1]} == {table.batch}
    assert len(batches) == math.ceil(1200 / table.batch)
    assert trainer.args.num_train_epochs == 1
    assert trainer.args.max_steps == -1
    assert trainer.args.max_grad_norm == 1.0
    assert trainer.args.bf16
    encoder = make_encoder(vlm, recipe.template, recipe.max_length)
    assert (encoder.name, encoder.max_length) == (table.template, table.length)
    assert recipe.loss_reduction == "global", "and --loss-reduction micro-batch for what was published"


def test_the_table_of_the_docs_has_the_values_of_the_recipes() -> None:
    page = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("| `")]
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in lines]
    assert {row[0] for row in rows} == PUBLISHED.keys()
    for name, trained, *numbers in rows:
        recipe = load_recipe(name)
        assert all(part in trained for part in recipe.parts)
        assert (recipe.vision_from_layer is None) == ("from layer 12" not in trained)
        assert numbers[3:] == [recipe.template, str(recipe.max_length)]
        found = [float(number) for number in numbers[:3]]
        assert found == [recipe.learning_rate, recipe.batch_size, recipe.weight_decay]


def test_adapters_stand_on_every_matrix_of_the_language_model_but_the_head(small_world: Path, tmp_path: Path) -> None:
    trainer, vlm, _ = built("llava-1.5-7b-lora", small_world / "data.json", tmp_path)
    layers = vlm.model.config.text_config.num_hidden_layers
    adapted = {name for name, module in trainer.model.named_modules() if hasattr(module, "lora_A")}
    assert len(adapted) == 7 * layers
    assert all(".language_model.layers." in name for name in adapted)
    [config] = trainer.model.peft_config.values()
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (128, 256, 0.05, "none")


def test_gpt_2_whose_layers_are_transposed_takes_adapters_too(small_world: Path, tmp_path: Path) -> None:
    def gpt_2() -> tuple[Any, Any]:
        tokenizer = byte_tokenizer(["<|endoftext|>"], bos_token="<|endoftext|>", eos_token="<|endoftext|>")
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, **ends)
        return GPT2LMHeadModel(config), tokenizer

    vision, language = save(TOWERS["clip"], tmp_path / "vision"), save(gpt_2, tmp_path / "language")
    run_assemble(AssembleConfig(vision=str(vision), language=str(language), out=tmp_path / "base"))
    lora = {"recipe": "tune", "lora_rank": 2, "parts": ("language",), "learning_rate": 0.1, "device": "cpu"}
    run_train(train_config(tmp_path / "base", small_world, tmp_path / "out", max_steps=2, **lora))
    before, after = (load_vlm(str(tmp_path / name), device="cpu").model.state_dict() for name in ("base", "out"))
    changed = {name: tensor - before[name] for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    layers = {f"{layer}.weight" for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    assert {name.rpartition(".h.0.")[2] for name in changed if ".h.0." in name} == layers
    assert all(".h." in name and torch.linalg.matrix_rank(more, atol=1e-5) <= 2 for name, more in changed.items())


def test_a_language_part_without_linear_layers_takes_no_adapters() -> None:
    vlm = deep("llama")
    vlm.model.model.language_model.layers = torch.nn.ModuleList()
    with pytest.raises(
        ConfigError, match="--lora-rank 2: the language part of LlavaForConditionalGeneration has no linear layers"
    ):
        prepare_model(vlm, replace(load_recipe("tune"), lora_rank=2))


def test_a_step_from_layer_twelve_on_leaves_the_layers_below_as_they_were(small_world: Path, tmp_path: Path) -> None:
    vlm = deep("llama")
    vlm.model.save_pretrained(tmp_path / "base")
    vlm.processor.save_pretrained(tmp_path / "base")
    config = TrainConfig(
        model=str(tmp_path / "base"),
        data=captions(small_world, tmp_path),
        image_root=small_world,
        out=tmp_path / "out",
        recipe="sharegpt4v-7b-align",
        batch_size=4,
        max_steps=1,
        learning_rate=1e-2,
        dtype="float32",
        device="cpu",
    )
    # A first step of the warm-up would have a rate of zero.
    recipe = yaml.safe_load((RECIPES / "sharegpt4v-7b-align.yaml").read_text())
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**recipe, "warmup_ratio": 0.0, "workers": 0}))
    run_train(replace(config, recipe=str(tmp_path / "mine.yaml")))
    before, after = (load_vlm(str(tmp_path / name), device="cpu").model.state_dict() for name in ("base", "out"))
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    eyes = {int(found[1]) for name in changed if (found := re.search(r"vision_tower.*layers\.(\d+)\.", name))}
    # LLaVA looks at the last layer but one, so nothing reaches the last.
    assert eyes == {12}
    assert not any("vision_tower" in name and "layers." not in name for name in changed)
    assert any("multi_modal_projector" in name for name in changed)
    assert any("language_model.layers.0." in name for name in changed)


def captions(world: Path, out: Path) -> Path:
    """One-turn rows of the world: what the align templates take."""
    rows = [row for row in json.loads((world / "data.json").read_text()) if "image" in row]
    rows = [{**row, "conversations": row["conversations"][:2]} for row in rows][:8]
    (out / "captions.json").write_text(json.dumps(rows))
    return out / "captions.json"


# ---------------------------------------------------------------- what a recipe may say


LEAST: dict[str, Any] = {"parts": ["vision"], "learning_rate": 1, "batch_size": 2, "micro_batch": 1}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rat": 1}, "unknown key 'learning_rat'; did you mean 'learning_rate'"),
        ({"parts": ["eyes"]}, "parts is ['eyes']; it must be a list of vision, projector or language"),
        ({"parts": "projector"}, "parts is 'projector'; it must be a list of vision"),
        ({"batch_size": 3, "micro_batch": 2}, "batch_size is 3, which is not a multiple of micro_batch, 2"),
        ({"batch_size": "two"}, "batch_size is 'two'; it must be a whole number from 1 on"),
        ({"batch_size": 8.0}, "batch_size is 8.0; it must be a whole number from 1 on"),
        ({"micro_batch": 0}, "micro_batch is 0; it must be a whole number from 1 on"),
        ({"max_steps": 2.5}, "max_steps is 2.5; it must be a whole number from 1 on"),
        ({"max_length": 7}, "max_length is 7; it must be a whole number from 8 on"),
        ({"workers": -1}, "workers is -1; it must be a whole number from 0 on"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'; it must be a finite number from 0 on"),
        ({"learning_rate": math.inf}, "learning_rate is inf; it must be a finite number"),
        ({"learning_rate": math.nan}, "learning_rate is nan; it must be a finite number"),
        ({"learning_rates": 3}, "learning_rates is 3; it must be a mapping of names, each to a finite number"),
        ({"learning_rates": {"eyes": 3}}, "learning_rates has 'eyes'; its names are vision, projector or language"),
        ({"learning_rates": {"vision": "x"}}, "learning_rates is {'vision': 'x'}; it must be a mapping"),
        ({"epochs": 0}, "epochs is 0; it must be a finite number above 0"),
        ({"epochs": True}, "epochs is True; it must be a finite number above 0"),
        ({"warmup_ratio": 3}, "warmup_ratio is 3; it must be a finite number from 0 to below 1"),
        ({"adam_beta2": 1.5}, "adam_beta2 is 1.5; it must be a finite number from 0 to below 1"),
        ({"lora_rank": 4, "lora_dropout": 2}, "lora_dropout is 2; it must be a finite number from 0 to below 1"),
        ({"gradient_checkpointing": "no"}, "gradient_checkpointing is 'no'; it must be true or false"),
        ({"template": 5}, "template is 5; it must be a text"),
        ({"dtype": "float16"}, "dtype is 'float16'; it must be float32 or bfloat16"),
        ({"attention": "bogus"}, "attention is 'bogus'; it must be eager, sdpa"),
        ({"schedule": "cosin"}, "schedule is 'cosin'; it must be constant, constant_with_warmup, cosine"),
        ({"schedule": "reduce_lr_on_plateau"}, "schedule is 'reduce_lr_on_plateau'; it must be constant"),
        ({"schedule": "polynomial", "learning_rate": 1e-7}, "with schedule polynomial it must be above 1e-7"),
        ({"parts": ["language"], "vision_from_layer": 3}, "vision is not among"),
        ({"vision_from_layer": -1}, "vision_from_layer is -1; it must be a whole number from 0 on"),
        ({"parts": []}, "nothing to train"),
    ],
)
def test_a_wrong_value_is_one_message_with_the_file_the_key_and_what_it_takes(
    values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**LEAST, **values}))
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load_recipe(str(tmp_path / "mine.yaml"))
    assert str(caught.value).startswith(f"{tmp_path / 'mine.yaml'}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", [field.name for field in fields(Recipe)])
def test_a_key_without_a_value_is_empty_unless_leaving_it_out_means_something(key: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**LEAST, key: None}))
    if next(field.default for field in fields(Recipe) if field.name == key) is None:
        assert getattr(load_recipe(str(tmp_path / "mine.yaml")), key) is None
    else:
        with pytest.raises(ConfigError, match=f"mine.yaml: {key} is empty; it must be "):
            load_recipe(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"parts: [projector]", "missing learning_rate, batch_size, micro_batch"),
        (b"- a list", "mapping"),
        (b"a: [", "cannot read recipe"),
        (b"a: 2024-99-99", "cannot read recipe"),
        (b"\xff\xfe\x00\x81", "cannot read recipe"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe(str(tmp_path / "mine.yaml"))
    assert str(tmp_path / "mine.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_every_schedule_that_a_recipe_may_name_can_be_built(schedule: str, small_world: Path, tmp_path: Path) -> None:
    config = TrainConfig(model="tiny", data=small_world / "data.json", out=tmp_path, recipe="tune", device="cpu")
    arguments = training_arguments(replace(resolve_recipe(config), schedule=schedule), config)
    weight = torch.nn.Parameter(torch.zeros(1))
    rates = get_scheduler(
        arguments.lr_scheduler_type,
        optimizer=torch.optim.AdamW([weight], lr=1e-3),
        num_warmup_steps=arguments.get_warmup_steps(10),
        num_training_steps=10,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
    )
    assert all(0 <= rate <= 1e-3 for rate in rates.get_last_lr())


@pytest.mark.skipif(any(map(find_spec, ("flash_attn", "kernels"))), reason="there is one")
def test_an_attention_that_the_machine_lacks_is_one_message() -> None:
    with pytest.raises(ConfigError, match="attention is 'flash_attention_2', which cannot be used here") as caught:
        prepare_model(deep("llama"), replace(load_recipe("tune"), attention="flash_attention_2"))
    assert str(caught.value).endswith("; leave it out, or take eager or sdpa")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told_as_scoring_tells_it(
    blank_model: Path, small_world: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="--device cuda cannot be used here"):
        run_train(train_config(blank_model, small_world, tmp_path / "out", device="cuda"))
    assert not (tmp_path / "out").exists()


def test_a_learning_rate_written_without_a_point_is_a_number(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("parts: [vision]\nlearning_rate: 2e-5\nbatch_size: 2\nmicro_batch: 1")
    assert load_recipe(str(tmp_path / "mine.yaml")).learning_rate == 2e-5


def test_an_unknown_recipe_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'align'"):
        load_recipe("aling")


def test_layers_that_the_tower_does_not_have_are_one_clear_message() -> None:
    recipe = replace(load_recipe("sharegpt4v-7b-align"), vision_from_layer=EYES)
    with pytest.raises(ConfigError, match=f"vision_from_layer is {EYES}, and the vision part has {EYES} layers"):
        prepare_model(deep("llama"), recipe)


def test_flags_win_over_what_a_recipe_says_of_texts_and_precision() -> None:
    options = {"template": "chat", "max_length": 64, "dtype": "float32", "gradient_checkpointing": False}
    config = TrainConfig(model="m", data=Path("d"), out=Path("o"), recipe="llava-1.5-7b-tune", **options)
    recipe = resolve_recipe(config)
    assert {name: getattr(recipe, name) for name in options} == options
    published = load_recipe("llava-1.5-7b-tune")
    assert resolve_recipe(replace(config, **dict.fromkeys(options))) == published


def test_parts_without_the_vision_tower_leave_its_layers_out() -> None:
    config = TrainConfig(model="m", data=Path("d"), out=Path("o"), recipe="sharegpt4v-7b-align", parts=("projector",))
    assert resolve_recipe(config).vision_from_layer is None


def test_flags_win_over_the_recipe() -> None:
    config = TrainConfig(model="m", data=Path("d"), out=Path("o"), learning_rate=5.0, parts=("vision",), batch_size=4)
    recipe = resolve_recipe(config)
    assert (recipe.learning_rate, recipe.parts, recipe.batch_size, recipe.micro_batch) == (5.0, ("vision",), 4, 4)


@pytest.mark.parametrize(("recipe", "rank", "alpha"), [("lora", 8, 16), ("lora", None, 256), ("tune", 8, None)])
def test_a_rank_keeps_the_recipes_ratio_of_alpha_to_it(recipe: str, rank: int | None, alpha: float | None) -> None:
    config = TrainConfig(model="m", data=Path("d"), out=Path("o"), recipe=recipe, lora_rank=rank)
    assert resolve_recipe(config).lora_alpha == alpha


def test_with_adapters_the_language_part_is_trained_by_these_alone(tmp_path: Path) -> None:
    config = TrainConfig(model="m", data=Path("d"), out=Path("o"), lora_rank=4)
    assert resolve_recipe(config).parts == ("projector",)
    for recipe in ("tune", "lora"):
        named = resolve_recipe(replace(config, recipe=recipe, parts=("projector", "language")))
        assert named.parts == ("projector",)
        model = prepare_model(deep("llama"), named)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained == {name for name in trained if re.match(ADAPTERS, name)} != set()
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**LEAST, "parts": ["language"], "lora_rank": 4}))
    assert load_recipe(str(tmp_path / "mine.yaml")).parts == ()
