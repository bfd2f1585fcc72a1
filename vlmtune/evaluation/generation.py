"""Answers to many conversations, in batches, and the settings they can have.

Letters: B rows, L tokens.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL.Image import Image
from torch import Tensor, nn
from transformers import GenerationConfig

from vlmtune.data import Processor
from vlmtune.data.collate import join_images
from vlmtune.data.images import load_image, read_image_size
from vlmtune.evaluation.stopping import as_stop_strings, cut_at, stopping_criteria
from vlmtune.models.modes import in_evaluation
from vlmtune.structures import IGNORE_INDEX, Conversation, Sample
from vlmtune.utils.errors import ConfigError, DataError
from vlmtune.utils.suggest import did_you_mean

_POSITIVE_INTEGER = (lambda value: isinstance(value, int) and value >= 1), 'a positive integer'
_ABOVE_0 = (lambda value: 0 < value < math.inf), 'a number above 0'
_SHARE = (lambda value: 0 <= value <= 1), 'a number from 0 to 1'
_RANGES: Mapping[str, tuple[Callable[[Any], bool], str]] = dict(
    max_new_tokens=_POSITIVE_INTEGER,
    num_beams=_POSITIVE_INTEGER,
    temperature=_ABOVE_0,
    repetition_penalty=_ABOVE_0,
    top_p=((lambda value: 0 < value <= 1), 'a number above 0 and at most 1'),
    top_k=((lambda value: isinstance(value, int) and value >= 0), '0 (no limit) or a positive integer'),
    min_p=_SHARE,
    no_repeat_ngram_size=((lambda value: isinstance(value, int) and value >= 0), '0 or a positive integer'),
)
"""Settings of ``generate`` about which transformers itself only warns, or fails in the middle of an answer."""
_NOT_FREE = dict(
    eos_token_id='answers end where the chat template ends a turn; add stop_strings for other ends',
    pad_token_id='it is the one of the tokenizer',
    max_length='it would count the prompt too; set max_new_tokens',
    num_return_sequences='a question has one answer; remove it',
    return_dict_in_generate='only texts are read; remove it',
)


def encode_prompt(processor: Processor, conversation: Conversation, *, image_root: Path | None = None) -> Sample:
    """The conversation as tokens, ending where the model has to answer."""
    sizes = [read_image_size(image, root=image_root) for image in conversation.images]
    return processor.tokenize(conversation, image_sizes=sizes, add_generation_prompt=True)


def prompt_inputs(
    processor: Processor,
    samples: Sequence[Sample],
    *,
    image_root: Path | None = None,
    images: Sequence[Sequence[Image]] | None = None,
) -> dict[str, Tensor]:
    """Prompts of one batch, padded on the left.

    Args:
        processor: of the model.
        samples: the prompts.
        image_root: root of relative image paths.
        images: those of each prompt; None reads them.

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
    if images is None:
        images = [[load_image(image, root=image_root) for image in sample.images] for sample in samples]
    pixels = [processor.image_inputs(own) for own in images]
    return {**inputs, **join_images(pixels, family=processor.family)}


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
def answering(model: nn.Module, *, autocast_dtype: torch.dtype | None = None) -> Iterator[None]:
    """Inside, the model is in evaluation mode; afterwards every module is in the mode it was in.

    Args:
        model: any.
        autocast_dtype: what to compute in where the weights are of several dtypes; None computes in the weights' own.
    """
    device = next(model.parameters()).device
    mixed = autocast_dtype not in (None, torch.float32)
    with in_evaluation(model), torch.autocast(device.type, dtype=autocast_dtype, enabled=mixed):
        yield


@dataclass(frozen=True)
class Answer:
    """What the model said: the text, how many tokens it took, the one that ends it included, and why it ended."""

    text: str
    tokens: int
    finish: Literal['stop', 'length']


