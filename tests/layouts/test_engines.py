"""vLLM, SGLang and LMDeploy load what we write, by the rules of their loaders at a named commit or release.

Nothing of them is installed or run: ``fixtures/engines/*.json`` holds what their loaders read from config.json, which
names they take, how they rename and stack them, and which parameters they have. A name that an engine would refuse, a
parameter that it would leave empty, and a key that it would miss are failures.
"""

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vlmtune.apps.export.model_files import save_model
from vlmtune.apps.export.original import write_original
from vlmtune.apps.export.processor_files import write_processor_files
from vlmtune.layouts import find_layout
from vlmtune.layouts.llava_parts import find_source
from vlmtune.models.lazy_model import LazyModel
from vlmtune.models.loading import load_model
from vlmtune.testing.engine_rules import Refused, load
from vlmtune.testing.tiny_towers import write_tiny_tower

FIXTURES = Path(__file__).resolve().parents[1] / 'fixtures'
ENGINES = {path.stem: json.loads(path.read_text('utf-8')) for path in sorted((FIXTURES / 'engines').glob('*.json'))}
REAL = {path.stem: json.loads(path.read_text('utf-8')) for path in sorted((FIXTURES / 'layouts').glob('*.json'))}
SERVED = ('InternLM2ForCausalLM', 'InternVLChatModel', 'MiniCPMV', 'POINTSV15ChatModel')
NUMBERS = re.compile(r'\{(\d+)(?:\.\.(\d+))?\}')
# What an engine does not load, and why; everything else it does.
REFUSED = {
    ('vllm', 'POINTSV15ChatModel'): 'not registered',
    ('lmdeploy', 'POINTSV15ChatModel'): 'not registered',
    ('lmdeploy', 'MiniCPMV'): 'version is None, expected 2.5 or 2.6',
    ('sglang', 'MiniCPMV'): 'version is None, expected 2.6 or 4.0 or 4.5',
    ('sglang', 'InternVLChatModel/Phi3ForCausalLM'): 'no language model Phi3ForCausalLM',
    ('sglang', 'InternVLChatModel/LlamaForCausalLM'): 'no language model LlamaForCausalLM',
    ('sglang', 'POINTSV15ChatModel/custom_llama'): 'llm_config.model_type is custom_llama, expected qwen2',
    ('sglang', 'LlavaForConditionalGeneration'): 'vision_feature_select_strategy is default, expected patch or full',
}


# ---- what they are applied to


def real_names(tensors: Iterable[str]) -> list[str]:
    """``layers.{0..23}.x`` stands for 24 names."""
    names = []
    for pattern in tensors:
        ranges = [range(int(a), int(b or a) + 1) for a, b in NUMBERS.findall(pattern)]
        text = NUMBERS.sub('{}', pattern)
        names += [text.format(*numbers) for numbers in product(*ranges)]
    return names


def reason_for(engine: str, config: Mapping[str, Any]) -> str | None:
    """Why an engine does not load it; None: it does."""
    architecture, inner = config['architectures'][0], config.get('llm_config', {})
    keys = (
        architecture,
        *(f'{architecture}/{kind}' for kind in [*inner.get('architectures', ()), inner.get('model_type')]),
    )
    return next((REFUSED[engine, key] for key in keys if (engine, key) in REFUSED), None)


def check(
    engine: str, config: Mapping[str, Any], names: Iterable[str], *, constants: Mapping[str, int] | None = None
) -> None:
    reason = reason_for(engine, config)
    if reason is None:
        assert load(ENGINES[engine], config, names, constants=constants) > 0
        return
    with pytest.raises(Refused, match=re.escape(reason)):
        load(ENGINES[engine], config, names, constants=constants)


def tensors_in(folder: Path) -> list[str]:
    names = []
    for path in sorted(folder.glob('*.safetensors')):
        with safe_open(path, 'pt') as file:
            names += list(file.keys())
    return names


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / 'config.json').read_text('utf-8'))


# ---- tests


