"""Pictures cut into tiles, each of a fixed number of tokens."""

from __future__ import annotations

from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    AyaVisionProcessor,
    Cohere2Config,
    GotOcr2Config,
    GotOcr2ForConditionalGeneration,
    GotOcr2Processor,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics2Processor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    LlamaConfig,
    MistralConfig,
    Ovis2Config,
    Ovis2ForConditionalGeneration,
    Ovis2Processor,
    Qwen2Config,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMProcessor,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from visgain.vlm.load import NoVideos
from zoo.base import TEXT, VISION, Entry, byte_tokenizer, ids, spiece_tokenizer

IDEFICS = (
    "BEGIN{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
INTERNVL = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'text' %}"
    "{{ content['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ 'PICTURE' }}{% else %}{{ content['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
AYA = (
    "{{ bos_token }}{% for message in messages %}{{ '<|START_OF_TURN_TOKEN|>' }}"
    "{% if message['role'] == 'user' %}{{ '<|USER_TOKEN|>' }}{% for item in message['content'] %}"
    "{% if item['type'] == 'text' %}{{ item['text'] }}{% else %}{{ '<image>' }}{% endif %}{% endfor %}"
    "{{ '<|END_OF_TURN_TOKEN|>' }}{% else %}{{ '<|CHATBOT_TOKEN|><|START_RESPONSE|>' }}"
    "{% for item in message['content'] %}{{ item['text'] }}{% endfor %}{{ '<|END_RESPONSE|><|END_OF_TURN_TOKEN|>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>' }}{% endif %}"
)

IDEFICS_TOKENS = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>")
SIDE, PATCH = 16, 4


