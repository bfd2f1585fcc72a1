"""``preprocessor_config.json`` and ``processor_config.json`` of the tiny models, keys as in hub repositories.

They are written as plain JSON, not by a processor's ``save_pretrained``: hub files are older than the installed
transformers, and no processor class that needs torchvision must be built.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_CLIP = {'image_mean': [0.48145466, 0.4578275, 0.40821073], 'image_std': [0.26862954, 0.26130258, 0.27577711]}
_IMAGENET = {'image_mean': [0.485, 0.456, 0.406], 'image_std': [0.229, 0.224, 0.225]}
_HALF = {'image_mean': [0.5, 0.5, 0.5], 'image_std': [0.5, 0.5, 0.5]}
_STEPS = {'do_resize': True, 'do_rescale': True, 'do_normalize': True, 'rescale_factor': 1 / 255}

BICUBIC, BILINEAR, LANCZOS = 3, 2, 1  # Pillow's numbers


def _qwen2(processor: str) -> dict[str, Any]:
    return (
        _STEPS
        | _CLIP
        | {
            'image_processor_type': 'Qwen2VLImageProcessor',
            'processor_class': processor,
            'min_pixels': 4 * 28 * 28,
            'max_pixels': 16 * 28 * 28,
            'patch_size': 14,
            'merge_size': 2,
            'temporal_patch_size': 2,
        }
    )


_QWEN3 = (
    _STEPS
    | _HALF
    | {
        'image_processor_type': 'Qwen2VLImageProcessorFast',
        'processor_class': 'Qwen3VLProcessor',
        'size': {'shortest_edge': 4 * 32 * 32, 'longest_edge': 16 * 32 * 32},  # pixels, in spite of the names
        'patch_size': 16,
        'merge_size': 2,
        'temporal_patch_size': 2,
    }
)
_LLAVA = (
    _STEPS
    | _CLIP
    | {
        'image_processor_type': 'CLIPImageProcessor',
        'processor_class': 'LlavaProcessor',
        'size': {'shortest_edge': 42},
        'crop_size': {'height': 42, 'width': 42},
        'do_center_crop': True,
        'do_convert_rgb': True,
        'resample': BICUBIC,
    }
)
_PINPOINTS = [[28, 56], [56, 28], [56, 56]]
_LLAVA_NEXT = _LLAVA | {
    'image_processor_type': 'LlavaNextImageProcessor',
    'processor_class': 'LlavaNextProcessor',
    'size': {'shortest_edge': 28},
    'crop_size': {'height': 28, 'width': 28},
    'image_grid_pinpoints': _PINPOINTS,
    'do_pad': True,
}
_LLAVA_ONEVISION = (
    _STEPS
    | _HALF
    | {
        'image_processor_type': 'LlavaOnevisionImageProcessor',
        'processor_class': 'LlavaOnevisionProcessor',
        'size': {'height': 28, 'width': 28},
        'image_grid_pinpoints': _PINPOINTS,
        'do_pad': True,
        'do_convert_rgb': True,
        'resample': BICUBIC,
    }
)
_INTERNVL = (
    _STEPS
    | _IMAGENET
    | {
        'image_processor_type': 'GotOcr2ImageProcessorFast',
        'processor_class': 'InternVLProcessor',
        'size': {'height': 56, 'width': 56},
        'crop_to_patches': False,  # the processor class asks for True in every call
        'min_patches': 1,
        'max_patches': 4,
        'do_convert_rgb': True,
        'resample': BICUBIC,
    }
)
_IDEFICS3 = (
    _STEPS
    | _HALF
    | {
        'image_processor_type': 'Idefics3ImageProcessor',
        'processor_class': 'Idefics3Processor',
        'size': {'longest_edge': 112},
        'max_image_size': {'longest_edge': 56},
        'do_image_splitting': True,
        'do_pad': True,
        'do_convert_rgb': True,
        'resample': LANCZOS,
    }
)
_GEMMA3 = (
    _STEPS
    | _HALF
    | {
        'image_processor_type': 'Gemma3ImageProcessor',
        'processor_class': 'Gemma3Processor',
        'size': {'height': 56, 'width': 56},
        'image_seq_length': 4,
        'do_convert_rgb': None,
        'do_pan_and_scan': None,
        'resample': BILINEAR,
    }
)
_PALIGEMMA = (
    _STEPS
    | _HALF
    | {
        'image_processor_type': 'SiglipImageProcessor',
        'processor_class': 'PaliGemmaProcessor',
        'size': {'height': 28, 'width': 28},
        'image_seq_length': 4,
        'do_convert_rgb': None,
        'resample': BICUBIC,
    }
)

PREPROCESSORS: Mapping[str, dict[str, Any]] = {
    'qwen2_vl': _qwen2('Qwen2VLProcessor'),
    'qwen2_5_vl': _qwen2('Qwen2_5_VLProcessor'),
    'qwen3_vl': _QWEN3,
    'qwen3_vl_moe': _QWEN3,
    'qwen3_5': _QWEN3,
    'llava': _LLAVA,
    'llava_next': _LLAVA_NEXT,
    'llava_onevision': _LLAVA_ONEVISION,
    'internvl': _INTERNVL,
    'idefics3': _IDEFICS3,
    'smolvlm': _IDEFICS3 | {'image_processor_type': 'SmolVLMImageProcessor', 'processor_class': 'SmolVLMProcessor'},
    'gemma3': _GEMMA3,
    'paligemma': _PALIGEMMA,
}

_CLASS_TOKEN = {
    'image_token': '<image>',
    'patch_size': 14,
    'num_additional_image_tokens': 1,
    'vision_feature_select_strategy': 'default',
}
PROCESSORS: Mapping[str, dict[str, Any]] = {
    'llava': _CLASS_TOKEN | {'processor_class': 'LlavaProcessor'},
    'llava_next': _CLASS_TOKEN | {'processor_class': 'LlavaNextProcessor'},
    'llava_onevision': {
        'processor_class': 'LlavaOnevisionProcessor',
        'image_token': '<image>',
        'video_token': '<video>',
        'num_image_tokens': 4,
        'vision_feature_select_strategy': 'full',
        'vision_aspect_ratio': 'anyres_max_9',
    },
    'internvl': {'processor_class': 'InternVLProcessor', 'image_seq_length': 4},
    'idefics3': {'processor_class': 'Idefics3Processor', 'image_seq_len': 4},
    'smolvlm': {'processor_class': 'SmolVLMProcessor', 'image_seq_len': 4},
    'gemma3': {'processor_class': 'Gemma3Processor', 'image_seq_length': 4},
}


def write_processor_files(model_type: str, directory: Path) -> None:
    """Write the files of ``model_type``; a text model has none, and some families have no ``processor_config.json``."""
    tables = {'preprocessor_config.json': PREPROCESSORS, 'processor_config.json': PROCESSORS}
    for name, table in tables.items():
        if model_type in table:
            (directory / name).write_text(json.dumps(table[model_type], indent=2) + '\n', encoding='utf-8')
