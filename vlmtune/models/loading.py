"""Loads a model of a known family."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, apply_renamings
from transformers.integrations import is_deepspeed_zero3_enabled

from vlmtune.families import Family, find_family
from vlmtune.layouts import Layout, find_layout, find_source, open_weights, read_config, to_native
from vlmtune.models.quantization import quantization_config, stored_quantization
from vlmtune.models.sharded import built_whole, convert_by_logical_shape
from vlmtune.utils.errors import ConfigError, ModelError, one_line
from vlmtune.utils.imports import import_name
from vlmtune.utils.pretrained import FAILURES, find_folder, load_pretrained, reason_of

T = TypeVar('T')
GENERATION_FILE = 'generation_config.json'
AUTO_CLASSES = {'causal_lm': AutoModelForCausalLM, 'image_text_to_text': AutoModelForImageTextToText}
_WITH_REPORT: dict[str, Any] = dict(output_loading_info=True, ignore_mismatched_sizes=True)
_KINDS = dict(missing_keys='missing', unexpected_keys='unknown', mismatched_keys='of another shape')
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


def parse_dtype(name: str) -> torch.dtype:
    """'bfloat16' -> torch.bfloat16.

    Raises:
        ConfigError: a dtype that training does not support.
    """
    if name not in DTYPES:
        raise ConfigError(f'dtype={name!r} is not supported; expected one of {", ".join(DTYPES)}')
    return DTYPES[name]


def read_family(pretrained_model_name_or_path: str | Mapping[str, Any], **source: Any) -> Family:
    """The row of a checkpoint's family, from its config.json alone.

    Args:
        pretrained_model_name_or_path: a folder, a hub id, or the parts of a LLaVA.
        source: trust_remote_code and revision, see ``load_pretrained``.

    Raises:
        ModelError: the checkpoint cannot be read or its family is not supported.
    """
    return find_family(read_config(find_source(pretrained_model_name_or_path), **source).model_type)


def auto_class(family: Family) -> Any:
    """The ``AutoModelFor...`` that builds the family's models; one of ours is made known to it."""
    found = AUTO_CLASSES[family.auto_class]
    if family.model is not None:
        own = import_name(family.model)
        found.register(own.config_class, own, exist_ok=True)
    return found


