"""Tokenizer, image processor and the family's placeholder arithmetic, as one object.

The processors of transformers need torchvision for several families, decode pixels to count tokens, and read user text
as control tokens. This one is built from ``AutoTokenizer`` and ``AutoImageProcessor`` alone, counts from sizes, and
keeps user text text.

Letters: L tokens, I images.
"""

import copy
import importlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

from vlmtune.data.processor_files import JOINT_FILE, read_source_json, save_processor_files
from vlmtune.data.rendering import ChatRenderer, Rendered, Span
from vlmtune.data.templates import find_template
from vlmtune.families import Family, find_family
from vlmtune.registry import PROCESSORS
from vlmtune.structures import IGNORE_INDEX, Conversation, ImageSize, Message, Sample, TextPart
from vlmtune.utils.errors import ConfigError, DataError, ModelError
from vlmtune.utils.pretrained import load_pretrained

logger = logging.getLogger(__name__)


@PROCESSORS.register_module()
class Processor:
    """Turns conversations into tokens and images into tensors, for one model.

    Args:
        pretrained_model_name_or_path: a folder or a hub id.
        prompt_template: name of a template in ``vlmtune.data.templates``; None keeps the model's own.
        image_processor: settings of the image processor that differ from the checkpoint's, for example
            ``dict(max_pixels=1280 * 28 * 28)``; they reach training, checkpoint and export alike.
        special_tokens: tokens that the tokenizer shall know; the model's embeddings grow by those that are new.

    Raises:
        ModelError: the model is not found or its family is not supported.
        ConfigError: an unknown template or image processor setting.
    """

    def __init__(
        self,
        pretrained_model_name_or_path: str,
        *,
        prompt_template: str | None = None,
        image_processor: Mapping[str, Any] | None = None,
        special_tokens: Sequence[str] = (),
    ) -> None:
        self.source = pretrained_model_name_or_path
        self.config = load_pretrained(AutoConfig, self.source)
        self.family: Family = find_family(self.config.model_type)
        self.tokenizer = load_pretrained(AutoTokenizer, self.source)
        self.special_tokens = tuple(token for token in special_tokens if token not in self.tokenizer.get_vocab())
        self.tokenizer.add_special_tokens(
            {'additional_special_tokens': list(special_tokens)}, replace_extra_special_tokens=False
        )
        if prompt_template is not None:
            self.tokenizer.chat_template = find_template(prompt_template)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.joint_settings = read_source_json(self.source, JOINT_FILE) or {}
        self.image_processor = self._load_image_processor(dict(image_processor or {}))
        self.renderer = ChatRenderer(self.tokenizer, as_parts=self.family.has_vision)
        self._control_ids = {*self.tokenizer.all_special_ids, *self.tokenizer.get_added_vocab().values()}
        self._known_ids: dict[str, np.ndarray] = {}

    def _load_image_processor(self, settings: dict[str, Any]) -> Any:
        if not self.family.has_vision:
            if settings:
                raise ConfigError(f'{self.source} is a text model, but image_processor={settings} was set; remove it')
            return None
        loaded = load_pretrained(AutoImageProcessor, self.source)
        known = {*loaded.valid_kwargs.__annotations__, *loaded.to_dict()}
        if unknown := sorted(set(settings) - known):
            raise ConfigError(
                f'image_processor: unknown settings {unknown}; {type(loaded).__name__} knows {sorted(known)}'
            )
        logger.info('images go through %s, text through %s', type(loaded).__name__, type(self.tokenizer).__name__)
        settings = {**dict(self.family.image_settings), **settings}
        if not settings:
            return loaded
        changed = load_pretrained(AutoImageProcessor, self.source, **copy.deepcopy(settings))  # it writes into them
        if 'size' in settings and any(changed.size.get(name) != value for name, value in settings['size'].items()):
            raise ConfigError(
                f'image_processor: size={settings["size"]} has no effect, the checkpoint stores min_pixels and '
                'max_pixels; set those instead'
            )
        return changed

    @property
    def image_token_id(self) -> int:
        """The token that stands for image features."""
        token = self.config.image_token_id
        if token is None:
            raise ModelError(f'{self.source}: config.json has no image_token_id')
        return int(token)

    # ---- tokens

    def tokenize(
        self,
        conversation: Conversation,
        *,
        image_sizes: Sequence[ImageSize] = (),
        learned: Sequence[int] | None = None,
        add_generation_prompt: bool = False,
    ) -> Sample:
        """Tokens and labels of a conversation, image placeholders expanded.

        Args:
            conversation: what to tokenise.
            image_sizes: one per image of the conversation.
            learned: indices of the messages to learn; None means every assistant message.
            add_generation_prompt: end with the prompt that makes the model answer.

        Raises:
            DataError: the chat template and the conversation do not fit, or images and markers differ in number.
        """
        if conversation.images and not self.family.has_vision:
            raise DataError(f'has {len(conversation.images)} images, but {self.source} is a text model')
        rendered = self.renderer.render(conversation, add_generation_prompt=add_generation_prompt)
        ids, starts, ends = self._encode(rendered)
        labels = np.full(len(ids), IGNORE_INDEX, dtype=np.int32)
        for index, span in rendered.answers.items():
            if learned is None or index in learned:
                inside = (starts < span.end) & (ends > span.start)
                labels[inside] = ids[inside]
        ids, labels = self._expand(ids, labels, sizes=image_sizes)
        return Sample(ids, labels, images=conversation.images, image_sizes=tuple(image_sizes))

    def encode_text(self, text: str) -> np.ndarray:
        """Token ids int32[L] of plain text: no special token is added, control tokens in it stay text."""
        return np.array(self._encode_literally(text), dtype=np.int32)

    def _encode(self, rendered: Rendered) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Token ids and the characters [start, end) they stand for; the way the family's own processor does it."""
        pieces = self._tokenizer_pieces(rendered.text, 0, special=self._adds_special(rendered.text))
        if literal := self._spans_with_control_tokens(pieces, rendered.contents):
            pieces = self._encode_around(rendered.text, literal)
        ids, starts, ends = zip(*pieces, strict=True) if pieces else ((), (), ())
        return np.array(ids, np.int32), np.array(starts, np.int64), np.array(ends, np.int64)

    def _adds_special(self, text: str) -> bool:
        """Image families' processors let the tokenizer add BOS unless the template wrote it; text models never do."""
        bos = self.tokenizer.bos_token
        return self.family.has_vision and not (bos and text.startswith(bos))

    def _tokenizer_pieces(self, text: str, offset: int, *, special: bool) -> list[tuple[int, int, int]]:
        encoded = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        offsets = encoded['offset_mapping']
        return [(i, a + offset, b + offset) for i, (a, b) in zip(encoded['input_ids'], offsets, strict=True)]

    def _spans_with_control_tokens(self, pieces: list[tuple[int, int, int]], contents: Sequence[Span]) -> list[Span]:
        """The texts in which the tokenizer found a control token, or a part of one that goes on in the next text."""
        found = [(start, end) for token, start, end in pieces if token in self._control_ids and end > start]
        return [span for span in contents if any(start < span.end and end > span.start for start, end in found)]

    def _encode_around(self, text: str, literal: Sequence[Span]) -> list[tuple[int, int, int]]:
        """The slow way: the texts in ``literal`` are tokenised alone, specials switched off."""
        pieces, at = [], 0
        special = self._adds_special(text)
        for span in literal:
            pieces += self._tokenizer_pieces(text[at : span.start], at, special=special)
            pieces += [(token, span.start, span.end) for token in self._encode_literally(text[span.start : span.end])]
            at, special = span.end, False
        return pieces + self._tokenizer_pieces(text[at:], at, special=special)

    def _encode_literally(self, text: str) -> list[int]:
        ids = list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)['input_ids'])
        if found := [token for token in ids if token == self._image_token_or_none]:
            raise DataError(
                f'the text holds {len(found)} image tokens that the tokenizer cannot write as text; remove them'
            )
        return ids

    @property
    def _image_token_or_none(self) -> int | None:
        return self.image_token_id if self.family.has_vision else None

    def _template_ids(self, text: str) -> np.ndarray:
        if text not in self._known_ids:
            self._known_ids[text] = np.array(self.tokenizer(text, add_special_tokens=False)['input_ids'], np.int32)
        return self._known_ids[text]

    def _expand(
        self, ids: np.ndarray, labels: np.ndarray, *, sizes: Sequence[ImageSize]
    ) -> tuple[np.ndarray, np.ndarray]:
        if not self.family.has_vision:
            return ids, labels
        markers = np.flatnonzero(ids == self.image_token_id)
        if len(markers) != len(sizes):
            raise DataError(f'the chat template shows {len(markers)} images but the conversation has {len(sizes)}')
        new_ids: list[np.ndarray] = []
        new_labels: list[np.ndarray] = []
        at = 0
        for marker, size in zip(markers.tolist(), sizes, strict=True):
            image = self._placeholder_ids(size)
            new_ids += [ids[at:marker], image]
            new_labels += [labels[at:marker], np.full(len(image), IGNORE_INDEX, np.int32)]
            at = marker + 1
        return np.concatenate([*new_ids, ids[at:]]), np.concatenate([*new_labels, labels[at:]])

    def _placeholder_ids(self, size: ImageSize) -> np.ndarray:
        module, _, name = str(self.family.placeholder).rpartition('.')
        runs = getattr(importlib.import_module(module), name)(self, size)
        return np.concatenate([np.tile(self._template_ids(text), times) for text, times in runs])

    # ---- images

    def image_inputs(self, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        """The tensors of the family's image inputs for all images of a batch, in the order they are shown.

        Returns:
            ``family.image_inputs``, for example pixel_values float[P, D] and image_grid_thw long[I, 3].
        """
        if not images:
            return {}
        grouped = [list(images)] if 'pixel_attention_mask' in self.family.image_inputs else list(images)
        features = self.image_processor(images=grouped, return_tensors='pt')
        return {name: features[name] for name in self.family.image_inputs if name in features}

    def save(self, directory: str | Path) -> None:
        """Write tokenizer, chat template and image processor settings, as they were used."""
        save_processor_files(self, Path(directory))

    def stop_token_ids(self, from_model: int | Sequence[int] | None = None) -> list[int]:
        """Tokens that end an answer: the model's, the tokenizer's, and the one the chat template closes a turn with."""
        ids = {from_model} if isinstance(from_model, int) else set(from_model or ())
        probe = Conversation((Message('user', (TextPart('x'),)), Message('assistant', (TextPart('y'),))))
        labels = self.tokenize(probe).labels
        ids.add(int(labels[labels != IGNORE_INDEX][-1]))
        if self.tokenizer.eos_token_id is not None:
            ids.add(self.tokenizer.eos_token_id)
        return sorted(ids)
