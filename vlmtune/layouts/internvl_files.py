"""Tokenizer, chat template and image processor of an ``internvl_chat``, as transformers reads those of an InternVL."""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vlmtune.layouts.sentencepiece import MODEL_FILE, fast_tokenizer
from vlmtune.utils.errors import ModelError
from vlmtune.utils.guarded_copy import copy_present
from vlmtune.utils.json_files import write_json
from vlmtune.utils.pretrained import load_pretrained, read_source_json

CONTEXT_TOKEN = '<IMG_CONTEXT>'
_START_TOKEN, _END_TOKEN, _VIDEO_TOKEN = '<img>', '</img>', '<video>'
_TOKENIZER_FILES = (
    'tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json', 'vocab.json',
    'merges.txt',
)  # fmt: skip

# The system messages of the official conversation.py; every conversation has one.
_SYSTEM = '你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。'
_SYSTEM_2_5 = (
    '你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。'
)
# config.json's template: what opens a turn, what closes it, the system message
_TEMPLATES = {
    'internlm2-chat': ('<|im_start|>{role}\n', '<|im_end|>', _SYSTEM),
    'Hermes-2': ('<|im_start|>{role}\n', '<|im_end|>', _SYSTEM),
    'phi3-chat': ('<|{role}|>\n', '<|end|>', _SYSTEM),
    'internvl2_5': ('<|im_start|>{role}\n', '<|im_end|>\n', _SYSTEM_2_5),
}
_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ FIRST }}{% endif %}"
    "{% for m in messages %}{{ HEAD ~ m['role'] ~ TAIL }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}{{ IMAGE }}{% else %}{{ p['text'] }}{% endif %}"
    '{% endfor %}{% endif %}{{ AFTER }}{% endfor %}'
    '{% if add_generation_prompt %}{{ OPENED }}{% endif %}'
)
_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet
_BICUBIC = 3


def write_processor_files(source: Path, target: Path) -> None:
    """Write the files of tokenizer, chat template and image processor.

    Args:
        source: the original's folder.
        target: an existing folder that holds the native config.json.

    Raises:
        ModelError: a template, a setting or a tokenizer that is not known.
    """
    raw = read_source_json(str(source), 'config.json') or {}
    tokenizer = _load_tokenizer(source)
    tokenizer.chat_template = _chat_template(raw, tokenizer, source)
    tokenizer.save_pretrained(target)
    named = dict(start_image_token=_START_TOKEN, end_image_token=_END_TOKEN, context_image_token=CONTEXT_TOKEN)
    vocabulary = tokenizer.get_vocab()
    # InternVLProcessor asks for a name of videos; these models have none, and the token of images is looked for first
    named['video_token'] = _VIDEO_TOKEN if _VIDEO_TOKEN in vocabulary else CONTEXT_TOKEN
    if missing := sorted(set(named.values()) - set(vocabulary)):
        raise ModelError(f'{source}: the tokenizer lacks {", ".join(missing)}; it belongs to another model')
    settings = read_source_json(str(target), 'tokenizer_config.json') or {}
    write_json(target / 'tokenizer_config.json', {**settings, **named})
    write_json(target / 'preprocessor_config.json', _image_settings(raw))
    native = read_source_json(str(target), 'config.json') or {}
    joint = dict(processor_class='InternVLProcessor', image_seq_length=native['image_seq_length'])
    write_json(target / 'processor_config.json', joint)


def _load_tokenizer(source: Path) -> PreTrainedTokenizerBase:
    """The tokenizer, by its data alone: its code is left behind."""
    if (source / MODEL_FILE).is_file():
        return fast_tokenizer(source)
    with tempfile.TemporaryDirectory(prefix='vlmtune-tokenizer-') as folder:
        copy_present(_TOKENIZER_FILES, source=source, target=Path(folder), error=ModelError)
        if not any((Path(folder) / name).is_file() for name in ('tokenizer.json', 'vocab.json')):
            raise ModelError(f'{source} has no tokenizer: expected {MODEL_FILE}, tokenizer.json or vocab.json')
        write_json(Path(folder) / 'config.json', {})  # with no model type, tokenizer_config.json says what it is
        return load_pretrained(AutoTokenizer, folder)


def _chat_template(raw: dict[str, Any], tokenizer: PreTrainedTokenizerBase, source: Path) -> str:
    """The official prompt as a Jinja template; a conversation's own system message takes the place of the official."""
    name = raw.get('template')
    if name not in _TEMPLATES:
        raise ModelError(f'{source / "config.json"}: template={name!r}, expected one of {", ".join(_TEMPLATES)}')
    before, after, system = _TEMPLATES[str(name)]
    system = raw.get('system_message') or system
    opened = before.format(role='assistant')
    if absent := [token for token in _control_tokens(opened + after) if token not in tokenizer.get_vocab()]:
        raise ModelError(f'{source}: the tokenizer lacks {absent[0]}, which template={name!r} writes')
    head, tail = before.split('{role}')
    shown = {
        'FIRST': json.dumps(head + 'system' + tail + system + after, ensure_ascii=False),
        'HEAD': json.dumps(head),
        'TAIL': json.dumps(tail),
        'AFTER': json.dumps(after),
        'OPENED': json.dumps(opened),
        'IMAGE': json.dumps(f'{CONTEXT_TOKEN}\n'),
    }
    marks = re.compile('|'.join(shown))  # all at once: a system message may hold these words
    return '{{ bos_token }}' * _adds_bos(tokenizer) + marks.sub(lambda mark: shown[mark[0]], _TEMPLATE)


def _control_tokens(text: str) -> list[str]:
    return [f'<|{piece.partition("|>")[0]}|>' for piece in text.split('<|')[1:]]


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    ids = tokenizer('').input_ids
    return bool(ids) and ids[0] == tokenizer.bos_token_id


def _image_settings(raw: dict[str, Any]) -> dict[str, Any]:
    dynamic = bool(raw.get('dynamic_image_size', False))
    least, most = (raw.get(key, default) for key, default in (('min_dynamic_patch', 1), ('max_dynamic_patch', 6)))
    if not isinstance(least, int) or not isinstance(most, int) or not 1 <= least <= most:
        raise ModelError(
            f'config.json: min_dynamic_patch={least!r} and max_dynamic_patch={most!r}; expected the least and the most '
            'tiles of an image, whole numbers of at least 1'
        )
    if dynamic and most > 1 and not raw.get('use_thumbnail', False):
        raise ModelError('config.json: use_thumbnail=False with several tiles is not supported')
    tile = raw.get('force_image_size') or raw['vision_config'].get('image_size', 224)
    return dict(
        image_processor_type='GotOcr2ImageProcessor',
        processor_class='InternVLProcessor',
        size=dict(height=tile, width=tile),
        crop_to_patches=True,
        min_patches=least if dynamic else 1,
        max_patches=most if dynamic else 1,
        do_convert_rgb=True,
        do_resize=True,
        do_rescale=True,
        do_normalize=True,
        rescale_factor=1 / 255,
        resample=_BICUBIC,
        image_mean=_MEAN,
        image_std=_STD,
    )
