"""The mixed-length workload that every contender of ``mixed_lengths.py`` learns, as files on disk.

A tiny Qwen2.5-VL with a vocabulary of 32,000 (so that head and loss weigh as they do in real models) and rows of one
picture, one question and one answer whose number of words is log-normal. Kinds:

findings  pictures of 4 to 48 tokens, answers of 25 words (median): 160 rows
short     the same pictures, answers of 3 words
long      the same pictures, answers of 90 words
images    pictures of 144 to 400 tokens, answers of 11 words: at least 80 % of all tokens are image tokens
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

VOCABULARY = 32_000
QUESTION = 'what is in the image?'
WORDS = 'the quick brown fox jumps over lazy dog what is in image'.split()
SPECIALS = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|vision_start|>', '<|vision_end|>', '<|image_pad|>']
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    '{% endfor %}{% endif %}<|im_end|>\n{% endfor %}'
    '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)


@dataclass(frozen=True)
class Kind:
    """How one workload is drawn: sides of the pictures in pixels, log-normal answer length in words."""

    heights: tuple[int, ...]
    widths: tuple[int, ...]
    mean: float
    sigma: float
    longest: int
    rows: int


_SMALL = dict(heights=(56, 84, 112, 140, 168), widths=(56, 84, 112, 168, 224))
KINDS = {
    'findings': Kind(**_SMALL, mean=3.2, sigma=0.9, longest=300, rows=160),
    'short': Kind(**_SMALL, mean=1.1, sigma=0.6, longest=300, rows=160),
    'long': Kind(**_SMALL, mean=4.5, sigma=0.8, longest=900, rows=96),
    'images': Kind(heights=(336, 448, 560), widths=(336, 448, 560), mean=2.4, sigma=0.8, longest=300, rows=64),
}


def write_workload(directory: Path, kind: str) -> None:
    """Write ``model/``, ``images/`` and ``rows.jsonl`` (LLaVA rows); the same files every time."""
    directory.mkdir(parents=True, exist_ok=True)
    _write_model(directory / 'model')
    write_rows(directory, KINDS[kind])


def _write_model(path: Path) -> None:
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=8,
            num_key_value_heads=4, max_position_embeddings=8192,
            rope_parameters={'rope_type': 'default', 'rope_theta': 10000.0, 'mrope_section': [4, 6, 6]},
        ),
        vision_config=dict(
            depth=4, hidden_size=128, out_hidden_size=256, intermediate_size=256, num_heads=4, patch_size=14,
            spatial_merge_size=2, temporal_patch_size=2, fullatt_block_indexes=[1, 3], window_size=112,
        ),
        image_token_id=5, video_token_id=VOCABULARY - 1, vision_start_token_id=3, vision_end_token_id=4,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(path)
    write_files(path)


def write_files(path: Path) -> None:
    """Tokenizer, chat template and image processor."""
    _tokenizer().save_pretrained(path)
    settings = dict(
        image_processor_type='Qwen2VLImageProcessor', processor_class='Qwen2_5_VLProcessor',
        patch_size=14, merge_size=2, temporal_patch_size=2, min_pixels=28 * 28, max_pixels=28 * 28 * 400,
        image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711],
    )  # fmt: skip
    (path / 'preprocessor_config.json').write_text(json.dumps(settings))


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([f'{" ".join(WORDS)}. {QUESTION} '] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=8192, eos_token='<|im_end|>', pad_token='<|endoftext|>'
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def write_rows(directory: Path, kind: Kind) -> None:
    """``images/`` and ``rows.jsonl``."""
    rng = random.Random(0)
    images = directory / 'images'
    images.mkdir(exist_ok=True)
    lines = []
    for index in range(kind.rows):
        height, width = rng.choice(kind.heights), rng.choice(kind.widths)
        words = min(kind.longest, int(rng.lognormvariate(kind.mean, kind.sigma)) + 2)
        noise = np.random.RandomState(index).randint(0, 255, (height, width, 3), dtype='uint8')
        Image.fromarray(noise).save(images / f'{index}.jpg', quality=90)
        turns = [
            {'from': 'human', 'value': f'<image>\n{QUESTION}'},
            {'from': 'gpt', 'value': ' '.join(rng.choice(WORDS) for _ in range(words))},
        ]
        lines.append(json.dumps({'id': str(index), 'image': f'{index}.jpg', 'conversations': turns}))
    (directory / 'rows.jsonl').write_text('\n'.join(lines) + '\n')


def read_rows(directory: Path) -> list[tuple[Path, str, str]]:
    """(picture, question, answer) of every row, for the contenders that take no LLaVA rows."""
    rows = [json.loads(line) for line in (directory / 'rows.jsonl').read_text().splitlines()]
    return [(directory / 'images' / row['image'], QUESTION, row['conversations'][1]['value']) for row in rows]
