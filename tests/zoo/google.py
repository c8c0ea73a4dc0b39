"""Gemma's descendants."""

from __future__ import annotations

from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    SiglipVisionConfig,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from visgain.vlm.load import NoVideos
from zoo.base import TEXT, VISION, Entry, ids, spiece_tokenizer

GEMMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
    "{% for item in message['content'] %}{% if item['type'] == 'image' %}{{ '<start_of_image>' }}"
    "{% elif item['type'] == 'text' %}{{ item['text'] | trim }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def gemma3():
    named = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = spiece_tokenizer(
        ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", *named.values()],
        named,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
    )
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size={"height": 32, "width": 32}),
        tokenizer=tokenizer,
        chat_template=GEMMA3,
        image_seq_length=16,
    )
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**VISION, image_size=32, patch_size=4, vision_use_head=False),
        text_config={
            **TEXT,
            **ids(tokenizer),
            "num_hidden_layers": 3,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "final_logit_softcapping": 8.0,
        },
        mm_tokens_per_image=16,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    return Gemma3ForConditionalGeneration(config), processor


GEMMA4 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{% for item in message['content'] %}{% if item['type'] == 'image' %}{{ '<|image|>' }}"
    "{% elif item['type'] == 'text' %}{{ item['text'] | trim }}{% endif %}{% endfor %}"
    "{{ '<turn|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|turn>model\n' }}{% endif %}"
)


def gemma4():
    from transformers import (
        Gemma4AudioFeatureExtractor,
        Gemma4Config,
        Gemma4ForConditionalGeneration,
        Gemma4Processor,
    )
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    named = {
        "image_token": "<|image|>",
        "boi_token": "<|image>",
        "eoi_token": "<image|>",
        "audio_token": "<|audio|>",
        "boa_token": "<|audio>",
        "eoa_token": "<audio|>",
    }
    tokenizer = spiece_tokenizer(
        ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", "<|video|>", *named.values()],
        named,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
    )
    processor = Gemma4Processor(
        feature_extractor=Gemma4AudioFeatureExtractor(),
        image_processor=Gemma4ImageProcessorPil(patch_size=2, pooling_kernel_size=2, max_soft_tokens=70),
        tokenizer=tokenizer,
        video_processor=NoVideos({"video_processor_type": "Gemma4VideoProcessor"}),
        chat_template=GEMMA4,
        image_seq_length=70,
    )
    config = Gemma4Config(
        vision_config={
            **VISION,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": 2,
            "pooling_kernel_size": 2,
            "position_embedding_size": 64,
        },
        audio_config=None,
        text_config={
            **TEXT,
            **ids(tokenizer),
            "num_hidden_layers": 4,
            "head_dim": 8,
            "global_head_dim": 16,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": len(tokenizer),
            "use_bidirectional_attention": "vision",
            "final_logit_softcapping": 8.0,
        },
        image_token_id=tokenizer.image_token_id,
        boi_token_id=tokenizer.boi_token_id,
        eoi_token_id=tokenizer.eoi_token_id,
        audio_token_id=tokenizer.audio_token_id,
        boa_token_id=tokenizer.boa_token_id,
        eoa_token_index=tokenizer.eoa_token_id,
        video_token_id=tokenizer.convert_tokens_to_ids("<|video|>"),
    )
    return Gemma4ForConditionalGeneration(config), processor


def paligemma(text: type, **options):
    tokenizer = spiece_tokenizer(
        ["<pad>", "<eos>", "<bos>", "<unk>", "<image>"],
        {"image_token": "<image>"},
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
    )
    processor = PaliGemmaProcessor(
        image_processor=SiglipImageProcessorPil(size={"height": 12, "width": 12}, image_seq_length=9),
        tokenizer=tokenizer,
    )
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**VISION, image_size=12, patch_size=4, vision_use_head=False),
        text_config=text(**TEXT, **ids(tokenizer), head_dim=8, **options),
        image_token_index=tokenizer.image_token_id,
        projection_dim=32,
        hidden_size=32,
    )
    return PaliGemmaForConditionalGeneration(config), processor


def paligemma2():
    return paligemma(
        Gemma2Config,
        sliding_window=12,
        layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=8,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=8.0,
    )


ENTRIES = [
    Entry(
        name="gemma3",
        cuttable=False,
        way="mutual",  # the tokens of a picture see each other
        make=gemma3,
        ends=("<end_of_turn>\n",),
        note="image tokens see each other both ways (token_type_ids); windows of 12 tokens, less than a picture, in "
        "two of three layers; soft-capped logits; tied embeddings",
    ),
    Entry(
        name="gemma4",
        since="5.23",
        cuttable=False,
        way="mutual",
        make=gemma4,
        ends=("<turn|>\n",),
        note="as gemma3; also keys and values shared between layers, heads of two sizes, an embedding for each layer",
    ),
    Entry(
        name="paligemma",
        blind="mask",
        pictures="before the first question",
        text="completion",
        way="single",  # the question is read both ways
        make=lambda: paligemma(GemmaConfig),
        ends=("<eos>",),
        note="no chat template: a question that is completed; all before the first answer is read both ways "
        "(token_type_ids 0); tied",
    ),
    Entry(
        name="paligemma2",
        blind="mask",
        cuttable=False,
        pictures="before the first question",
        text="completion",
        way="single",
        make=paligemma2,
        ends=("<eos>",),
        note="as paligemma on Gemma 2: a window of 12 in one layer, soft-capped attention and logits",
    ),
]
