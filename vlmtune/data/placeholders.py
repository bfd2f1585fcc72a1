"""What one image becomes in the token sequence, from its size alone.

Each function takes the processor and the size of an image and returns runs: a text and how often it is repeated. The
text takes the place of the family's image marker in the rendered chat template. The counts are the image processors'
own arithmetic; tests compare the expansion with transformers' processors.
"""

from typing import TYPE_CHECKING, TypeAlias

from vlmtune.structures import ImageSize
from vlmtune.utils.errors import ConfigError, DataError

if TYPE_CHECKING:
    from vlmtune.data.processor import Processor

Runs: TypeAlias = list[tuple[str, int]]


def _image_token(processor: 'Processor') -> str:
    return str(processor.tokenizer.convert_ids_to_tokens(processor.image_token_id))


def patch_grid(processor: 'Processor', size: ImageSize) -> Runs:
    """Qwen-VL: one token per merged patch; the vision markers around it come from the chat template.

    Raises:
        DataError: the image is more than 200 times as long as wide.
    """
    try:
        patches = processor.image_processor.get_number_of_image_patches(size.height, size.width, {})
    except ValueError as error:
        raise DataError(f'an image of {size.width}x{size.height} pixels cannot be used: {error}') from error
    return [(_image_token(processor), patches // processor.image_processor.merge_size**2)]


def fixed_grid(processor: 'Processor', size: ImageSize) -> Runs:
    """LLaVA-1.5: the same number for every image, whatever its size."""
    image_processor, config, joint = processor.image_processor, processor.config, processor.joint_settings
    target = image_processor.crop_size if image_processor.do_center_crop else image_processor.size
    if not target.get('height') or not target.get('width'):
        raise ConfigError(
            f'image_processor: size={dict(target)} does not make images of one size; set height and width'
        )
    patch = joint.get('patch_size') or config.vision_config.patch_size
    strategy = joint.get('vision_feature_select_strategy') or config.vision_feature_select_strategy
    with_class_token = config.vision_config.model_type == 'clip_vision_model'
    extra = joint.get('num_additional_image_tokens', int(with_class_token))
    count = (target['height'] // patch) * (target['width'] // patch) + extra - (strategy == 'default')
    return [(_image_token(processor), count)]


def tiles(processor: 'Processor', size: ImageSize) -> Runs:
    """InternVL: as many tiles as fit the aspect ratio, and a thumbnail."""
    image_processor = processor.image_processor
    count = image_processor.get_number_of_image_patches(
        size.height, size.width, {'crop_to_patches': image_processor.crop_to_patches}
    )
    per_tile = processor.joint_settings.get('image_seq_length') or processor.config.image_seq_length
    tokenizer = processor.tokenizer
    return [
        (tokenizer.start_image_token, 1),
        (_image_token(processor), per_tile * count),
        (tokenizer.end_image_token, 1),
    ]


def rows_and_columns(processor: 'Processor', size: ImageSize) -> Runs:
    """Idefics3 and SmolVLM: marked tiles row by row, then the whole image."""
    _, rows, columns = processor.image_processor.get_number_of_image_patches(size.height, size.width, {})
    vision = processor.config.vision_config
    from_config = (vision.image_size // vision.patch_size) ** 2 // processor.config.scale_factor**2
    per_tile = processor.joint_settings.get('image_seq_len') or from_config
    fake, image = '<fake_token_around_image>', _image_token(processor)
    runs: Runs = []
    for row in range(rows):
        for column in range(columns):
            runs += [(f'{fake}<row_{row + 1}_col_{column + 1}>', 1), (image, per_tile)]
        runs.append(('\n' if row + 1 < rows else '\n\n', 1))
    return [*runs, (f'{fake}<global-img>', 1), (image, per_tile), (fake, 1)]
