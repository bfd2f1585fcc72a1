"""Models and adapters of strangers: code beside the weights, headers that lie, settings that name programs."""

import json
import shutil
import struct
from contextlib import suppress

import pytest
from safetensors.torch import load_file, save_file

from vlmtune.apps.chat import chat
from vlmtune.apps.export.check import findings
from vlmtune.apps.train import train
from vlmtune.data import Processor
from vlmtune.models.loading import load_model
from vlmtune.utils.errors import CheckpointError, ConfigError, ModelError

COMMIT = '0123456789abcdef0123456789abcdef01234567'
CODE = """
open({mark!r}, 'w').close()
from transformers import {base}

class Evil({base}):
    pass
"""


def edit(path, **changes):
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **changes}))


@pytest.fixture
def model(tiny_model, tmp_path):
    return shutil.copytree(tiny_model('qwen2'), tmp_path / 'model')


# ---- code beside the weights


@pytest.fixture
def with_code(model, mark):
    """A model whose config, tokenizer and model class are to be taken from files of its own."""
    for name, base in (
        ('configuration', 'Qwen2Config'),
        ('tokenization', 'PreTrainedTokenizerFast'),
        ('modeling', 'Qwen2ForCausalLM'),
    ):
        (model / f'{name}_evil.py').write_text(CODE.format(mark=str(mark), base=base))
    edit(
        model / 'config.json',
        auto_map={'AutoConfig': 'configuration_evil.Evil', 'AutoModelForCausalLM': 'modeling_evil.Evil'},
    )
    edit(
        model / 'tokenizer_config.json',
        auto_map={'AutoTokenizer': ['tokenization_evil.Evil', 'tokenization_evil.Evil']},
        tokenizer_class='Evil',
    )
    return model


def test_code_beside_the_weights_is_not_run(with_code, recipe, harmless, tmp_path):
    with harmless():
        train(recipe(model=with_code), work_dir=str(tmp_path / 'work'))


@pytest.mark.parametrize('kind', ['evil', 'qwen2'])
def test_it_is_run_where_that_was_asked_for(kind, with_code, mark):
    """The other half of the test above: this code does leave a mark."""
    edit(with_code / 'config.json', model_type=kind)
    assert not mark.exists()
    if kind == 'evil':  # a class that transformers does not know is asked for by name
        with pytest.raises(ModelError):
            load_model(str(with_code))
        assert not mark.exists()
    with suppress(ModelError):  # its vocabulary is not read: the class is empty
        Processor(str(with_code), trust_remote_code=True)
    assert mark.exists()


def test_the_check_of_an_export_asks_nobody_whether_to_run_it(tiny_model, harmless, mark, monkeypatch, tmp_path):
    model = shutil.copytree(tiny_model('llava'), tmp_path / 'model')
    (model / 'evil.py').write_text(CODE.format(mark=str(mark), base='ProcessorMixin'))
    edit(model / 'processor_config.json', auto_map={'AutoProcessor': 'evil.Evil'}, processor_class='Evil')
    monkeypatch.setattr('builtins.input', lambda *_: 'y')  # what transformers would ask
    with harmless():
        list(findings(str(model)))


@pytest.mark.parametrize('revision', [None, 'main', 'v1.0', COMMIT[:12], COMMIT.upper()])
@pytest.mark.parametrize('build', [Processor, load_model])
def test_code_of_the_hub_needs_a_commit(build, revision):
    with pytest.raises(ConfigError, match='expected the commit whose code you have read, 40 hexadecimal digits'):
        build('org/name', trust_remote_code=True, revision=revision)


def test_the_settings_reach_both_from_a_config(recipe, refused, tmp_path):
    for part in ('processor', 'model'):
        with refused('expected the commit whose code you have read', ConfigError):
            overrides = {f'{part}.trust_remote_code': True, f'{part}.pretrained_model_name_or_path': 'org/name'}
            train(recipe(), work_dir=str(tmp_path / 'work'), overrides=overrides)


