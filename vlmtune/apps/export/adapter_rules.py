"""Which serving engine takes an adapter as it is, by the rules of their LoRA loaders.

Read in the code of the engines, not run: vLLM ``lora/lora_model.py``, ``lora/peft_helper.py``, ``lora/utils.py``;
SGLang ``lora/lora_config.py``, ``lora/utils.py``, ``lora/lora.py``; LMDeploy ``pytorch/models/patch.py``,
``pytorch/adapter/adapter.py``.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vlmtune.families import Family
from vlmtune.models.tuning import part_of
from vlmtune.utils.adapter_folder import PEFT_PREFIX

_TENSOR = re.compile(re.escape(PEFT_PREFIX) + r'(?P<layer>.+)\.lora_[AB]\.weight')
_DEFAULT_RANK = 16  # of vLLM's --max-lora-rank
_SGLANG_LAYERS = {
    'q_proj', 'k_proj', 'v_proj', 'qkv_proj', 'o_proj', 'gate_proj', 'up_proj', 'gate_up_proj', 'down_proj',
    'embed_tokens', 'lm_head',
}  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """What engines look at.

    Attributes:
        settings: adapter_config.json.
        layers: names of the adapted layers in the model.
        others: tensors that are no A or B of a layer.
        parts: of the model, that have adapted layers.
        has_vision: the base takes pictures.
        is_fused: the files of the base lie in another layout, with other names.
    """

    settings: Mapping[str, Any]
    layers: tuple[str, ...]
    others: tuple[str, ...]
    parts: frozenset[str]
    has_vision: bool
    is_fused: bool = False

    @property
    def rank(self) -> int:
        """The largest of all layers."""
        return max([int(self.settings.get('r') or 0), *map(int, (self.settings.get('rank_pattern') or {}).values())])


@dataclass(frozen=True)
class Verdict:
    """What one engine makes of an adapter.

    Attributes:
        engine: its name and release.
        reasons: why it refuses the adapter, or would compute something else without a word; none: it takes it.
        options: of its command line, that the adapter needs.
    """

    engine: str
    reasons: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


def describe(settings: Mapping[str, Any], names: Iterable[str], *, family: Family, is_fused: bool = False) -> Adapter:
    """What engines look at in an adapter.

    Args:
        settings: adapter_config.json.
        names: of its tensors.
        family: of the base model.
        is_fused: the files of the base lie in another layout, with other names.
    """
    found = {name: _TENSOR.fullmatch(name) for name in names}
    layers = tuple(dict.fromkeys(match['layer'] for match in found.values() if match))
    return Adapter(
        settings=settings,
        layers=layers,
        others=tuple(name for name, match in found.items() if match is None),
        parts=frozenset(part_of(layer, family=family) for layer in layers),
        has_vision=family.has_vision,
        is_fused=is_fused,
    )


def verdicts(adapter: Adapter) -> list[Verdict]:
    """What vLLM, SGLang and LMDeploy make of it."""
    return [
        Verdict(
            f'{engine} {release}', tuple(filter(None, (rule(adapter) for rule in (*_COMMON, *rules)))), options(adapter)
        )
        for engine, release, rules, options in _ENGINES
    ]


# ---- rules: a reason, or None


def _whole_modules(adapter: Adapter) -> str | None:
    if adapter.settings.get('modules_to_save'):
        return 'it holds whole modules (modules_to_save), and only LoRA layers are loaded'
    return f'{adapter.others[0]} is no LoRA A or B of a layer' if adapter.others and not _dora(adapter) else None


def _dora(adapter: Adapter) -> str | None:
    return 'DoRA is not supported' if adapter.settings.get('use_dora') else None


def _fused(adapter: Adapter) -> str | None:
    if adapter.is_fused:
        return 'the files of the base lie in their original layout, whose names differ from those of the adapter'
    return None


def _patterns(adapter: Adapter) -> str | None:
    if adapter.settings.get('rank_pattern') or adapter.settings.get('alpha_pattern'):
        return 'layers differ in r or alpha, and all are scaled by one alpha / r'
    return None


def _rslora(adapter: Adapter) -> str | None:
    return 'rsLoRA is scaled by alpha / r' if adapter.settings.get('use_rslora') else None


def _pattern_of_targets(adapter: Adapter) -> str | None:
    if isinstance(adapter.settings.get('target_modules'), str):
        return 'target_modules is a regular expression, and a list of names is expected'
    return None


def _vision(adapter: Adapter) -> str | None:
    if adapter.parts & {'vision_encoder', 'projector'}:
        return 'adapted layers of the vision encoder or the projector are passed over'
    return None


def _unknown_layers(adapter: Adapter) -> str | None:
    unknown = sorted({layer.rpartition('.')[2] for layer in adapter.layers} - _SGLANG_LAYERS)
    return f'layers called {unknown[0]} cannot be adapted' if unknown else None


def _own_names(adapter: Adapter) -> str | None:
    """LMDeploy looks the names up in its own module tree, where the language model of a VLM lies elsewhere."""
    return 'names of a vision-language model are looked up unchanged in its own modules' if adapter.has_vision else None


def _vllm_options(adapter: Adapter) -> tuple[str, ...]:
    needed = ['--enable-lora']
    needed += [f'--max-lora-rank {_next_rank(adapter.rank)}'] if adapter.rank > _DEFAULT_RANK else []
    needed += ['--enable-tower-connector-lora'] if _vision(adapter) else []
    return tuple(needed)


def _next_rank(rank: int) -> int:
    return next((allowed for allowed in (32, 64, 128, 256, 320, 512) if allowed >= rank), rank)


def _sglang_options(adapter: Adapter) -> tuple[str, ...]:
    return ('--enable-lora',)


def _lmdeploy_options(adapter: Adapter) -> tuple[str, ...]:
    return ('--adapters NAME=DIR',)


_Rule = Callable[[Adapter], str | None]
_COMMON: tuple[_Rule, ...] = (_whole_modules, _dora, _fused)
_ENGINES: tuple[tuple[str, str, tuple[_Rule, ...], Callable[[Adapter], tuple[str, ...]]], ...] = (
    ('vLLM', '0.33.0', (_patterns,), _vllm_options),
    ('SGLang', '0.5.23', (_pattern_of_targets, _patterns, _rslora, _vision, _unknown_layers), _sglang_options),
    ('LMDeploy', '0.16.0', (_pattern_of_targets, _patterns, _rslora, _own_names), _lmdeploy_options),
)
