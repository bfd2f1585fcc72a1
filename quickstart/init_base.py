"""Writes the untrained base model of the quickstart: a LLaVA of about a million parameters with its own tokenizer.

python quickstart/init_base.py quickstart/data/untrained
"""

import argparse
from pathlib import Path

import easy_vqa
import torch
from prepare_data import COLOURS, DESCRIBE, SHAPES, Thing, sentence
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

IMAGE_SIZE = 64  # pixels
PATCH_SIZE = 8  # pixels, so an image is 64 tokens
WIDTH = 128
SPECIAL_TOKENS = ('<pad>', '<s>', '</s>', '<unk>', '<image>', '<|user|>', '<|assistant|>', '<|system|>')
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    '{% if add_generation_prompt %}<|assistant|>{% endif %}'
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over the words of the train questions and of the sentences; any other text falls back to bytes."""
    questions, answers, _ = easy_vqa.get_train_questions()
    sentences = [sentence(Thing(colour, shape)) for colour in COLOURS for shape in SHAPES]
    corpus = [*sorted(set(questions)) * 3, *sorted(set(answers)) * 50, *[DESCRIBE] * 50, *sentences * 10]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token='<pad>',
        bos_token='<s>',
        eos_token='</s>',
        unk_token='<unk>',
        additional_special_tokens=list(SPECIAL_TOKENS[4:]),
        model_max_length=2048,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """Random weights; a function of torch's seed."""
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=WIDTH,
        hidden_act='gelu',
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        initializer_range=0.08,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids('<image>'),
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy='default',
        tie_word_embeddings=True,
        initializer_range=0.08,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """What other programs read pictures with."""
    side = {'height': IMAGE_SIZE, 'width': IMAGE_SIZE}
    image_processor = CLIPImageProcessorPil(
        size=side, crop_size=side, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy='default',
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def main() -> None:
    """Write model, tokenizer and image processor."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('output', type=Path)
    output: Path = parser.parse_args().output
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    model.save_pretrained(output)
    processor = build_processor(tokenizer)
    processor.save_pretrained(output)
    processor.image_processor.save_pretrained(output)  # older programs read its own file
    print(f'{output}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens')


if __name__ == '__main__':
    main()