@pytest.mark.parametrize('name', ['os.system', '../../evil.Evil', 'subprocess', '__import__("os")'])
@pytest.mark.parametrize(
    ('file', 'key'),
    [
        ('preprocessor_config.json', 'image_processor_type'),
        ('processor_config.json', 'processor_class'),
        ('tokenizer_config.json', 'tokenizer_class'),
        ('config.json', 'model_type'),
    ],
)
def test_a_class_that_is_named_like_a_program(file, key, name, tiny_model, harmless, tmp_path):
    folder = shutil.copytree(tiny_model('llava'), tmp_path / 'model')
    edit(folder / file, **{key: name})
    with harmless():
        Processor(str(folder))


# ---- headers that lie


def header(content, length=None):
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack('<Q', len(data) if length is None else length) + data + bytes(64)


LIES = {
    'a header of an exabyte': header(b'{}', length=2**60),
    'a header behind the end': header(b'{}', length=10**6),
    'no JSON': header(b'\xff' * 64),
    'nested JSON': header(b'{"a":' * 50_000),
    'a tensor of a petabyte': header({'a': dict(dtype='F32', shape=[2**48], data_offsets=[0, 2**50])}),
    'more values than bytes': header({'a': dict(dtype='F32', shape=[2**40], data_offsets=[0, 64])}),
    'a shape that overflows': header({'a': dict(dtype='F32', shape=[2**33, 2**33], data_offsets=[0, 64])}),
    'a negative offset': header({'a': dict(dtype='F32', shape=[16], data_offsets=[-64, 0])}),
    'two tensors in one place': header({n: dict(dtype='F32', shape=[16], data_offsets=[0, 64]) for n in 'ab'}),
    'an unknown dtype': header({'a': dict(dtype='OBJ', shape=[16], data_offsets=[0, 64])}),
    'nothing': b'',
    'a pickle': b'\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R.',
}


@pytest.fixture(scope='module')
def adapter(tiny_model, tmp_path_factory):
    """An adapter as PEFT writes it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder, base = tmp_path_factory.mktemp('adapter'), str(tiny_model('qwen2'))
    config = LoraConfig(r=2, target_modules=['q_proj'], task_type='CAUSAL_LM')
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize('name', LIES)
def test_weights_that_lie(name, model, adapter, refused, recipe, tmp_path):
    (model / 'model.safetensors').write_bytes(LIES[name])
    with refused(error=ModelError):
        chat(str(model), prompt='hello')
    folder = shutil.copytree(adapter, tmp_path / 'adapter')
    (folder / 'adapter_model.safetensors').write_bytes(LIES[name])
    with refused('cannot be read as a safetensors file', ModelError):
        train(recipe(), work_dir=str(tmp_path / 'work'), overrides=dict(load_from=str(folder)))


# ---- adapters


@pytest.mark.parametrize(
    'settings',
    [
        dict(auto_mapping=dict(base_model_class='system', parent_library='os')),
        dict(auto_mapping=dict(base_model_class='Evil', parent_library='evil')),
        dict(peft_type='../../evil'),
        dict(task_type='os.system'),
        dict(megatron_core='evil', megatron_config={'a': 1}),
        dict(r='__import__("os")'),
        dict(target_modules={'a': 'b'}),
        dict(base_model_name_or_path='/proc/self/mem'),
    ],
    ids=str,
)
def test_settings_of_an_adapter_that_name_programs(settings, adapter, mark, model, harmless, monkeypatch, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / 'adapter')
    edit(folder / 'adapter_config.json', **settings)
    (tmp_path / 'evil.py').write_text(CODE.format(mark=str(mark), base='Qwen2ForCausalLM'))
    monkeypatch.syspath_prepend(tmp_path)
    with harmless():
        chat(str(model), adapter=str(folder), prompt='hello', max_new_tokens=1)


def test_an_adapter_as_a_pickle(adapter, refused, recipe, model, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / 'adapter')
    (folder / 'adapter_model.safetensors').rename(folder / 'adapter_model.bin')
    with refused('adapters in other formats are not read', CheckpointError):
        train(recipe(), work_dir=str(tmp_path / 'work'), overrides=dict(load_from=str(folder)))
    with refused('adapters in other formats are not read', CheckpointError):
        chat(str(model), adapter=str(folder), prompt='hello')


def test_a_model_that_is_what_it_says(model, bounded, capsys):
    """The fixtures of this file do work where nothing is wrong."""
    save_file(load_file(model / 'model.safetensors'), model / 'model.safetensors', metadata={'format': 'pt'})
    with bounded():
        chat(str(model), prompt='hello', max_new_tokens=2)
