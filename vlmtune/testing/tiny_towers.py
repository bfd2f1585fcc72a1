"""Folders of tiny random CLIP and SigLIP models, whole as on the hub: both encoders and what joins them."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from vlmtune.testing.tiny_processors import PREPROCESSORS

_SIDE = 42  # pixels: 3 x 3 patches
_ENCODER: dict[str, Any] = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
_IMAGE = dict(image_size=_SIDE, patch_size=14)
_TEXT = dict(vocab_size=64, max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1)
_SIGLIP_IMAGES = dict(
    image_processor_type='SiglipImageProcessor', size=dict(height=_SIDE, width=_SIDE), resample=3, do_resize=True,
    do_rescale=True, rescale_factor=1 / 255, do_normalize=True, image_mean=[0.5] * 3, image_std=[0.5] * 3,
)  # fmt: skip


def write_tiny_tower(kind: str, directory: str | Path, *, seed: int = 0) -> Path:
    """Write config, weights and image processor of a tiny model; returns the path.

    Args:
        kind: 'clip' or 'siglip'.
        directory: made if it does not exist.
        seed: of the weights; the global random state is left alone.
    """
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    configs: dict[str, Any] = dict(vision_config={**_ENCODER, **_IMAGE}, text_config={**_ENCODER, **_TEXT})
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = CLIPModel(CLIPConfig(**configs)) if kind == 'clip' else SiglipModel(SiglipConfig(**configs))
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(path)
    images = _SIGLIP_IMAGES if kind == 'siglip' else PREPROCESSORS['llava']
    (path / 'preprocessor_config.json').write_text(json.dumps(images, indent=2) + '\n', 'utf-8')
    return path
