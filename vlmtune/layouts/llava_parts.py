"""A LLaVA that is no checkpoint yet: a language model, a vision encoder and a projector from different places.

Its source is a folder that holds what transformers would write beside the weights of such a LLaVA, and a config.json
that names the parts, of which the weights are read where they lie. So it is a layout like others, and all that reads a
model by its folder reads this one: training, chat, export. The folder is made when the parts are first asked for and
goes with the process.
"""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from transformers import LlavaConfig, PreTrainedConfig

from vlmtune.layouts.internlm2 import internlm2_rules
from vlmtune.layouts.layout import Layout
from vlmtune.layouts.llava_files import write_files
from vlmtune.layouts.llava_weights import check_pretrained, open_parts
from vlmtune.layouts.names import Rule, rename
from vlmtune.utils.errors import ConfigError, ModelError
from vlmtune.utils.json_files import write_json
from vlmtune.utils.suggest import did_you_mean

MODEL_TYPE = 'llava_parts'
_STRATEGIES = ('default', 'full')
_MADE: list[Mapping[str, Any]] = []  # parts of which this process has made folders


@dataclass(frozen=True)
class LlavaParts:
    """What a LLaVA is made of.

    Attributes:
        llm_name_or_path: folder or hub id of a causal language model.
        visual_encoder_name_or_path: folder or hub id of a CLIP or SigLIP, whole or its vision encoder alone.
        pretrained_pth: the projector: ``iter_N.pth`` of ours or the work dir with it, a .pth of XTuner, its folder
            ``projector`` or the folder above it, whose adapters are merged into their parts, or mm_projector.bin of
            official LLaVA. None: a new projector, which has to be trained.
        vision_feature_layer: the encoder's layer whose output the projector reads, counted from the end if negative.
        vision_feature_select_strategy: 'default' leaves the class token out, 'full' takes all; None: 'default' where
            the encoder has a class token (CLIP), 'full' where it has none (SigLIP).
        pad_image_to_square: whether images are padded to squares in the mean colour instead of being cut or stretched.
    """

    llm_name_or_path: str
    visual_encoder_name_or_path: str
    pretrained_pth: str | None = None
    vision_feature_layer: int = -2
    vision_feature_select_strategy: str | None = None
    pad_image_to_square: bool = False

    @property
    def name(self) -> str:
        """What cards call the model: ``llava-internlm2-chat-1_8b-clip-vit-large-patch14-336``."""
        return '-'.join(['llava', *map(os.path.basename, (self.llm_name_or_path, self.visual_encoder_name_or_path))])


def find_source(name_or_path: str | Mapping[str, Any]) -> str:
    """The folder or hub id of a model, which for parts is a folder made of them.

    Args:
        name_or_path: a folder, a hub id, or the attributes of ``LlavaParts``.

    Raises:
        ConfigError: a part is missing or unknown.
        ModelError: a part cannot be read, or they do not fit together.
        CheckpointError: ``pretrained_pth`` cannot be read.
    """
    if isinstance(name_or_path, str):
        return name_or_path
    parts = parse_parts(name_or_path)
    return str(Path(_folder_of(parts).name, parts.name))


def check_projector(name_or_path: str | Mapping[str, Any], *, mode: str) -> None:
    """Raise if a projector is new and not trained as a whole.

    Args:
        name_or_path: as for ``find_source``.
        mode: 'frozen', 'lora' or 'full'.

    Raises:
        ConfigError: it is.
    """
    if not isinstance(name_or_path, str) and name_or_path.get('pretrained_pth') is None and mode != 'full':
        raise ConfigError(
            f"tune projector={mode!r}, but without pretrained_pth the projector is new; set tune projector='full', or "
            'pretrained_pth to the checkpoint that has one'
        )


def check_same_parts(model: Any, processor: Any) -> None:
    """Raise if processor and model are made of different parts, or read them differently.

    Args:
        model: its ``pretrained_model_name_or_path``.
        processor: its; a folder or hub id, which may be that of another model, is not looked at.

    Raises:
        ConfigError: they differ in more than ``pretrained_pth``, which a processor does not need.
    """
    if not isinstance(model, Mapping) or not isinstance(processor, Mapping):
        return
    mine, theirs = asdict(parse_parts(model)), asdict(parse_parts(processor))
    for name in mine:
        if name != 'pretrained_pth' and mine[name] != theirs[name]:
            raise ConfigError(
                f'{name} is {mine[name]!r} in model.pretrained_model_name_or_path, but {theirs[name]!r} in that of the '
                'processor; give both the same parts'
            )


