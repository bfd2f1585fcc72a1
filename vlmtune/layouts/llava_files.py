"""The files of a LLaVA from parts: config, tokenizer, chat template and image processor, made of those of its parts."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken
from transformers import AutoImageProcessor, AutoTokenizer, LlavaConfig, PreTrainedConfig, PreTrainedTokenizerBase

from vlmtune.families import find_family
from vlmtune.layouts.view import native_view, read_config
from vlmtune.utils.errors import ConfigError, ModelError
from vlmtune.utils.json_files import write_json
from vlmtune.utils.pretrained import load_pretrained, read_source_json

if TYPE_CHECKING:
    from vlmtune.layouts.llava_parts import LlavaParts

IMAGE_TOKEN = '<image>'
_TOWERS = {'clip': 'clip_vision_model', 'siglip': 'siglip_vision_model'}
_ROWS = 64  # embeddings grow to a multiple of it, which matrix units and tensor parallelism like
_IMAGE_SETTINGS = (
    'do_resize', 'size', 'resample', 'do_center_crop', 'crop_size', 'do_rescale', 'rescale_factor', 'do_normalize',
    'image_mean', 'image_std',
)  # fmt: skip
# A language model's own template takes contents as strings: parts become one, an image its mark and a line break.
_FLATTEN = (
    '{%- set flat = namespace(messages=[]) -%}'
    '{%- for m in messages -%}'
    "{%- if m['content'] is string -%}{%- set flat.messages = flat.messages + [m] -%}"
    "{%- else -%}{%- set text = namespace(all='') -%}"
    "{%- for p in m['content'] -%}"
    "{%- if p['type'] == 'image' -%}{%- set text.all = text.all + '<image>\\n' -%}"
    "{%- else -%}{%- set text.all = text.all + p['text'] -%}{%- endif -%}"
    '{%- endfor -%}'
    "{%- set flat.messages = flat.messages + [{'role': m['role'], 'content': text.all}] -%}{%- endif -%}"
    '{%- endfor -%}'
    '{%- set messages = flat.messages -%}'
)


def write_files(parts: 'LlavaParts', folder: Path) -> LlavaConfig:
    """Write tokenizer, chat template, image processor and generation config; returns the config of the model.

    Args:
        parts: what it is made of.
        folder: to write into.

    Raises:
        ModelError: a part cannot be read, or is none that a LLaVA can be made of.
        ConfigError: the vision encoder has no such layer, or no class token to leave out.
    """
    text, vision = _text_config(parts.llm_name_or_path), _vision_config(parts.visual_encoder_name_or_path)
    with native_view(parts.llm_name_or_path) as files:
        tokenizer = load_pretrained(AutoTokenizer, files)
    tokenizer.add_special_tokens(
        {'additional_special_tokens': [AddedToken(IMAGE_TOKEN, normalized=False, special=True)]},
        replace_extra_special_tokens=False,
    )
    if tokenizer.chat_template:
        tokenizer.chat_template = _FLATTEN + tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    config = _llava_config(parts, text=text, vision=vision, tokenizer=tokenizer)
    write_json(folder / 'preprocessor_config.json', _image_settings(parts, side=vision.image_size))
    write_json(folder / 'processor_config.json', _joint_settings(config))
    if (generation := read_source_json(parts.llm_name_or_path, 'generation_config.json')) is not None:
        write_json(folder / 'generation_config.json', generation)
    return config


def _text_config(name_or_path: str) -> PreTrainedConfig:
    config = read_config(name_or_path)
    try:
        family = find_family(config.model_type)
    except ModelError as error:
        raise ModelError(f'llm_name_or_path: {name_or_path}: {error}') from None
    if family.auto_class != 'causal_lm':
        raise ModelError(
            f'llm_name_or_path: {name_or_path} is a {family.model_type}, which sees images already; expected a '
            'language model'
        )
    scaled = [name for name in ('logits_scaling', 'final_logit_softcapping') if getattr(config, name, None)]
    if scaled or not family.packing:
        why = f'LLaVA has no {scaled[0]}, which its config.json sets' if scaled else family.no_packing_reason
        raise ModelError(
            f'llm_name_or_path: {name_or_path} is a {family.model_type} and cannot be put into a LLaVA: {why}'
        )
    return config


def _vision_config(name_or_path: str) -> PreTrainedConfig:
    config = read_config(name_or_path)
    if config.model_type in _TOWERS:
        config = config.vision_config
    if config.model_type not in _TOWERS.values():
        raise ModelError(
            f'visual_encoder_name_or_path: {name_or_path} is a {config.model_type}; expected {" or ".join(_TOWERS)}'
        )
    return config


def _has_class_token(vision: PreTrainedConfig) -> bool:
    return vision.model_type == _TOWERS['clip']


def _llava_config(
    parts: 'LlavaParts', *, text: PreTrainedConfig, vision: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> LlavaConfig:
    if not -vision.num_hidden_layers - 1 <= parts.vision_feature_layer <= vision.num_hidden_layers:
        raise ConfigError(
            f'vision_feature_layer={parts.vision_feature_layer}, but {parts.visual_encoder_name_or_path} has '
            f'{vision.num_hidden_layers} layers'
        )
    strategy: Any = parts.vision_feature_select_strategy or ('default' if _has_class_token(vision) else 'full')
    if strategy == 'default' and not _has_class_token(vision):
        raise ConfigError(
            "vision_feature_select_strategy='default' leaves out the class token, but "
            f"{parts.visual_encoder_name_or_path} has none; set 'full'"
        )
    image_token = tokenizer.get_vocab()[IMAGE_TOKEN]
    if image_token >= text.vocab_size:
        text.vocab_size = -(-max(len(tokenizer), image_token + 1) // _ROWS) * _ROWS
    patches = (vision.image_size // vision.patch_size) ** 2
    config = LlavaConfig(
        text_config=_without_path(text),
        vision_config=_without_path(vision),
        image_token_index=image_token,
        image_seq_length=patches + (strategy == 'full' and _has_class_token(vision)),
        vision_feature_layer=parts.vision_feature_layer,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=bool(text.tie_word_embeddings),
    )
    config.dtype = text.dtype
    return config


def _without_path(config: PreTrainedConfig) -> dict[str, Any]:
    """The settings; where a part lay means nothing to whoever gets the whole."""
    return {name: value for name, value in config.to_dict().items() if name != '_name_or_path'}


def _image_settings(parts: 'LlavaParts', *, side: int) -> dict[str, Any]:
    loaded = load_pretrained(AutoImageProcessor, parts.visual_encoder_name_or_path, backend='pil').to_dict()
    settings = {name: loaded[name] for name in _IMAGE_SETTINGS if loaded.get(name) is not None}
    settings |= dict(do_center_crop=bool(settings.get('do_center_crop')), do_convert_rgb=True)
    made = settings['crop_size' if settings['do_center_crop'] else 'size']
    if any(made.get(name, side) != side for name in ('height', 'width')):
        raise ModelError(
            f'visual_encoder_name_or_path: preprocessor_config.json of {parts.visual_encoder_name_or_path} makes '
            f'images of {made["height"]}x{made["width"]}, but config.json has image_size={side}'
        )
    kind = str(loaded['image_processor_type']).removesuffix('Pil').removesuffix('Fast')
    if parts.pad_image_to_square:
        kind, settings['do_pad'] = 'LlavaImageProcessor', True
    return {**settings, 'image_processor_type': kind, 'processor_class': 'LlavaProcessor'}


def _joint_settings(config: Any) -> dict[str, Any]:
    return dict(
        processor_class='LlavaProcessor',
        image_token=IMAGE_TOKEN,
        patch_size=config.vision_config.patch_size,
        num_additional_image_tokens=int(_has_class_token(config.vision_config)),
        vision_feature_select_strategy=config.vision_feature_select_strategy,
    )
