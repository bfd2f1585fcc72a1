"""Answers to many conversations, in batches.

Letters: B rows, L tokens.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmtune.data import Processor
from vlmtune.data.images import load_image, read_image_size
from vlmtune.models import SupervisedFinetune
from vlmtune.structures import Conversation, Sample


def encode_prompt(processor: Processor, conversation: Conversation, *, image_root: Path | None = None) -> Sample:
    """The conversation as tokens, ending where the model has to answer."""
    sizes = [read_image_size(image, root=image_root) for image in conversation.images]
    return processor.tokenize(conversation, image_sizes=sizes, add_generation_prompt=True)


def prompt_inputs(processor: Processor, samples: Sequence[Sample], *, image_root: Path | None = None) -> dict[str, Tensor]:
    """Prompts of one batch, padded on the left.

    Returns:
        input_ids long[B, L], attention_mask long[B, L], mm_token_type_ids long[B, L] for families with three-axis
        positions, and the image inputs.
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
    images = [load_image(image, root=image_root) for sample in samples for image in sample.images]
    return {**inputs, **processor.image_inputs(images)}


@torch.no_grad()
def generate(
    model: SupervisedFinetune,
    processor: Processor,
    conversations: Sequence[Conversation],
    *,
    batch_size: int = 1,
    image_root: Path | None = None,
    streamer: Any = None,
    **generation: Any,
) -> list[str]:
    """The model's answers, in the order of the conversations.

    The mode of the model is restored; random generators move only if ``do_sample`` is set.

    Args:
        model: the model; it is used where it is.
        processor: of the model.
        conversations: each ends with a user message.
        batch_size: prompts that are answered together; prompts of like length meet.
        image_root: root of relative image paths.
        streamer: of transformers; batch_size must be 1.
        generation: settings of transformers' ``generate``; greedy unless ``do_sample`` is set.
    """
    samples = [encode_prompt(processor, conversation, image_root=image_root) for conversation in conversations]
    order = sorted(range(len(samples)), key=lambda i: len(samples[i]))
    answers = [''] * len(samples)
    stop = processor.stop_token_ids(model.model.generation_config.eos_token_id)
    settings = {'do_sample': False, **generation}
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    try:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            inputs = prompt_inputs(processor, [samples[i] for i in rows], image_root=image_root)
            inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
            with torch.autocast(device.type, dtype=model.dtype, enabled=model.dtype != torch.float32):
                output = model.model.generate(
                    **inputs,
                    **settings,
                    eos_token_id=stop,
                    pad_token_id=processor.tokenizer.pad_token_id,
                    streamer=streamer,
                )
            new = output[:, inputs['input_ids'].shape[1] :]
            for i, text in zip(rows, processor.tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                answers[i] = text.strip()
    finally:
        model.train(was_training)
    return answers