def build_outline(config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """A model of sizes, on the meta device.

    Args:
        config: of a known family.
        options: dtype, attn_implementation.

    Raises:
        ModelError: the family is not supported, or its classes do not take the config.
    """
    family = find_family(config.model_type)
    try:
        with torch.device('meta'), built_whole():
            return auto_class(family).from_config(config, **options)
    except FAILURES as error:
        raise ModelError(
            f'{config.name_or_path or "config.json"}: no {config.model_type} can be built from config.json: '
            f'{reason_of(error)}'
        ) from error


def load_model(
    pretrained_model_name_or_path: str | Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.bfloat16,
    quantization: str | None = None,
    attn_implementation: str = 'sdpa',
    device: str | torch.device = 'cpu',
    trust_remote_code: bool = False,
    revision: str | None = None,
    refuse_unknown: bool = False,
    offload_folder: str | None = None,
) -> tuple[PreTrainedModel, Family]:
    """A transformers model and the row of its family.

    Quantised weights are made on ``device`` at once; other weights are loaded on the CPU and moved by the caller. On
    device 'meta' no weight is read or made; quantised layers are then plain ones. Random generators are left alone:
    whether and what loading draws depends on how the weights are loaded, and what is drawn next must not.

    Args:
        pretrained_model_name_or_path: a folder, a hub id, or the parts of a LLaVA, see docs/llava.md.
        dtype: of the weights that are not quantised.
        quantization: None, 'nf4' or 'int8', of the language model's linear layers.
        attn_implementation: a name of transformers: 'sdpa', 'eager', 'flash_attention_2', ...
        device: where quantised weights are made, or 'meta'.
        trust_remote_code: whether transformers may run code that lies beside the weights.
        revision: branch, tag or commit of a hub id.
        refuse_unknown: refuse weights that the model does not have, too; in other layouts than that of transformers
            they always are. Older files hold tables that are computed now, which harm no training.
        offload_folder: weights that fit neither the GPUs nor the memory go into files there; None: they have to fit.

    Raises:
        ModelError: the checkpoint cannot be read, its family is not supported, or a weight is missing or of another
            shape; the first is named.
        ConfigError: an unknown quantization, or one for which a package is missing.
    """
    source: dict[str, Any] = dict(trust_remote_code=trust_remote_code, revision=revision)
    name_or_path = find_source(pretrained_model_name_or_path)
    config = read_config(name_or_path, **source)
    family = find_family(config.model_type)
    options: dict[str, Any] = dict(dtype=dtype, attn_implementation=attn_implementation)
    if torch.device(device).type == 'meta':
        return build_outline(config, **options), family
    if is_deepspeed_zero3_enabled():
        convert_by_logical_shape(family.model_type)
    stored = stored_quantization(config, asked=quantization)
    quantized = quantization_config(quantization, family=family, dtype=dtype)
    if quantized is not None:
        options |= dict(quantization_config=quantized)
    if offload_folder is not None:
        options |= dict(device_map='auto', offload_folder=offload_folder)
    elif quantized is not None or stored is not None:
        options |= dict(device_map={'': torch.device(device)})
    layout = find_layout(name_or_path, revision=revision)
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        if layout is None:
            if refuse_unknown and (folder := Path(name_or_path).expanduser()).is_dir():
                open_weights(folder)  # names the file that is missing or broken
            model, info = load_pretrained(
                auto_class(family), name_or_path, has_weights=True, **options, **source, **_WITH_REPORT
            )
            refuse_misfit(name_or_path, info, kinds=_KINDS if refuse_unknown else ('missing_keys', 'mismatched_keys'))
        else:
            folder = find_folder(name_or_path, revision=revision)
            model = _load_original(folder, layout=layout, config=config, options=options)
    _keep_quantized_layout(model)
    return model, family


def refuse_misfit(name_or_path: str, info: Mapping[str, Any], *, kinds: Iterable[str] = _KINDS) -> None:
    """Raise if a checkpoint and its config.json differ, of which transformers only warns.

    Args:
        name_or_path: of the checkpoint.
        info: of ``from_pretrained(..., **_WITH_REPORT)``.
        kinds: of differences.

    Raises:
        ModelError: they differ; the first weight of each kind is named.
    """
    found = {kind: sorted(map(_described, info[kind])) for kind in kinds}
    if wrong := [
        f'{len(names)} weights are {_KINDS[kind]} (first: {names[0]})' for kind, names in found.items() if names
    ]:
        raise ModelError(f'{name_or_path} does not fit its own config.json: {", ".join(wrong)}')


def _described(key: Any) -> str:
    if isinstance(key, str):
        return one_line(key)
    name, found, expected = key
    return f'{name} is {tuple(found)}, expected {tuple(expected)}'


def _load_original(
    folder: Path, *, layout: Layout, config: PreTrainedConfig, options: Mapping[str, Any]
) -> PreTrainedModel:
    """A model whose weights lie under other names, some of them in one; none may be missing or left over."""
    outline = build_outline(config)
    expected = {name: tensor.shape for name, tensor in outline.state_dict().items()}
    found = (layout.open_weights or open_weights)(folder)
    weights = to_native(found, layout=layout, config=config, expected=expected, tied=tied_names(outline))
    weights = by_names_in_files(weights, outline)
    model_class: Any = type(outline)
    model, info = model_class.from_pretrained(None, config=config, state_dict=weights, **options, **_WITH_REPORT)
    refuse_misfit(str(folder), info)
    if (folder / GENERATION_FILE).is_file():
        model.generation_config = load_pretrained(GenerationConfig, str(folder))
    return model


def by_names_in_files(weights: Mapping[str, T], outline: PreTrainedModel) -> dict[str, T]:
    """Weights under the names that they have in files of transformers, instead of those of the modules.

    A model writes the names that it was read from, and vLLM, SGLang and LMDeploy read those of the files only.
    """
    mapping = get_model_conversion_mapping(outline, add_legacy=False)
    renamings = [step.reverse_transform() for step in reversed(mapping) if isinstance(step, WeightRenaming)]
    return {apply_renamings(name, renamings): tensor for name, tensor in weights.items()}  # type: ignore[arg-type]


def tied_names(model: PreTrainedModel) -> frozenset[str]:
    """Second names of weights that have two."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return frozenset(name for name, weight in named if first.setdefault(id(weight), name) != name)


def _keep_quantized_layout(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from rewriting 4-bit weights for inference on CPUs with AVX512-BF16.

    It does so in the first forward in evaluation mode, for good, into a layout that gives wrong gradients and cannot be
    dequantised; answers asked for on the way would spoil the training.
    """
    for module in model.modules():
        if getattr(module, 'support_avx512bf16_for_cpu', False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
