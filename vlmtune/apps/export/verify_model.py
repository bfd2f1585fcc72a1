"""``vlmtune verify-model``: loads a checkpoint strictly, asks it fixed questions, and prints what can be compared.

What cannot be told from names and shapes, such as the variant of an activation, shows in the answers of real weights:
the loss on plain sentences is far below that of chance only where everything is computed as it was trained.
"""

import hashlib
import io
import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from vlmtune.apps.export.options import base_dtype
from vlmtune.data import Processor
from vlmtune.evaluation import generate
from vlmtune.evaluation.generation import answering, encode_prompt, prompt_inputs
from vlmtune.layouts import find_layout, read_config
from vlmtune.models import load_model
from vlmtune.models.loading import DTYPES
from vlmtune.structures import IGNORE_INDEX, Conversation, ImageRef, Sample, user_message
from vlmtune.utils.device import named_device
from vlmtune.utils.errors import ConfigError, ModelError, first_line

SENTENCES = (
    'The capital of France is Paris, and the capital of Italy is Rome. Water boils at one hundred degrees Celsius.',
    'In spring the days grow longer, the snow melts in the mountains, and the birds come back from the south.',
)
QUESTION = 'What is the capital of France? Answer with one word.'
ABOUT_PICTURE = 'Describe this picture in one sentence.'
PICTURE = (448, 336)  # pixels, width and height
_NEW_TOKENS = 24
_TOP = 5
_SUSPICIOUS = 0.5  # of the loss of chance


@dataclass(frozen=True)
class Case:
    """What one fixed input gives.

    ``inputs`` are checksums of the inputs: equal wherever the same is asked, to the bit. The figures of the logits are
    equal up to rounding, which differs between machines; ``checksum`` is that of their float32 bits, which repeat on
    one machine.
    """

    name: str
    tokens: int
    image_tokens: int
    inputs: dict[str, str]
    logits: dict[str, float]
    checksum: str
    top: list[tuple[int, str, float]]
    answer: str


@dataclass(frozen=True)
class Verification:
    """All that was found of a checkpoint that loads.

    Attributes:
        layout: 'hf', or the name of the original layout.
        weights: tensors of the model.
        parameters: values in them.
        loss, chance: mean loss of a token in plain sentences, and that of a model that knows nothing.
        warnings: what looks wrong but may be right, as in an untrained model.
    """

    path: str
    family: str
    layout: str
    dtype: str
    weights: int
    parameters: int
    loss: float
    chance: float
    cases: list[Case]
    warnings: list[str] = field(default_factory=list)


def verify_model(
    path: str, *, dtype: str = 'float32', device: str = 'auto', output: Literal['text', 'json'] = 'text'
) -> None:
    """Load a checkpoint and print what it answers.

    Args:
        path: a folder or a hub id, in the layout of transformers or an original one.
        dtype: to compute in: 'float32', 'bfloat16', 'float16', or 'auto' for that of the checkpoint.
        device: 'cpu', 'cuda' or 'auto'.
        output: 'text' for people, or 'json' for one JSON document.

    Raises:
        UserError: a weight is missing, unknown or of another shape, the tokenizer lacks a token, the image tokens are
            not as many as the features, or a logit is not finite.
    """
    where = named_device(device)
    if dtype not in (*DTYPES, 'auto'):
        raise ConfigError(f'--dtype {dtype}: expected auto or one of {", ".join(DTYPES)}')
    found = verify(path, dtype=dtype, device=where)
    print(json.dumps(asdict(found), ensure_ascii=False) if output == 'json' else as_text(found))


@torch.no_grad()
def verify(path: str, *, dtype: str, device: torch.device) -> Verification:
    """See ``verify_model``."""
    config = read_config(path)
    processor = Processor(path)
    wanted = base_dtype(config) if dtype == 'auto' else DTYPES[dtype]
    model = load_model(path, dtype=wanted, refuse_unknown=True)[0].to(device)  # type: ignore[arg-type]
    state = model.state_dict()
    layout = find_layout(path)
    warnings: list[str] = []
    with answering(model):
        loss = _sentence_loss(model, processor)
        cases = [_case(model, processor, 'text', Conversation((user_message(QUESTION),)))]
        if processor.family.has_vision:
            cases += _picture_cases(model, processor, warnings)
    chance = math.log(model.get_input_embeddings().get_parameter('weight').shape[0])
    if loss > _SUSPICIOUS * chance:
        warnings.append(
            f'the loss on plain sentences is {loss:.3f}, that of chance is {chance:.3f}. A model that has only learned '
            "short answers, as the quickstart's, is like that: ask it what it was trained for (vlmtune chat). Of any "
            'other, the weights are untrained, or they are not computed with as they were trained'
        )
    return Verification(
        path=path,
        family=processor.family.model_type,
        layout='hf' if layout is None else layout.name,
        dtype=str(wanted).removeprefix('torch.'),
        weights=len(state),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        loss=loss,
        chance=chance,
        cases=cases,
        warnings=warnings,
    )


# ---- what is asked