def test_all_are_here():
    assert sorted(ENGINES) == ['lmdeploy', 'sglang', 'vllm']
    assert {real['config']['architectures'][0] for real in REAL.values()} >= set(SERVED)
    assert all(engine['release'] in engine['source'] or '@' in engine['source'] for engine in ENGINES.values())


@pytest.mark.parametrize('engine', ENGINES)
@pytest.mark.parametrize('name', REAL)
def test_real_checkpoints_are_loaded_or_refused_as_said(name, engine):
    """Their own checkpoints: if one of these were not loaded, a rule would be wrong."""
    real = REAL[name]
    check(engine, real['config'], real_names(real['tensors']))


# A tiny original -> a real checkpoint, and the few sizes of that which an engine asks for.
TINY = {
    'internlm2': ('internlm2-chat-1_8b', ()),
    'internvl_chat': ('internvl2-2b', ()),
    'minicpmv2': ('minicpmv_2', ('hidden_size', 'query_num')),
    'points': ('points_reader_3b', ('vision_config.embed_dim',)),
}


def as_if_real(config, real, keys):
    """Settings that the tiny one leaves out are those of the real one."""
    whole = {**real, **config}
    whole |= {k: {**real[k], **v} for k, v in config.items() if isinstance(v, dict) and k in real}
    for key in keys:
        section, _, name = key.rpartition('.')
        if section:
            whole[section] = {**whole[section], name: real[section][name]}
        else:
            whole[name] = real[name]
    return whole


@pytest.mark.parametrize('model_type', TINY)
def test_what_we_write_in_the_original_layout(model_type, tiny_model, tmp_path):
    base = tiny_model(model_type)
    model, _ = load_model(str(base), dtype=torch.float32)
    write_original(LazyModel.of(model), tmp_path, base=str(base), layout=find_layout(str(base)))
    assert read(tmp_path) == read(base)
    real, keys = TINY[model_type]
    config, names = as_if_real(read(tmp_path), REAL[real]['config'], keys), tensors_in(tmp_path)
    constants = dict(tower_layers=len({name.split('.')[2] for name in names if name.startswith('vpm.blocks.')}))
    for engine in ENGINES:
        check(engine, config, names, constants=constants)


def from_the_hub(tiny_model, tmp_path):
    """As the hub's LLaVA lie: written by a transformers that had one more module in the vision tower."""
    shutil.copytree(tiny_model('llava'), tmp_path / 'llava')
    tensors, config = load_file(tmp_path / 'llava' / 'model.safetensors'), read(tmp_path / 'llava')
    named = {name.replace('vision_tower.', 'vision_tower.vision_model.'): tensor for name, tensor in tensors.items()}
    save_file(named, tmp_path / 'llava' / 'model.safetensors', metadata={'format': 'pt'})
    config['text_config']['architectures'] = ['LlamaForCausalLM']
    (tmp_path / 'llava' / 'config.json').write_text(json.dumps(config))
    return str(tmp_path / 'llava')


def from_parts(tiny_model, tmp_path):
    tower = write_tiny_tower('clip', tmp_path / 'clip')
    return find_source(dict(llm_name_or_path=str(tiny_model('qwen2')), visual_encoder_name_or_path=str(tower)))


BASES = {
    'llava': from_the_hub,
    'llava from parts': from_parts,
    'qwen2_vl': lambda tiny_model, _: str(tiny_model('qwen2_vl')),
    'internlm2': lambda tiny_model, _: str(tiny_model('internlm2')),
}


@pytest.mark.parametrize('name', BASES)
def test_what_we_write_for_transformers(name, tiny_model, tmp_path):
    base = BASES[name](tiny_model, tmp_path)
    model, _ = load_model(base, dtype=torch.float32)
    folder = tmp_path / 'written'
    folder.mkdir()
    write_processor_files(base, over=Path(base), folder=folder)
    save_model(LazyModel.of(model), folder, base=base, max_shard_size='5GB')
    for engine in ENGINES:
        check(engine, read(folder), tensors_in(folder))


