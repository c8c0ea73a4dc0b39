"""LLaVA trains on a selection through the launcher: the real package, in an environment of its own."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

import foreign_run
import tiny_llava
from environments import Environment, batches, environment

pytestmark = pytest.mark.integration

GUIDE = Path(__file__).parents[1] / "docs" / "trainers" / "llava.md"

# A SentencePiece model as Llama's, for the slow tokenizer that LLaVA insists on, and the fast one that is the same.
MAKE = """
import sys
import sentencepiece, torch
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer, LlamaTokenizerFast

sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(open("corpus.txt")), model_prefix="llama", vocab_size=620, model_type="bpe",
    byte_fallback=True, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
)
tokenizer = LlamaTokenizer("llama.model", legacy=sys.argv[1] == "legacy")
tokenizer.save_pretrained("vicuna")
LlamaTokenizerFast.from_pretrained("vicuna").save_pretrained("fast")
torch.manual_seed(0)
small = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
LlamaForCausalLM(LlamaConfig(**small, vocab_size=len(tokenizer))).save_pretrained("vicuna")
CLIPVisionModel(CLIPVisionConfig(**small, image_size=28, patch_size=14)).save_pretrained("clip")
CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained("clip")
"""

ARGUMENTS = """
-m llava.train.train --model_name_or_path vicuna --version v1 --vision_tower clip --mm_projector_type mlp2x_gelu
--mm_vision_select_layer -2 --mm_use_im_start_end False --mm_use_im_patch_token False --image_aspect_ratio pad
--group_by_modality_length True --bf16 True --use_cpu True --data_path export/data.json --image_folder .
--output_dir trained --num_train_epochs 1 --per_device_train_batch_size 2 --save_strategy no --learning_rate 1e-3
--logging_steps 1 --model_max_length 2048 --dataloader_num_workers 2 --lazy_preprocess True --report_to none
"""


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Its home has a model in both forms, data, and what the guide's commands of visgain made of them."""
    folder = tmp_path_factory.mktemp("llava")
    there = environment("llava", folder)
    foreign_run.write_folder(folder)
    (folder / "corpus.txt").write_text("\n".join(tiny_llava.CORPUS))
    (folder / "make.py").write_text(MAKE)
    assert there.run(["python", "make.py", "legacy"]).returncode == 0
    vlm = tiny_llava.clip_llava(fast_tokenizer(folder), side=28)
    vlm.model.save_pretrained(folder / "model")
    vlm.processor.save_pretrained(folder / "model")
    foreign_run.run_ours(GUIDE, folder)
    return there


def fast_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The fast form of LLaVA's tokenizer, with the image token that Hugging Face's LLaVA has."""
    plain = PreTrainedTokenizerFast(tokenizer_file=str(folder / "fast/tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    plain.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image = {"extra_special_tokens": {"image_token": "<image>"}}
    return PreTrainedTokenizerFast(tokenizer_object=plain.backend_tokenizer, **special, **image)


def launch(llava: Environment, *before: str, spy: Path | None = None, **said: str) -> tuple[int, str]:
    """The launcher with LLaVA's arguments, some of them others. Returns the status and all that was printed."""
    words = shlex.split(ARGUMENTS)
    for name, value in said.items():
        words[words.index(f"--{name}") + 1] = value
    done = llava.run(["python", "export/visgain_launch.py", *before, *words], spy=spy)
    return done.returncode, done.stdout + done.stderr


def test_llava_trains_on_exactly_the_selected_tokens(llava: Environment) -> None:
    status, said = launch(llava, spy=llava.home / "batches.jsonl")
    assert status == 0, said[-3000:]
    seen = batches(llava.home / "batches.jsonl")
    pairs = foreign_run.check_labels(llava.home, seen, fast_tokenizer(llava.home))
    assert 0 < sum(sum(row["keep"]) for _, row in pairs) < sum(len(row["keep"]) for _, row in pairs)
    assert len(re.findall(r"'loss': [\d.]+", said)) == len(seen)
    assert (llava.home / "trained" / "trainer_state.json").is_file()


def test_check_reads_every_row_of_it(llava: Environment) -> None:
    status, said = launch(llava, "--check")
    n_rows = len(foreign_run.kept_rows(llava.home))
    assert status == 0
    assert f"visgain: {n_rows} rows read, 0 of them would stop the training\n" in said


def test_another_template_stops_it(llava: Environment) -> None:
    status, said = launch(llava, version="llava_llama_2", output_dir="drift")
    assert status == 1
    assert "MaskError: row " in said
    assert "template llava-1.5" in said
    assert "'loss'" not in said


def test_the_dataset_that_was_scored_in_place_of_the_export_stops_it(llava: Environment) -> None:
    status, said = launch(llava, data_path="data.json", output_dir="whole")
    n_rows = len(foreign_run.kept_rows(llava.home))
    assert status == 1
    assert f"the trainer reads 13 rows and the selection keeps {n_rows}" in said


def test_rows_that_its_own_counting_leaves_without_labels_are_told(llava: Environment) -> None:
    """A tokenizer that is not `legacy` splits `</s>USER` of this vocabulary otherwise than LLaVA counts."""
    config = llava.home / "vicuna/tokenizer_config.json"
    before = config.read_text()
    config.write_text(before.replace('"legacy": true', '"legacy": false'))
    try:
        status, said = launch(llava, output_dir="mismatch")
        assert status == 1
        assert "the trainer gives no label to any of its" in said
        status, said = launch(llava, "--check")
        assert status == 1
        assert "WARNING: tokenization mismatch" in said
        n_rows = sum(max(row["turn"]) > 0 for row in foreign_run.kept_rows(llava.home))
        assert f"; no label: {n_rows}" in said
        assert launch(llava, "--allow-mismatch", output_dir="allowed")[0] == 0
    finally:
        config.write_text(before)