def idefics2():
    tokenizer = spiece_tokenizer(
        ["<unk>", "<s>", "</s>", "<fake_token_around_image>", "<image>", "<end_of_utterance>"],
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
    )
    processor = Idefics2Processor(
        image_processor=Idefics2ImageProcessorPil(
            size={"shortest_edge": 12, "longest_edge": 24}, do_image_splitting=False
        ),
        tokenizer=tokenizer,
        image_seq_len=3,
        chat_template=IDEFICS.replace("BEGIN", "<s>"),
    )
    config = Idefics2Config(
        vision_config={**VISION, "image_size": 24, "patch_size": PATCH},
        perceiver_config={
            "hidden_size": 32,
            "resampler_n_latents": 3,
            "resampler_depth": 1,
            "resampler_n_heads": 4,
            "resampler_head_dim": 8,
            "num_key_value_heads": 2,
        },
        text_config=MistralConfig(**TEXT, **ids(tokenizer), sliding_window=None),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return Idefics2ForConditionalGeneration(config), processor


def row_col_tokens() -> list[str]:
    return [f"<row_{row + 1}_col_{column + 1}>" for row in range(6) for column in range(6)]


def idefics3():
    tokenizer = byte_tokenizer(
        ["<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", *IDEFICS_TOKENS, *row_col_tokens()],
        bos_token="<|begin_of_text|>",
        eos_token="<end_of_utterance>",
        pad_token="<|finetune_right_pad_id|>",
    )
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessorPil(
            size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}
        ),
        tokenizer=tokenizer,
        image_seq_len=(SIDE // PATCH // 2) ** 2,
        chat_template=IDEFICS.replace("BEGIN", "<|begin_of_text|>"),
    )
    config = Idefics3Config(
        vision_config={**VISION, "image_size": SIDE, "patch_size": PATCH},
        text_config=LlamaConfig(**TEXT, **ids(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    return Idefics3ForConditionalGeneration(config), processor


def smolvlm():
    tokenizer = byte_tokenizer(
        ["<|im_start|>", "<|im_end|>", *IDEFICS_TOKENS, *row_col_tokens()],
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|im_end|>",
    )
    processor = SmolVLMProcessor(
        image_processor=SmolVLMImageProcessorPil(
            size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}
        ),
        tokenizer=tokenizer,
        video_processor=NoVideos({"video_processor_type": "SmolVLMVideoProcessor"}),
        image_seq_len=(SIDE // PATCH // 4) ** 2,
        chat_template=IDEFICS.replace("BEGIN", "<|im_start|>"),
    )
    config = SmolVLMConfig(
        vision_config={**VISION, "image_size": SIDE, "patch_size": PATCH},
        text_config=LlamaConfig(**TEXT, **ids(tokenizer), tie_word_embeddings=True),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=4,
        tie_word_embeddings=True,
    )
    return SmolVLMForConditionalGeneration(config), processor


def internvl():
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = byte_tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *named.values()],
        named,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessorPil(
            size={"height": SIDE, "width": SIDE}, crop_to_patches=True, min_patches=1, max_patches=3
        ),
        tokenizer=tokenizer,
        video_processor=NoVideos({"video_processor_type": "InternVLVideoProcessor"}),
        image_seq_length=(SIDE // PATCH // 2) ** 2,
        chat_template=INTERNVL,
    )
    config = InternVLConfig(
        vision_config={**VISION, "image_size": SIDE, "patch_size": PATCH},
        text_config=Qwen2Config(**TEXT, **ids(tokenizer)),
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=(SIDE // PATCH // 2) ** 2,
        tie_word_embeddings=False,
    )
    return InternVLForConditionalGeneration(config), processor


def aya_vision():
    image = ["<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>"]
    turns = ["<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"]
    tokenizer = byte_tokenizer(
        ["<PAD>", "<BOS_TOKEN>", "<|START_RESPONSE|>", "<|END_RESPONSE|>", *turns, *image, "TILE_GLOBAL", "TILE"],
        bos_token="<BOS_TOKEN>",
        eos_token="<|END_OF_TURN_TOKEN|>",
        pad_token="<PAD>",
    )
    processor = AyaVisionProcessor(
        image_processor=GotOcr2ImageProcessorPil(
            size={"height": SIDE, "width": SIDE}, crop_to_patches=True, min_patches=1, max_patches=3
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        img_size=SIDE,
        downsample_factor=2,
        chat_template=AYA,
    )
    config = AyaVisionConfig(
        vision_config=SiglipVisionConfig(**VISION, image_size=SIDE, patch_size=PATCH, vision_use_head=False),
        text_config=Cohere2Config(
            **TEXT,
            **ids(tokenizer),
            sliding_window=12,
            layer_types=["sliding_attention", "full_attention"],
            logit_scale=0.5,
        ),
        downsample_factor=2,
        image_token_index=tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>"),
    )
    return AyaVisionForConditionalGeneration(config), processor


def got_ocr2():
    tokenizer = byte_tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<imgpad>"],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    processor = GotOcr2Processor(
        image_processor=GotOcr2ImageProcessorPil(size={"height": 64, "width": 64}),
        tokenizer=tokenizer,
        chat_template=CHATML.replace("PICTURE", "<img><imgpad></img>\n"),
    )
    config = GotOcr2Config(
        vision_config={
            "hidden_size": 16,
            "output_channels": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "mlp_dim": 24,
            "image_size": 64,
            "patch_size": 1,
            "window_size": 8,
            "global_attn_indexes": [],
        },
        text_config=Qwen2Config(**TEXT, **ids(tokenizer), tie_word_embeddings=True),
        image_token_index=tokenizer.convert_tokens_to_ids("<imgpad>"),
        image_seq_length=256,
    )
    return GotOcr2ForConditionalGeneration(config), processor


def ovis2():
    indicators = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
    tokenizer = byte_tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<IMG_ATOM>", *indicators],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    processor = Ovis2Processor(
        image_processor=Ovis2ImageProcessorPil(
            size={"height": SIDE, "width": SIDE}, crop_to_patches=True, max_patches=4
        ),
        tokenizer=tokenizer,
        image_seq_length=(SIDE // PATCH // 2) ** 2,
        chat_template=CHATML.replace("PICTURE", "<image>\n"),
    )
    config = Ovis2Config(
        vision_config={**VISION, "image_size": SIDE, "patch_size": PATCH, "hidden_stride": 2, "vocab_size": 48},
        text_config=Qwen2Config(**TEXT, **ids(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_ATOM>"),
        visual_indicator_token_ids=tokenizer.convert_tokens_to_ids(indicators),
        hidden_size=32,
        vocab_size=len(tokenizer),
        tie_word_embeddings=False,
    )
    return Ovis2ForConditionalGeneration(config), processor


ENTRIES = [
    Entry(
        name="idefics2",
        since="5.23",
        make=idefics2,
        ends=("<end_of_utterance>\n",),
        note="a resampler: pictures of any size become 3 tokens; pixel_attention_mask",
    ),
    Entry(
        name="idefics3",
        since="5.23",
        make=idefics3,
        ends=("<end_of_utterance>\n",),
        note="rows and columns of tiles with text between them; pixel shuffle; pixel_values [1, tiles, ...]",
    ),
    Entry(
        name="smolvlm",
        since="5.23",
        make=smolvlm,
        ends=("<end_of_utterance>\n",),
        note="as idefics3, tied embeddings, one token a tile; the processor needs num2words",
    ),
    Entry(
        name="internvl",
        since="5.23",
        make=internvl,
        ends=("<|im_end|>\n",),
        note="as many tiles as fit the picture's shape, and a thumbnail; the placeholder is also the image token",
    ),
    Entry(
        name="aya_vision",
        cuttable=False,
        make=aya_vision,
        ends=("<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",),
        note="tiles with text between them; scaled logits; one layer with a window of 12, one without positions; tied",
    ),
    Entry(name="got_ocr2", make=got_ocr2, ends=("<|im_end|>\n",), note="256 tokens a picture, always; tied embeddings"),
    Entry(
        name="ovis2",
        since="5.23",
        cuttable=False,  # the marks around tiles, too, are the vision side's
        make=ovis2,
        ends=("<|im_end|>\n",),
        note="patches as soft words of a visual vocabulary; marks around tiles are embedded by the vision side",
    ),
]
