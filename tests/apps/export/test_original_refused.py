"""``--format original`` writes nothing where the files of the base cannot say what was trained."""

import shutil
from dataclasses import replace

import pytest
import torch

from vlmtune.apps.export.convert import pth_to_hf
from vlmtune.apps.export.merge import merge
from vlmtune.apps.export.options import choose_layout
from vlmtune.apps.export.original import changed_files, write_original
from vlmtune.data import Processor
from vlmtune.families import FAMILIES
from vlmtune.layouts import find_layout
from vlmtune.models import load_model
from vlmtune.models.lazy_model import LazyModel
from vlmtune.utils.errors import CheckpointError, ConfigError, ModelError

LORA = dict(llm='lora')
WEIGHTS = ('model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors')


@pytest.fixture(scope='module')
def run(trained_run, internlm2):
    return trained_run('internlm2', base=internlm2, **LORA)


@pytest.fixture(scope='module')
def adapter(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp('adapter') / 'adapter'
    pth_to_hf(run.config, run.checkpoint, str(folder))
    return folder


# ---- what cannot be written


def refused(base, adapter, output, error, match, **options):
    with pytest.raises(error, match=match) as caught:
        merge(str(base), str(adapter), str(output), device='cpu', file_format='original', **options)
    assert '\n' not in str(caught.value)
    assert not output.exists()
    assert not list(output.parent.glob(f'.{output.name}*'))


def test_an_adapter_has_no_original_layout(run, tmp_path):
    with pytest.raises(ConfigError, match='holds an adapter, which does not fit .* --format original'):
        pth_to_hf(run.config, run.checkpoint, str(tmp_path / 'x'), file_format='original')


@pytest.mark.parametrize('layouts', [(), FAMILIES['points'].layouts])
def test_a_family_of_ours_whose_base_lies_as_our_class_writes_it(layouts, tiny_model):
    family, base = replace(FAMILIES['points'], layouts=layouts), str(tiny_model('qwen2'))
    assert choose_layout(None, base=base, family=family, dtype='float16') is None
    for asked in ('hf', 'original'):
        with pytest.raises(ConfigError, match=f'--format {asked}: .*; leave --format out'):
            choose_layout(asked, base=base, family=family)


def test_dtypes_are_those_of_the_base(internlm2, adapter, tmp_path):
    refused(internlm2, adapter, tmp_path / 'x', ConfigError, '--dtype float16: .* leave it out', dtype='float16')


def test_a_base_in_the_layout_of_transformers(internlm2, adapter, tiny_model, tmp_path):
    refused(tiny_model('llama'), adapter, tmp_path / 'x', ConfigError, r'no checkpoint in an original .*\(internlm2\)')


def test_tokens_that_the_files_of_the_base_do_not_know(internlm2, trained_run, tmp_path):
    run = trained_run('internlm2', base=internlm2, special_tokens=('<ref>',), embeddings='full', lm_head='full', **LORA)
    pth_to_hf(run.config, run.checkpoint, str(tmp_path / 'adapter'))
    refused(internlm2, tmp_path / 'adapter', tmp_path / 'x', ConfigError, r'1 tokens were added \(first: <ref>\)')


def test_new_tokens_of_a_model_that_has_no_other_layout(tiny_model, tmp_path):
    base = str(tiny_model('points'))
    processor = Processor(base)
    processor.tokenizer.add_tokens(['<ref>'])
    processor.save(tmp_path / 'more')
    with pytest.raises(ConfigError, match=r'first: <ref>\).*; use the adapter unmerged, or train without new tokens'):
        changed_files(base, over=tmp_path / 'more')


def test_a_head_of_its_own_where_the_base_has_none(tiny_model, tmp_path):
    base = str(tiny_model('points'))
    model, _ = load_model(base, dtype=torch.float32)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1)
    with pytest.raises(ModelError, match=r'no place for lm_head.weight; embeddings and head were trained apart'):
        write_original(LazyModel.of(model), tmp_path, base=base, layout=find_layout(base))
    assert not list(tmp_path.iterdir())


def test_a_shard_that_is_missing(internlm2, adapter, tmp_path):
    base = shutil.copytree(internlm2, tmp_path / 'base')
    (base / WEIGHTS[1]).unlink()
    refused(base, adapter, tmp_path / 'x', ModelError, f'lacks {WEIGHTS[1]}, one of 2 files')


def test_a_link_that_leads_out_of_the_base(internlm2, adapter, tmp_path):
    """Whoever publishes the export would publish what it leads to."""
    base = shutil.copytree(internlm2, tmp_path / 'base')
    (tmp_path / 'secret').write_text('token')
    (base / 'NOTICE').symlink_to(tmp_path / 'secret')
    refused(base, adapter, tmp_path / 'x', CheckpointError, 'NOTICE is a link that leads out of')