def parse_parts(settings: Mapping[str, Any]) -> LlavaParts:
    """The parts that a config names, local ones by their absolute paths.

    Raises:
        ConfigError: one is missing or unknown.
    """
    known = [field.name for field in fields(LlavaParts)]
    for name in settings:
        if name not in known:
            hint = did_you_mean(name, known)
            raise ConfigError(f'a LLaVA from parts has no {name!r}{hint}; it has {", ".join(known)}')
    for name in known[:2]:
        if not isinstance(settings.get(name), str):
            raise ConfigError(f'{name}={settings.get(name)!r}: expected a folder or a hub id')
    layer, strategy, pad = (settings.get(field.name, field.default) for field in fields(LlavaParts)[3:])
    if strategy not in (None, *_STRATEGIES):
        raise ConfigError(f'vision_feature_select_strategy={strategy!r}: expected {" or ".join(_STRATEGIES)}, or None')
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise ConfigError(f'vision_feature_layer={layer!r}: expected the number of a layer')
    if not isinstance(pad, bool):
        raise ConfigError(f'pad_image_to_square={pad!r}: expected True or False')
    values: dict[str, Any] = {**settings, **{name: _absolute(settings.get(name)) for name in known[:3]}}
    return LlavaParts(**values)


def _absolute(name_or_path: str | None) -> str | None:
    path = os.path.expanduser(name_or_path or '')
    return os.path.abspath(path) if path and os.path.exists(path) else name_or_path


@cache
def _folder_of(parts: LlavaParts) -> 'tempfile.TemporaryDirectory[str]':
    if parts.pretrained_pth is not None:
        check_pretrained(parts.pretrained_pth)
    folder = tempfile.TemporaryDirectory(prefix='vlmtune-llava-')
    try:
        place = Path(folder.name, parts.name)
        place.mkdir()
        config = write_files(parts, place)
        write_json(place / 'config.json', dict(model_type=MODEL_TYPE, parts=asdict(parts), llava=config.to_dict()))
    except BaseException:
        folder.cleanup()
        raise
    _MADE.append(asdict(parts))
    return folder


# ---- the layout


def _read_config(raw: Mapping[str, Any]) -> LlavaConfig:
    if raw.get('parts') not in _MADE:  # a stranger's would have us read any file of this machine
        raise ModelError(
            f'config.json: model_type={MODEL_TYPE!r} is for folders that vlmtune makes for itself; name the parts in '
            'pretrained_model_name_or_path of a config instead, as docs/llava.md shows'
        )
    return LlavaConfig.from_dict(dict(raw['llava']))


def _copy_files(source: Path, target: Path) -> None:
    for file in source.iterdir():
        if file.name != 'config.json':
            (target / file.name).write_bytes(file.read_bytes())


def _rules(config: PreTrainedConfig) -> tuple[Rule, ...]:
    return (
        *internlm2_rules(config.text_config, original='llm.', native='model.language_model'),
        rename('llm.model.{rest}', 'model.language_model.{rest}'),
        rename('llm.lm_head.weight', 'lm_head.weight'),
        rename('visual_encoder.vision_model.{rest}', 'model.vision_tower.{rest}'),
        rename('projector.model.0.{leaf}', 'model.multi_modal_projector.linear_1.{leaf}'),
        rename('projector.model.2.{leaf}', 'model.multi_modal_projector.linear_2.{leaf}'),
    )


LLAVA_PARTS = Layout(
    name='LLaVA from parts',
    read_config=_read_config,
    write_processor_files=_copy_files,
    rules=_rules,
    kept=(
        'llm.model.layers.{i}.self_attn.rotary_emb.inv_freq',
        'visual_encoder.text_model.{rest}',
        'visual_encoder.vision_model.embeddings.position_ids',
        'visual_encoder.logit_scale',
        'visual_encoder.logit_bias',
        'visual_encoder.visual_projection.weight',
        'visual_encoder.text_projection.weight',
    ),
    open_weights=open_parts,
)
