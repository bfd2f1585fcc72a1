"""Writes the files from which other programs rebuild the processor that a model was trained with."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmtune.data.templates import JOINT_TEMPLATES
from vlmtune.utils.json_files import write_json

if TYPE_CHECKING:
    from vlmtune.data.processor import Processor

# Files of the source that describe how text and images are joined; other programs look for all of them.
JOINT_FILE = 'processor_config.json'
JOINT_TEMPLATE_FILE = 'chat_template.json'  # read before chat_template.jinja by AutoProcessor, and not by AutoTokenizer
IMAGE_FILE = 'preprocessor_config.json'
_COPIED_FILES = ('video_preprocessor_config.json',)
SOURCE_FILES = (JOINT_FILE, IMAGE_FILE, *_COPIED_FILES)
"""What a processor has to remember of the files that it was read from, to write them again."""


def save_processor_files(processor: 'Processor', directory: Path) -> None:
    """Write tokenizer, chat template and image processor, with the settings that were used.

    ``preprocessor_config.json`` is written as well as ``processor_config.json``: older consumers read only the former.
    """
    directory.mkdir(parents=True, exist_ok=True)
    processor.tokenizer.save_pretrained(directory)
    if processor.image_processor is None:
        return
    if template := JOINT_TEMPLATES.get(processor.tokenizer.chat_template):
        write_json(directory / JOINT_TEMPLATE_FILE, {'chat_template': template})
    joint = copy.deepcopy(processor.source_files[JOINT_FILE])
    source_image = processor.source_files[IMAGE_FILE] or {}
    image = json.loads(processor.image_processor.to_json_string())
    processor_class = source_image.get('processor_class') or (joint or {}).get('processor_class')
    if processor_class:
        image['processor_class'] = processor_class
    write_json(directory / IMAGE_FILE, image)
    if joint is not None:
        if 'image_processor' in joint:
            joint['image_processor'] = image
        joint.pop('chat_template', None)
        write_json(directory / JOINT_FILE, joint)
    for name in _COPIED_FILES:
        if (content := processor.source_files[name]) is not None:
            write_json(directory / name, content)


def stored_image_settings(source_files: Mapping[str, Mapping[str, Any] | None]) -> dict[str, Any]:
    """What the files of a model say of its image processor, of ``SOURCE_FILES``."""
    joint = source_files[JOINT_FILE] or {}
    inside = joint.get('image_processor')
    files = (joint, inside if isinstance(inside, Mapping) else {}, source_files[IMAGE_FILE] or {})
    return {name: value for content in files for name, value in content.items() if value is not None}