def picture(*, inverted: bool = False) -> ImageRef:
    """A sky, a meadow, a sun and a red house, made of numbers: the same bits everywhere."""
    width, height = PICTURE
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[:] = (110, 170, 230)
    pixels[y > 0.6 * height] = (70, 150, 60)
    pixels[(x - 370) ** 2 + (y - 70) ** 2 < 40**2] = (250, 220, 60)
    pixels[(abs(x - 150) < 60) & (y > 150) & (y < 260)] = (190, 40, 40)
    pixels[(abs(x - 150) < 1.3 * (y - 90)) & (y > 90) & (y <= 150)] = (90, 50, 30)
    pixels = 255 - pixels if inverted else pixels
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, 'PNG')
    return ImageRef(data=file.getvalue())


def _picture_cases(model: PreTrainedModel, processor: Processor, warnings: list[str]) -> list[Case]:
    asked = (user_message(ABOUT_PICTURE, images=[0]),)
    one = _case(model, processor, 'picture', Conversation(asked, (picture(),)))
    other = _case(model, processor, 'inverted picture', Conversation(asked, (picture(inverted=True),)))
    if one.logits == other.logits:
        warnings.append('the logits do not feel what is on the picture: its features do not reach the language model')
    return [one, other]


# ---- what is measured


def _sentence_loss(model: PreTrainedModel, processor: Processor) -> float:
    """Mean loss of a token, of sentences without a chat template."""
    losses = []
    for sentence in SENTENCES:
        first = processor.tokenizer.bos_token_id
        start = np.array([] if first is None else [first], np.int32)
        ids = np.concatenate([start, processor.encode_text(sentence)])
        logits = logits_of(model, prompt_inputs(processor, [Sample(ids, np.full_like(ids, IGNORE_INDEX))]))
        following = torch.from_numpy(ids[1:]).long().to(logits.device)
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], following, reduction='none'))
    return float(torch.cat(losses).mean())


def _case(model: PreTrainedModel, processor: Processor, name: str, conversation: Conversation) -> Case:
    sample = encode_prompt(processor, conversation)
    inputs = prompt_inputs(processor, [sample])
    logits = logits_of(model, inputs).cpu()
    if not torch.isfinite(logits).all():
        raise ModelError(f'{name}: {int((~torch.isfinite(logits)).sum())} of {logits.numel()} logits are not finite')
    values, places = logits[-1].topk(min(_TOP, logits.shape[-1]))
    top = [
        (int(i), str(processor.tokenizer.convert_ids_to_tokens(int(i))), round(float(v), 4))
        for v, i in zip(values, places, strict=True)
    ]
    image_tokens = int((sample.input_ids == processor.image_token_id).sum()) if processor.family.has_vision else 0
    (answer,) = generate(model, processor, [conversation], max_new_tokens=_NEW_TOKENS)
    checksums = {key: _checksum(tensor) for key, tensor in inputs.items()}
    return Case(
        name=name,
        tokens=len(sample),
        image_tokens=image_tokens,
        inputs=checksums,
        logits=_figures(logits),
        checksum=_checksum(logits),
        top=top,
        answer=answer,
    )


def logits_of(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """float32[L, V] of one prompt.

    Args:
        model: of transformers.
        inputs: ``prompt_inputs`` of the prompt.

    Raises:
        ModelError: the model does not take the inputs, as with image tokens that are not as many as the features.
    """
    placed: dict[str, Any] = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    try:
        return model(**placed, use_cache=False).logits[0].float()
    except ValueError as error:
        raise ModelError(f'the model does not take its inputs: {first_line(error)}') from error


def _checksum(tensor: Tensor) -> str:
    values = tensor.cpu().contiguous().numpy()
    return hashlib.sha256(f'{values.dtype}{values.shape}'.encode() + values.tobytes()).hexdigest()[:16]


def _figures(logits: Tensor) -> dict[str, float]:
    exact = logits.double()
    figures = dict(
        mean=exact.mean(), deviation=exact.std(), lowest=exact.min(), highest=exact.max(), last=exact[-1].sum()
    )
    return {name: float(f'{float(value):.6g}') for name, value in figures.items()}


# ---- what is shown


def as_text(found: Verification) -> str:
    """Lines for people."""
    lines = [
        f'{found.path}: {found.family}, layout {found.layout}; {found.weights} weights, {found.parameters:,} values, '
        'none missing, unknown or of another shape',
        f'loss of a token in plain sentences: {found.loss:.4f} ({found.dtype}; chance: {found.chance:.4f})',
    ]
    for case in found.cases:
        images = f', {case.image_tokens} of them of the image' if case.image_tokens else ''
        lines += [
            f'{case.name}: {case.tokens} tokens{images}',
            '  inputs  ' + ' '.join(f'{name}={value}' for name, value in case.inputs.items()),
            f'  logits  {case.checksum} ' + ' '.join(f'{name}={value:.6g}' for name, value in case.logits.items()),
            '  next    ' + ' '.join(f'{token!r}={value:.4f}' for _, token, value in case.top),
            f'  answer  {case.answer!r}',
        ]
    return '\n'.join([*lines, *(f'warning: {warning}' for warning in found.warnings)])
