"""Tiny real models of several families with random weights, and samples to feed them."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from visgain.types import Sample, Turn
from visgain.vlm.load import VLM, load_vlm

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


class Picture:
    """An image of a dataset that is already open."""

    def __init__(self, size: tuple[int, int] = (40, 30), key: str = "picture") -> None:
        self.size, self.key = size, key

    def hint(self) -> None:
        return None

    def open(self) -> Image.Image:
        return Image.new("RGB", self.size, (200, 30, 30))


def make_sample(*texts: str, images: int = 1) -> Sample:
    roles = ("user", "assistant")
    turns = tuple(Turn(role=roles[k % 2], text=text) for k, text in enumerate(texts))
    return Sample(row=0, id="0", turns=turns, images=tuple(Picture(key=str(k)) for k in range(images)))


def sentencepiece_like_tokenizer() -> PreTrainedTokenizerFast:
    """A stand-in for Vicuna's tokenizer: words carry the space before them as a mark, bytes as a last resort."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", "<image>", "<pad>", *(f"<0x{value:02X}>" for value in range(256))]
    corpus = [SYSTEM, "USER: What is this? ASSISTANT: A red cup on a table. No, there is a dog."] * 4
    tokenizer.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )


def llava_vicuna(blank_model: Path) -> VLM:
    """A LLaVA whose processor has no chat template and a tokenizer in Vicuna's manner."""
    vlm = load_vlm(str(blank_model))
    vlm.processor.tokenizer = sentencepiece_like_tokenizer()
    vlm.processor.chat_template = None
    vlm.model.config.image_token_id = vlm.processor.tokenizer.convert_tokens_to_ids("<image>")
    vlm.model.resize_token_embeddings(len(vlm.processor.tokenizer))
    return vlm


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def llava_next() -> VLM:
    """A LLaVA-NeXT: a picture's token count depends on its size; a ChatML template without generation marks or BOS."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        ["user assistant What is this? A red cup."],
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<image>"},
    )
    grid = [[24, 48], [48, 24], [48, 48]]
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}, image_grid_pinpoints=grid
        ),
        tokenizer=fast,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHATML,
    )
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=24,
            patch_size=8,
            projection_dim=16,
        ),
        text_config=LlamaConfig(
            vocab_size=len(fast),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        ),
        image_token_index=fast.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=grid,
        vision_feature_layer=-1,
    )
    return VLM(name="llava-next", model=LlavaNextForConditionalGeneration(config).eval(), processor=processor)
