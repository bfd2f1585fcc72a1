"""Whether a tokenizer knows the tokens that its family writes around messages and images."""

import re
from typing import TYPE_CHECKING

from vlmtune.structures import Conversation, ImageRef, ImageSize, user_message
from vlmtune.utils.errors import DataError, ModelError
from vlmtune.utils.imports import import_name

if TYPE_CHECKING:
    from vlmtune.data.processor import Processor

_OF_TEMPLATES = re.compile(r'<\|[^<>|\s]+\|>')  # MiniCPM writes <AI> as plain text, so only what is surely a token
# Of numbered ones only the first: there are as many rows and columns as the tokenizer's makers wanted.
_OF_IMAGES = re.compile(r'</?(?:[^<>/\s\d]|(?<!\d)1(?!\d))+>')
_SIZE = ImageSize(height=2000, width=3000)  # large, so that an image is cut where images are cut


def check_special_tokens(processor: 'Processor', *, own_template: bool = True) -> None:
    """Raise unless the tokens of the chat template and those around images are one token each.

    A tokenizer that lacks one reads it as a handful of letters, and nobody is told.

    Args:
        processor: complete.
        own_template: the chat template is that of the model or its family; one that a config names may be plain text
            to a model.

    Raises:
        ModelError: a token is missing; the first is named.
    """
    written = _around_images(processor) | (_in_template(processor) if own_template else set())
    lacking = sorted(text for text in written if len(processor.encoder.template_ids(text)) != 1)
    if lacking:
        raise ModelError(
            f'{processor.source}: the tokenizer (tokenizer.json or tokenizer.model, added_tokens) lacks {len(lacking)} '
            f'special tokens of {processor.family.model_type} (first: {lacking[0]}); take the tokenizer '
            'files that belong to the model'
        )


def _in_template(processor: 'Processor') -> set[str]:
    if not processor.tokenizer.chat_template:
        return set()
    images = (ImageRef(path='x'),) if processor.family.has_vision else ()
    question = user_message('x', images=range(len(images)))
    try:
        rendered = processor.renderer.render(Conversation((question,), images), add_generation_prompt=True)
    except DataError:  # it wants other turns, and says so when it gets a conversation
        return set()
    return set(_OF_TEMPLATES.findall(rendered.text))


def _around_images(processor: 'Processor') -> set[str]:
    if not processor.family.has_vision:
        return set()
    image = processor.image_token_id
    token = processor.tokenizer.convert_ids_to_tokens(image) if image < len(processor.tokenizer) else None
    known = {*processor.tokenizer.all_special_tokens, *processor.tokenizer.get_added_vocab()}
    if token not in known:
        raise ModelError(
            f'{processor.source}: config.json says that token {image} stands for images (image_token_id), which the '
            f'tokenizer of {len(processor.tokenizer)} tokens has as {token!r}; the two belong to different models'
        )
    try:
        runs = import_name(str(processor.family.placeholder))(processor, _SIZE, images=1).runs
    except AttributeError as error:  # of a token that the tokenizer knows by a name
        raise ModelError(
            f'{processor.source}: tokenizer_config.json or processor_config.json lacks a key that '
            f'{processor.family.model_type} needs ({error}); take the files that belong to the model'
        ) from error
    return {found for text, _ in runs for found in _OF_IMAGES.findall(text)}