# ---- the rules see what an engine would see


def changed(real, **settings):
    config = json.loads(json.dumps(real['config']))
    for key, value in settings.items():
        section, _, name = key.rpartition('__')
        (config[section] if section else config)[name] = value
    return config


@pytest.mark.parametrize(
    ('engine', 'name', 'old', 'new', 'message'),
    [
        ('vllm', 'internlm2-chat-1_8b', 'model.layers.3.feed_forward.w3.weight', None, r"only \['.w1'\] for model.lay"),
        ('vllm', 'internvl2-2b', 'language_model.output.weight', 'language_model.lm_head.weight', 'no .*lm_head'),
        ('vllm', 'minicpmv_2', 'resampler.pos_embed', None, 'nothing for resampler.pos_embed'),
        ('sglang', 'points_reader_3b', '', 'llm.lm_head.weight', 'no parameter llm.lm_head.weight'),
        ('sglang', 'internvl2-1b', 'language_model.lm_head.weight', None, 'nothing for language_model.lm_head.weight'),
        ('lmdeploy', 'internvl2-8b', 'mlp1.0.weight', 'mlp1.2.weight', 'no parameter mlp1.2.weight'),
    ],
)  # fmt: skip
def test_a_name_too_many_or_too_few(engine, name, old, new, message):
    names = [known for known in real_names(REAL[name]['tensors']) if known != old] + ([new] if new else [])
    with pytest.raises(Refused, match=message):
        load(ENGINES[engine], REAL[name]['config'], names)


@pytest.mark.parametrize(
    ('engine', 'name', 'settings', 'message'),
    [
        ('vllm', 'internlm2-chat-7b', dict(bias=True), 'bias is True, expected False'),
        ('lmdeploy', 'internlm2-chat-7b', dict(bias=True), 'nothing for model.layers.0.attention.wo.bias'),
        ('sglang', 'internvl2-26b', dict(vision_config__qk_normalization=False), 'no parameter .*q_norm.weight'),
        ('vllm', 'internvl2-26b', dict(vision_config__num_hidden_layers=44), 'no parameter .*encoder.layers.44'),
        ('vllm', 'internvl2-2b', dict(downsample_ratio=None), 'config.json lacks downsample_ratio'),
        ('vllm', 'minicpmv_2', dict(version='2.6'), 'version is 2.6, expected none'),
    ],
)  # fmt: skip
def test_a_setting_that_does_not_fit(engine, name, settings, message):
    with pytest.raises(Refused, match=message):
        load(ENGINES[engine], changed(REAL[name], **settings), real_names(REAL[name]['tensors']))


# A row of docs/engines.md -> the checkpoints that it speaks of.
ROWS = {
    'InternLM2, original': 'internlm2',
    'InternVL2 1B, 2B, 8B, 26B, original': 'internvl2-(1|2|8|26)b',
    'InternVL2 4B (Phi-3), 40B (Llama), original': 'internvl2-(4|40)b',
    'MiniCPM-V-2, original': 'minicpmv_2',
    'POINTS-Reader, original': 'points_reader',
    'POINTS-1.5 7B, original': 'points_1_5',
}


def test_the_docs_say_who_loads_what():
    table = (FIXTURES.parents[1] / 'docs' / 'engines.md').read_text('utf-8')
    lines = [[cell.strip() for cell in line.split('|')[1:-1]] for line in table.splitlines() if line.startswith('| ')]
    assert all(any(name.lower() in head.lower() for head in lines[0]) for name in ENGINES)
    assert all(any(engine['release'] in head for head in lines[0]) for engine in ENGINES.values())
    said = {label: [cell.startswith('yes') for cell in cells] for label, *cells in lines[1:]}
    order = [next(name for name in ENGINES if name in head.lower()) for head in lines[0][1:]]
    for label, pattern in ROWS.items():
        configs = [real['config'] for name, real in REAL.items() if re.match(pattern, name)]
        assert configs
        for config in configs:
            assert said[label] == [reason_for(engine, config) is None for engine in order], label
