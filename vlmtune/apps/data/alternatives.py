"""What other limits of tokens and pixels would cost."""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vlmtune.data import Processor
from vlmtune.data.packing import plan_packs
from vlmtune.structures import Conversation, ImagePart, ImageRef, ImageSize, Message, Sample, TextPart

_FACTORS = (0.25, 0.5, 1, 2)


@dataclass(frozen=True)
class Shape:
    """A sample without its content.

    Attributes:
        tokens: in all.
        patches: vision patches in all.
        image_tokens: those that stand for image features.
        sizes: of its images.
        weight: samples of an epoch that it stands for.
        planned: False for a sample that is too long for ``max_length`` as it is.
    """

    tokens: int
    patches: int
    image_tokens: int
    sizes: tuple[ImageSize, ...]
    weight: float
    planned: bool

    @classmethod
    def of(cls, sample: Sample, *, image_token: int | None, weight: float, planned: bool) -> 'Shape':
        """The shape of ``sample``."""
        images = 0 if image_token is None else int(np.count_nonzero(sample.input_ids == image_token))
        return cls(len(sample), sample.patches, images, sample.image_sizes, weight, planned)


@dataclass(frozen=True)
class Room:
    """What a pack takes; with ``batch_size``, batches of so many samples are made instead."""

    max_length: int  # tokens
    max_patches: int | None = None
    batch_size: int | None = None

    def takes(self, shape: Shape) -> bool:
        """Whether the sample can be used at all."""
        return shape.tokens <= self.max_length and (self.max_patches is None or shape.patches <= self.max_patches)


@dataclass(frozen=True)
class Alternative:
    """What an epoch would be with another value of a setting."""

    value: int
    tokens: int
    too_long: int  # samples
    packs: int  # or batches


@dataclass(frozen=True)
class Alternatives:
    """Other values of one setting; ``now`` is the one in use."""

    setting: str
    now: int
    values: list[Alternative]


def max_lengths(shapes: Sequence[Shape], *, room: Room) -> Alternatives:
    """Other values of ``max_length``.

    Args:
        shapes: of an epoch.
        room: as it is now.
    """
    values = [_cost(shapes, value, room=replace(room, max_length=value)) for value in _around(room.max_length)]
    return Alternatives('max_length', room.max_length, values)


def image_limits(shapes: Sequence[Shape], *, processor: Processor, room: Room) -> Iterator[Alternatives]:
    """Other values of the setting that limits an image's tokens; nothing where the family has none, or no image is.

    Args:
        shapes: of an epoch.
        processor: of the model.
        room: of a pack.
    """
    limit = _find_limit(processor)
    if limit is None or not any(shape.sizes for shape in shapes):
        return
    here = _image_costs(processor)
    values = []
    for value in _around(limit.now, step=limit.step):
        there = _image_costs(_with_settings(processor, limit.settings(value)))
        changed = []
        for shape in shapes:
            (tokens, patches), (new_tokens, new_patches) = here(shape.sizes), there(shape.sizes)
            tokens, patches = shape.tokens + new_tokens - tokens, shape.patches + new_patches - patches
            changed.append(replace(shape, tokens=tokens, patches=patches))
        values.append(_cost(changed, value, room=room))
    yield Alternatives(limit.setting, limit.now, values)


@dataclass(frozen=True)
class _Limit:
    setting: str
    now: int
    settings: Callable[[int], Mapping[str, Any]]  # attributes of the image processor, for a value
    step: int = 1


def _find_limit(processor: Processor) -> _Limit | None:
    """The setting of the family, with its value in use."""
    images, setting = processor.image_processor, processor.family.image_limit
    if setting is None:
        return None
    if setting in ('max_patches', 'max_slice_nums'):
        return _Limit(setting, int(getattr(images, setting)), lambda v: {setting: v})
    size = dict(images.size)  # also for max_pixels, which it calls the longest edge
    now = int(size['longest_edge'])
    if setting == 'max_pixels':
        least = int(size['shortest_edge'])
        return _Limit(setting, now, lambda v: dict(size={**size, 'longest_edge': v, 'shortest_edge': min(v, least)}))
    if not images.do_image_splitting:
        return None
    tile = int(images.max_image_size['longest_edge'])
    return _Limit(f'size.{setting}', now, lambda v: dict(size={**size, 'longest_edge': v}), step=tile)


def _with_settings(processor: Processor, settings: Mapping[str, Any]) -> Processor:
    """A processor that counts as if its image processor had these settings; it shares everything else."""
    changed = copy.copy(processor)
    changed.image_processor = copy.deepcopy(processor.image_processor)
    for name, value in settings.items():
        setattr(changed.image_processor, name, value)
    return changed


def _around(now: int, *, step: int = 1) -> list[int]:
    """The value in use and others, in multiples of ``step``, ascending."""
    return sorted({now if factor == 1 else max(1, round(now * factor / step)) * step for factor in _FACTORS})


def _image_costs(processor: Processor) -> Callable[[tuple[ImageSize, ...]], tuple[int, int]]:
    """Tokens and patches of a short conversation that shows images of the given sizes."""

    @functools.cache
    def costs(sizes: tuple[ImageSize, ...]) -> tuple[int, int]:
        shown = tuple(ImagePart(i) for i in range(len(sizes)))
        messages = (Message('user', (*shown, TextPart('x'))), Message('assistant', (TextPart('y'),)))
        conversation = Conversation(messages, images=(ImageRef(path='x'),) * len(sizes))
        sample = processor.tokenize(conversation, image_sizes=sizes)
        return len(sample), sample.patches

    return costs


def _cost(shapes: Sequence[Shape], value: int, *, room: Room) -> Alternative:
    fitting = [shape for shape in shapes if room.takes(shape)]
    samples = sum(shape.weight for shape in fitting)
    tokens = sum(shape.weight * shape.tokens for shape in fitting)
    if room.batch_size is not None:
        packs = -(-round(samples) // room.batch_size)
    elif fitting:
        lengths = np.array([shape.tokens for shape in fitting], dtype=np.int64)
        patches = np.array([shape.patches for shape in fitting], dtype=np.int64)
        plan = plan_packs(
            lengths, max_length=room.max_length, patches=patches, max_patches=room.max_patches, seed=0, epoch=0
        )
        packs = round(len(plan) * tokens / int(lengths.sum()))
    else:
        packs = 0
    return Alternative(value, round(tokens), round(sum(shape.weight for shape in shapes) - samples), packs)
