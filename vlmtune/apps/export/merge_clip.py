"""``vlmtune convert merge --is-clip``: a vision encoder and its LoRA adapter become one vision encoder."""

import logging
from pathlib import Path

from vlmtune.apps.export.model_files import write_files
from vlmtune.apps.export.output_folder import check_output, check_shard_size, new_folder
from vlmtune.layouts import Weight, open_weights
from vlmtune.layouts.llava_weights import adapted_weights, tower_names
from vlmtune.models.lazy_model import cast_all
from vlmtune.models.loading import parse_dtype
from vlmtune.utils.adapter_folder import adapter_settings
from vlmtune.utils.errors import ModelError
from vlmtune.utils.guarded_copy import copy_inside
from vlmtune.utils.pretrained import find_folder, read_source_json

logger = logging.getLogger(__name__)

_KINDS = ('clip', 'clip_vision_model', 'siglip', 'siglip_vision_model')
_PATTERNS = ('*.json', '*.txt', '*.safetensors', 'pytorch_model*.bin')
_BESIDE = ('*.json', '*.txt')
_PART = 'visual_encoder.'


def merge_clip(base: str, adapter: str, output: str, *, max_shard_size: str = '5GB', dtype: str | None = None) -> None:
    """Write a CLIP or SigLIP with an adapter of XTuner or PEFT in its weights: the names and files of the base.

    Args:
        base: a folder or a hub id of the whole model or of its vision encoder.
        adapter: a folder, such as ``visual_encoder_adapter`` of XTuner.
        output: a folder that does not exist or is empty.
        max_shard_size: of one file.
        dtype: of the weights; None keeps those of the base. Updates are added in float32 and cast once.

    Raises:
        UserError: anything that the user can mend; nothing is written then.
    """
    check_shard_size(max_shard_size)
    target = check_output(output)
    folder = Path(adapter).expanduser()
    adapter_settings(folder)
    source = find_folder(base, patterns=_PATTERNS)
    kind = (read_source_json(str(source), 'config.json') or {}).get('model_type')
    if kind not in _KINDS:
        raise ModelError(f'--is-clip: {base} is a {kind}, expected one of {", ".join(_KINDS)}; leave --is-clip out')
    weights = open_weights(source)
    merged = _merged(weights, folder)
    if dtype is not None:
        merged = cast_all(merged, parse_dtype(dtype))
    with new_folder(target) as staging:
        for pattern in _BESIDE:
            for file in source.glob(pattern):
                if not file.name.endswith('.index.json'):
                    copy_inside(file, staging / file.name, root=source)
        write_files(merged, staging, max_shard_size=max_shard_size)
    logger.info('wrote the merged vision encoder to %s', target)


def _merged(weights: dict[str, Weight], adapter: Path) -> dict[str, Weight]:
    """Under the names of the base; an adapter says ``vision_model.`` before its names, which those may lack."""
    names = dict(zip(tower_names(weights), weights, strict=True))
    towers = {name: weights[own] for name, own in names.items()}
    changed = {names[name]: weight for name, weight in adapted_weights(towers, adapter, part=_PART)}
    return {**weights, **changed}
