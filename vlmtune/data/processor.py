"""Tokenizer, image processor and the family's placeholder arithmetic, as one object.

The processors of transformers need torchvision for several families, decode pixels to count tokens, and read user text
as control tokens. This one is built from ``AutoTokenizer`` and ``AutoImageProcessor`` alone, counts from sizes, and
keeps user text text.

Letters: L tokens, I images.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer

from vlmtune.data.boxes import write_boxes
from vlmtune.data.encoding import TextEncoder
from vlmtune.data.image_settings import check_image_settings, check_model_sizes
from vlmtune.data.new_tokens import add_new_tokens, add_special_tokens
from vlmtune.data.pixels import find_pixel_function, pixel_affine
from vlmtune.data.placeholders import ImageTokens
from vlmtune.data.processor_files import JOINT_FILE, SOURCE_FILES, save_processor_files, stored_image_settings
from vlmtune.data.rendering import ChatRenderer
from vlmtune.data.templates import find_template
from vlmtune.data.token_check import check_special_tokens
from vlmtune.families import Family, find_family
from vlmtune.layouts import find_source, native_view, read_config
from vlmtune.ops import finish_images
from vlmtune.registry import PROCESSORS
from vlmtune.structures import IGNORE_INDEX, Conversation, ImageSize, Message, Sample, TextPart, user_message
from vlmtune.utils.errors import ConfigError, DataError, ModelError
from vlmtune.utils.imports import import_name
from vlmtune.utils.pretrained import load_pretrained, read_source_json


@PROCESSORS.register_module()
class Processor:
    """Turns conversations into tokens and images into tensors, for one model.

    Args:
        pretrained_model_name_or_path: a folder, a hub id, or the parts of a LLaVA, see ``layouts.llava_parts``.
        prompt_template: name of a template in ``vlmtune.data.templates``; None keeps the model's own.
        image_processor: settings of the image processor that differ from the checkpoint's, for example
            ``dict(max_pixels=1280 * 28 * 28)``; they reach training, checkpoint and export alike.
        special_tokens: control tokens that the tokenizer shall know: texts cannot hold them, answers do not show them.
            The model's embeddings grow by those that are new.
        new_tokens: the same for tokens that texts may hold and answers show, such as '<table_begin>'.
        trust_remote_code: run the Python files of the model, see docs/security.md.
        revision: of a hub id; a commit where its code is run.

    Raises:
        ModelError: the model is not found or its family is not supported.
        ConfigError: an unknown template or image processor setting, or a new token that cannot be one.
    """

    def __init__(
        self,
        pretrained_model_name_or_path: str | Mapping[str, Any],
        *,
        prompt_template: str | None = None,
        image_processor: Mapping[str, Any] | None = None,
        special_tokens: Sequence[str] = (),
        new_tokens: Sequence[str] = (),
        trust_remote_code: bool = False,
        revision: str | None = None,
    ) -> None:
        self.source, self.revision = find_source(pretrained_model_name_or_path), revision
        self.config = read_config(self.source, trust_remote_code=trust_remote_code, revision=revision)
        self.family: Family = find_family(self.config.model_type)
        load = partial(load_pretrained, trust_remote_code=trust_remote_code, revision=revision)
        with native_view(self.source, revision=revision) as files:
            self.tokenizer = load(AutoTokenizer, files)
            self.source_files = {name: read_source_json(files, name, revision=revision) for name in SOURCE_FILES}
            self.image_processor = self._load_image_processor(partial(load, name_or_path=files), image_processor or {})
        self.joint_settings = self.source_files[JOINT_FILE] or {}
        self.special_tokens = add_special_tokens(self.tokenizer, special_tokens)
        self.new_tokens = add_new_tokens(self.tokenizer, new_tokens)
        own_template = prompt_template is None
        if own_template and not self.tokenizer.chat_template:
            prompt_template = self.family.prompt_template
        if prompt_template is not None:
            self.tokenizer.chat_template = find_template(prompt_template)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if self.tokenizer.pad_token_id is None:
            raise ModelError(
                f'{pretrained_model_name_or_path}: tokenizer_config.json has neither pad_token nor eos_token, so that '
                'nothing can end or fill a row; copy it from where the model comes from'
            )
        self._count_tokens: Any = import_name(self.family.placeholder) if self.family.placeholder else None
        self._make_pixels = find_pixel_function(self.family, self.image_processor)
        self.renderer = ChatRenderer(
            self.tokenizer,
            as_parts=self.family.has_vision,
            image_text=self.family.image_text,
            closes_answers=self.family.closes_answers,
        )
        self.encoder = TextEncoder(
            self.tokenizer,
            image_token=self.image_token_id if self.family.has_vision else None,
            words=self.family.words,
        )
        check_special_tokens(self, own_template=own_template)

    def _load_image_processor(self, load_class: Callable[..., Any], settings: Mapping[str, Any]) -> Any:
        if not self.family.has_vision:
            if settings:
                raise ConfigError(f'{self.source} is a text model, but image_processor={settings} was set; remove it')
            return None
        own = self.family.image_processor
        # Where the image processor has two versions, Pillow's: torchvision's pixels are others.
        backend = {'backend': 'pil'} if self.family.pixels and own is None else {}
        load = partial(load_class, AutoImageProcessor if own is None else import_name(own), **backend)
        check = partial(check_image_settings, settings=settings, source=str(self.source))
        check({**stored_image_settings(self.source_files), **settings})
        loaded = load()
        known = {*loaded.valid_kwargs.__annotations__, *loaded.to_dict()}
        if unknown := sorted(set(settings) - known):
            raise ConfigError(
                f'image_processor: unknown settings {unknown}; {type(loaded).__name__} knows {sorted(known)}'
            )
        settings = {**dict(self.family.image_settings), **settings}
        changed = load(**copy.deepcopy(settings)) if settings else loaded  # it writes into them
        check(changed.to_dict())
        size = settings.get('size')
        if isinstance(size, Mapping) and any(changed.size.get(name) != value for name, value in size.items()):
            raise ConfigError(
                f'image_processor: size={size} has no effect, the checkpoint stores min_pixels and '
                'max_pixels; set those instead'
            )
        check_model_sizes(changed, settings, vision=self.config.vision_config)
        return changed

    @property
    def added_tokens(self) -> tuple[str, ...]:
        """The tokens that the model has no embeddings for yet: ``new_tokens`` and ``special_tokens``."""
        return (*self.new_tokens, *self.special_tokens)

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
        conversation = write_boxes(conversation, processor=self, image_sizes=image_sizes)
        rendered = self.renderer.render(conversation, add_generation_prompt=add_generation_prompt)
        ids, starts, ends = self.encoder.encode(rendered)
        labels = np.full(len(ids), IGNORE_INDEX, dtype=np.int32)
        for index, span in rendered.answers.items():
            if learned is None or index in learned:
                inside = (starts < span.end) & (ends > span.start)
                labels[inside] = ids[inside]
        ids, labels, patches = self._expand(ids, labels, sizes=image_sizes)
        return Sample(ids, labels, images=conversation.images, image_sizes=tuple(image_sizes), patches=patches)

    def encode_text(self, text: str) -> np.ndarray:
        """Token ids int32[L] of plain text: no special token is added, control tokens in it stay text."""
        return self.encoder.literal_ids(text)

    def _expand(
        self, ids: np.ndarray, labels: np.ndarray, *, sizes: Sequence[ImageSize]
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """Ids and labels with every image at its full length, and the patches of all images."""
        if not self.family.has_vision:
            return ids, labels, 0
        markers = np.flatnonzero(ids == self.image_token_id)
        if len(markers) != len(sizes):
            raise DataError(f'the chat template shows {len(markers)} images but the conversation has {len(sizes)}')
        new_ids: list[np.ndarray] = []
        new_labels: list[np.ndarray] = []
        at = patches = 0
        for marker, size in zip(markers.tolist(), sizes, strict=True):
            tokens: ImageTokens = self._count_tokens(self, size, images=len(sizes))
            image = np.concatenate([np.tile(self.encoder.template_ids(text), times) for text, times in tokens.runs])
            patches += tokens.patches
            new_ids += [ids[at:marker], image]
            new_labels += [labels[at:marker], np.full(len(image), IGNORE_INDEX, np.int32)]
            at = marker + 1
        return np.concatenate([*new_ids, ids[at:]]), np.concatenate([*new_labels, labels[at:]]), patches

    def token_types(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """``token_type_ids`` long[L] of one sample, for families that attend by them; nothing for the others.

        Args:
            input_ids: long[L].
            labels: long[L]; where there are some, the answer is.
        """
        if self.family.token_types is None:
            return {}
        is_one = input_ids == self.image_token_id if self.family.token_types == 'image' else labels != IGNORE_INDEX
        return {'token_type_ids': is_one.long()}

    # ---- images

    def image_inputs(self, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        """The tensors of the family's image inputs for all images of one sample, in the order they are shown.

        Those of several samples are joined by ``collate.join_images``.

        Returns:
            ``family.image_inputs``, for example pixel_values float[P, D] and image_grid_thw long[I, 3].
        """
        return finish_images(self.image_bytes(images), frames=getattr(self.image_processor, 'temporal_patch_size', 1))

    def image_bytes(self, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        """``image_inputs`` in the form that data loading carries.

        Returns:
            where the family has a function for it, pixel_bytes and pixel_affine (see ``ops.pixels``) in place of
            pixel_values.
        """
        if not images:
            return {}
        if self._make_pixels is not None:
            return {
                **self._make_pixels(self.image_processor, images),
                'pixel_affine': pixel_affine(self.image_processor),
            }
        by_sample = {'pixel_attention_mask', 'batch_num_images'} & set(self.family.image_inputs)
        grouped = [list(images)] if by_sample else list(images)
        features = self.image_processor(images=grouped, return_tensors='pt')
        return {name: features[name] for name in self.family.image_inputs if name in features}

    def save(self, directory: str | Path) -> None:
        """Write tokenizer, chat template and image processor settings, as they were used."""
        save_processor_files(self, Path(directory))

    def stop_token_ids(self, from_model: int | Sequence[int] | None = None) -> list[int]:
        """Tokens that end an answer: the model's, the tokenizer's, and the one the chat template closes a turn with."""
        ids = {from_model} if isinstance(from_model, int) else set(from_model or ())
        probe = Conversation((user_message('x'), Message('assistant', (TextPart('y'),))))
        labels = self.tokenize(probe).labels
        ids.add(int(labels[labels != IGNORE_INDEX][-1]))
        if self.tokenizer.eos_token_id is not None:
            ids.add(self.tokenizer.eos_token_id)
        return sorted(ids)
