"""Checkpoints that were quantised for serving: what reads them, and what is said where that is missing."""

import json
import shutil

import pytest

from vlmtune.layouts import read_config
from vlmtune.models import load_model
from vlmtune.models import quantization as quantization_module
from vlmtune.models.quantization import stored_quantization
from vlmtune.utils.errors import ConfigError

AWQ = dict(quant_method='awq', bits=4, group_size=128, version='gemm', zero_point=True)


@pytest.fixture
def quantized(tiny_model, tmp_path):
    """``quantized(quant_method='awq')``: the folder of a checkpoint that says so; its weights are plain."""

    def factory(**settings):
        folder = tmp_path / 'model'
        shutil.copytree(tiny_model('llama'), folder)
        config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
        (folder / 'config.json').write_text(json.dumps(config | dict(quantization_config=settings)), encoding='utf-8')
        return str(folder)

    return factory


@pytest.mark.parametrize(('method', 'package'), [('awq', 'gptqmodel'), ('gptq', 'optimum')])
def test_a_missing_package_is_told_with_the_command_that_installs_it(quantized, monkeypatch, method, package):
    path = quantized(**AWQ | dict(quant_method=method))
    monkeypatch.setattr(quantization_module.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ConfigError, match=f'holds {method} weights, which need the package {package}; pip install'):
        load_model(path)


def test_what_is_quantised_already_is_not_quantised_again(quantized):
    with pytest.raises(ConfigError, match=r"is quantised already \(awq\); leave out quantization='nf4' \(--bits\)"):
        load_model(quantized(**AWQ), quantization='nf4')


def test_where_the_packages_are_the_checkpoint_is_read(quantized, monkeypatch):
    monkeypatch.setattr(quantization_module.importlib.util, 'find_spec', lambda name: name)
    assert stored_quantization(read_config(quantized(**AWQ))) == 'awq'


def test_a_plain_checkpoint_has_none(tiny_model):
    assert stored_quantization(read_config(str(tiny_model('llama'))), asked='nf4') is None
