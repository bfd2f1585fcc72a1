"""What plain transformers makes of an export's tokenizer, template and image processor, against what training used."""

from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

from vlmtune.apps.export.processor_files import image_differences
from vlmtune.apps.export.verify_model import ABOUT_PICTURE, QUESTION, logits_of, picture
from vlmtune.data import Processor
from vlmtune.evaluation.generation import answering, encode_prompt, prompt_inputs
from vlmtune.structures import Conversation, user_message
from vlmtune.utils.errors import ModelError
from vlmtune.utils.pretrained import FAILURES, load_pretrained, reason_of

_PIXELS = 1e-5  # what float32 leaves open; pixels are between -3 and 3


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: 'ok', 'wrong', or a 'note' on what could not be."""

    kind: Literal['ok', 'wrong', 'note']
    what: str
    text: str


def fixed_prompts(processor: Processor) -> list[Conversation]:
    """A question, and for models with vision one about a picture: the same bits everywhere."""
    prompts = [Conversation((user_message(QUESTION),))]
    if processor.family.has_vision:
        prompts.append(Conversation((user_message(ABOUT_PICTURE, images=[0]),), (picture(),)))
    return prompts


def inputs_of(processor: Processor, prompt: Conversation) -> dict[str, Tensor]:
    """``prompt_inputs`` of one prompt."""
    return prompt_inputs(processor, [encode_prompt(processor, prompt)])


@torch.no_grad()
def ask(model: Any, processor: Processor, *, autocast_dtype: torch.dtype | None) -> list[Tensor]:
    """float32[L, V], the logits of each fixed prompt, on the CPU.

    Raises:
        ModelError: the model does not take its inputs.
    """
    with answering(model, autocast_dtype=autocast_dtype):
        return [logits_of(model, inputs_of(processor, prompt)).cpu() for prompt in fixed_prompts(processor)]


def compare_inputs(folder: Path, wanted: Processor) -> Iterator[Finding]:
    """Compare token ids and pixels of plain Auto classes with those of ``wanted``.

    Args:
        folder: an export in the layout of transformers.
        wanted: the processor of the trained model.
    """
    text, *rest = fixed_prompts(wanted)
    try:
        tokenizer = load_pretrained(AutoTokenizer, str(folder))
        question = _messages(text, as_parts=wanted.family.has_vision)
        found: Any = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True)
    except (ModelError, *FAILURES) as error:
        yield Finding('wrong', 'token ids', f'AutoTokenizer cannot write a prompt: {reason_of(error)}')
        return
    ids = inputs_of(wanted, text)['input_ids'][0].tolist()
    yield _same('token ids', found['input_ids'], ids, f'AutoTokenizer, {len(ids)} tokens of a question')
    for prompt in rest:
        yield from _compare_picture(folder, wanted, prompt)


def compare_settings(own: Processor, wanted: Processor) -> Iterator[Finding]:
    """Compare what files in a layout of their own say with what was trained with: token ids, and image settings.

    Args:
        own: the processor of the export.
        wanted: that of the trained model.
    """
    found, ids = (inputs_of(one, fixed_prompts(wanted)[0])['input_ids'][0].tolist() for one in (own, wanted))
    yield _same('token ids', found, ids, f'{len(ids)} tokens of a question')
    differences = image_differences(wanted, own)
    if differences:
        told = ', '.join(
            f'{name} is {here} in its files, and was {trained} in training'
            for name, (trained, here) in differences.items()
        )
        yield Finding('note', 'image settings', f'{told}; set that in what runs it')


def joint_processor(folder: Path) -> Any:
    """``AutoProcessor`` of a folder; None where its family needs torchvision, which is not installed.

    Raises:
        ModelError: it cannot be built.
    """
    try:
        return load_pretrained(AutoProcessor, str(folder))
    except ModelError as error:
        if 'torchvision' in str(error.__cause__).lower():
            return None
        raise


def _compare_picture(folder: Path, wanted: Processor, prompt: Conversation) -> Iterator[Finding]:
    inputs = inputs_of(wanted, prompt)
    try:
        joint = joint_processor(folder)
    except ModelError as error:
        yield Finding('wrong', 'processor', str(error))
        return
    if joint is None:
        why = 'AutoProcessor needs torchvision here, which is not installed; the image processor was asked alone'
        yield Finding('note', 'processor', why)
        yield from _compare_pixels(folder, wanted, prompt, inputs)
        return
    try:
        found = joint.apply_chat_template(
            _messages(prompt, as_parts=True),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors='pt',
        )
    except FAILURES as error:
        yield Finding('wrong', 'token ids', f'AutoProcessor cannot write a prompt with a picture: {reason_of(error)}')
        return
    ids = inputs['input_ids'][0].tolist()
    images = ids.count(wanted.image_token_id)
    label = f'AutoProcessor, {len(ids)} tokens of a question about a picture, {images} of them of the picture'
    yield _same('token ids', found['input_ids'][0].tolist(), ids, label)
    yield _same_pixels(found, inputs, wanted)


def _compare_pixels(
    folder: Path, wanted: Processor, prompt: Conversation, inputs: dict[str, Tensor]
) -> Iterator[Finding]:
    try:
        images = load_pretrained(AutoImageProcessor, str(folder), backend='pil')
        found = images(images=_pictures(prompt), return_tensors='pt')
    except (ModelError, *FAILURES) as error:
        yield Finding('wrong', 'pixels', f'AutoImageProcessor cannot be used: {reason_of(error)}')
        return
    yield _same_pixels(found, inputs, wanted)


def _same(what: str, found: list[int], wanted: list[int], label: str) -> Finding:
    if found == wanted:
        return Finding('ok', what, f'{label}: equal')
    pairs = zip(found, wanted, strict=False)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(found), len(wanted)))
    text = (
        f'{label}: the export gives {len(found)} tokens, other ones from place {place} on than in training; the files '
    )
    return Finding('wrong', what, text + 'of its tokenizer or chat template are not those of the training')


def _same_pixels(found: Any, inputs: dict[str, Tensor], wanted: Processor) -> Finding:
    names = [name for name in wanted.family.image_inputs if name in inputs and name in found]
    if not names:
        return Finding('wrong', 'pixels', f'the export makes none of {", ".join(wanted.family.image_inputs)}')
    for name in names:
        have, want = torch.as_tensor(found[name]), inputs[name]
        if have.shape != want.shape:
            shapes = f'{tuple(have.shape)} and in training {tuple(want.shape)}'
            return Finding(
                'wrong', 'pixels', f'{name} of a picture is {shapes}; preprocessor_config.json has other sizes'
            )
        if (away := float((have.double() - want.double()).abs().max())) > _PIXELS:
            return Finding('wrong', 'pixels', f'{name} of a picture is up to {away:.2g} away from that of the training')
    shapes = ', '.join(f'{name} {tuple(inputs[name].shape)}' for name in names)
    return Finding('ok', 'pixels', f'{shapes}: equal')


def _pictures(prompt: Conversation) -> list[Image.Image]:
    return [Image.open(BytesIO(ref.data or b'')).convert('RGB') for ref in prompt.images]


def _messages(prompt: Conversation, *, as_parts: bool) -> list[dict[str, Any]]:
    """The prompt as a server hands it to the processor: its pictures, then its text; of language models only text."""
    pictures = _pictures(prompt)
    (message,) = prompt.messages
    if not as_parts:
        return [dict(role='user', content=message.text)]
    content: list[dict[str, Any]] = [dict(type='image', image=picture) for picture in pictures]
    content.append(dict(type='text', text=message.text))
    return [dict(role='user', content=content)]