@torch.no_grad()
def answer_prompts(
    model: Any,
    processor: Processor,
    inputs: Mapping[str, Tensor],
    *,
    streamer: Any = None,
    stop_strings: str | Sequence[str] = (),
    should_stop: Callable[[], bool] | None = None,
    **generation: Any,
) -> list[Answer]:
    """The answers to one batch of prompts; mode and precision are as they are, see ``answering``.

    Args:
        model: any transformers model that can generate.
        processor: of the model.
        inputs: of ``prompt_inputs``, on any device.
        streamer, stop_strings, should_stop, generation: see ``generate``.
    """
    length = inputs['input_ids'].shape[1]
    stop = stop_tokens(processor, model.generation_config.eos_token_id)
    settings = {
        'do_sample': False,
        **generation,
        'eos_token_id': stop,
        'pad_token_id': processor.tokenizer.pad_token_id,
        'streamer': streamer,
        'stopping_criteria': stopping_criteria(
            processor.tokenizer, prompt_length=length, stop_strings=stop_strings, should_stop=should_stop
        ),
    }
    output = model.generate(**{name: tensor.to(model.device) for name, tensor in inputs.items()}, **settings)
    return [_read_answer(row, processor, stop=stop, stop_strings=stop_strings) for row in output[:, length:].tolist()]


def _read_answer(row: list[int], processor: Processor, *, stop: list[int], stop_strings: str | Sequence[str]) -> Answer:
    """The answer in a row of new tokens: those that end it, and the padding after them, are no text."""
    tokens = next((i + 1 for i, token in enumerate(row) if token in stop), None)
    ended = tokens is not None
    if tokens is None:
        tokens = len(row)
        while tokens and row[tokens - 1] == processor.tokenizer.pad_token_id:
            tokens -= 1
        whole = processor.tokenizer.decode(row[:tokens]) if stop_strings else ''
        ended = tokens < len(row) or cut_at(whole, stop_strings) != whole
    text = processor.tokenizer.decode(row[:tokens], skip_special_tokens=True)
    return Answer(cut_at(text, stop_strings).strip(), tokens, 'stop' if ended else 'length')


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
    stop_strings: str | Sequence[str] = (),
    should_stop: Callable[[], bool] | None = None,
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
        stop_strings: texts that end an answer, which is cut before them.
        should_stop: asked after every token; True ends the answers that are being written.
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
    ending: dict[str, Any] = dict(streamer=streamer, stop_strings=stop_strings, should_stop=should_stop)
    with answering(model, autocast_dtype=autocast_dtype):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            inputs = prompt_inputs(processor, [samples[i] for i in rows], image_root=image_root)
            for i, answer in zip(rows, answer_prompts(model, processor, inputs, **ending, **generation), strict=True):
                answers[i] = answer.text
    return answers


def check_generation(settings: Mapping[str, Any], *, where: str) -> None:
    """Whether transformers' ``generate`` knows these settings.

    Args:
        settings: by name; ``stop_strings`` is one of them.
        where: they stand, for the message.

    Raises:
        ConfigError: it does not, or a value cannot be.
    """
    known = {name for name in GenerationConfig().to_dict() if not name.startswith('_')}
    for name in settings:
        if name not in known:
            raise ConfigError(f'{where}: generate() has no setting {name!r}{did_you_mean(name, known)}')
        if name in _NOT_FREE and settings[name] is not None:
            raise ConfigError(f'{where}: {name} cannot be set: {_NOT_FREE[name]}')
        if expected := expected_of(name, settings[name]):
            raise ConfigError(f'{where}: {name}={settings[name]!r}; expected {expected}')
    as_stop_strings(settings.get('stop_strings') or (), name=f'{where}.stop_strings')
    try:
        GenerationConfig(**settings)
    except (ValueError, TypeError) as error:
        raise ConfigError(f'{where}: {" ".join(str(error).split())}') from error


def expected_of(name: str, value: Any) -> str | None:
    """What a setting of ``generate`` has to be, in words, if this value is none that it can have; None always can."""
    holds, expected = _RANGES.get(name, (None, ''))
    if holds is None or value is None:
        return None
    try:
        return None if holds(value) else expected
    except TypeError:  # no number
        return expected
