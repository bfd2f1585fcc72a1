"""Answers to many conversations, in batches.

Letters: B rows, L tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmtune.data import Processor
from vlmtune.data.collate import join_images
from vlmtune.data.images import load_image, read_image_size
from vlmtune.structures import IGNORE_INDEX, Conversation, Sample
from vlmtune.utils.errors import ConfigError, DataError


def encode_prompt(processor: Processor, conversation: Conversation, *, image_root: Path | None = None) -> Sample:
    """The conversation as tokens, ending where the model has to answer."""
    sizes = [read_image_size(image, root=image_root) for image in conversation.images]
    return processor.tokenize(conversation, image_sizes=sizes, add_generation_prompt=True)


def prompt_inputs(
    processor: Processor, samples: Sequence[Sample], *, image_root: Path | None = None
) -> dict[str, Tensor]:
    """Prompts of one batch, padded on the left.

    Returns:
        input_ids long[B, L], attention_mask long[B, L], mm_token_type_ids or token_type_ids long[B, L] for families
        that need them, and the image inputs.
    """
    longest = max(len(sample) for sample in samples)
    ids = torch.full((len(samples), longest), processor.tokenizer.pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sample in enumerate(samples):
        ids[row, longest - len(sample) :] = torch.from_numpy(sample.input_ids).long()
        mask[row, longest - len(sample) :] = 1
    inputs = dict(input_ids=ids, attention_mask=mask)
    if processor.family.positions == 'mrope':
        inputs['mm_token_type_ids'] = (ids == processor.image_token_id).long()
    if processor.family.token_types is not None:
        labels = torch.full_like(ids, IGNORE_INDEX)  # the answer is still to come
        inputs |= processor.token_types(ids, labels)
    images = [
        processor.image_inputs([load_image(image, root=image_root) for image in sample.images]) for sample in samples
    ]
    return {**inputs, **join_images(images, family=processor.family)}


def stop_tokens(processor: Processor, from_model: int | Sequence[int] | None = None) -> list[int]:
    """Tokens that end an answer: the model's own, the tokenizer's, and what the chat template closes a turn with.

    A template that closes turns with nothing adds nothing; one cannot train with it, but the model can answer.
    """
    try:
        return processor.stop_token_ids(from_model)
    except DataError:
        own = [from_model] if isinstance(from_model, int) else list(from_model or ())
        eos = processor.tokenizer.eos_token_id
        return sorted({*own, *([] if eos is None else [eos])})


@contextmanager
def answering(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def generate(
    model: Any,
    processor: Processor,
    conversations: Sequence[Conversation],
    *,
    autocast_dtype: torch.dtype | None = None,
    batch_size: int = 1,
    image_root: Path | None = None,
    streamer: Any = None,
    **generation: Any,
) -> list[str]:
    """The model's answers, in the order of the conversations.

    The mode of the model is restored; random generators move only if ``do_sample`` is set.

    Args:
        model: any transformers model that can generate, with or without an adapter in it; it is used where it is.
        processor: of the model.
        conversations: each ends with a user message.
        autocast_dtype: what to compute in where the weights are of several dtypes; None computes in the weights' own.
        batch_size: prompts that are answered together; prompts of like length meet.
        image_root: root of relative image paths.
        streamer: of transformers; batch_size must be 1.
        generation: settings of transformers' ``generate``; greedy unless ``do_sample`` is set.

    Raises:
        DataError: a conversation does not fit the chat template, or an image cannot be read.
        ConfigError: a streamer and several rows.
    """
    if streamer is not None and batch_size != 1:
        raise ConfigError(f'answers can be streamed one at a time only, but batch_size is {batch_size}; set it to 1')
    samples = [encode_prompt(processor, conversation, image_root=image_root) for conversation in conversations]
    order = sorted(range(len(samples)), key=lambda i: len(samples[i]))
    answers = [''] * len(samples)
    settings = {
        'do_sample': False,
        **generation,
        'eos_token_id': stop_tokens(processor, model.generation_config.eos_token_id),
        'pad_token_id': processor.tokenizer.pad_token_id,
        'streamer': streamer,
    }
    device, reduced = model.device, autocast_dtype not in (None, torch.float32)
    with answering(model), torch.autocast(device.type, dtype=autocast_dtype, enabled=reduced):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            inputs = prompt_inputs(processor, [samples[i] for i in rows], image_root=image_root)
            output = model.generate(**{name: tensor.to(device) for name, tensor in inputs.items()}, **settings)
            new = output[:, inputs['input_ids'].shape[1] :]
            for i, text in zip(rows, processor.tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                answers[i] = text.strip()
    return answers
