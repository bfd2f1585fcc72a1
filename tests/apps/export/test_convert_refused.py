"""What cannot be exported is refused in one line, and nothing is left of it."""

import json
import shutil
from pathlib import Path

import pytest

from vlmtune.apps.export.convert import pth_to_hf
from vlmtune.utils.errors import CheckpointError, ConfigError, ModelError, UserError

LORA = dict(llm='lora')


# ---- what cannot be exported


def refused(run, output, error, match, **options):
    before = sorted(str(path) for path in output.parent.rglob('*'))
    with pytest.raises(error, match=match) as caught:
        pth_to_hf(options.pop('config', run.config), options.pop('checkpoint', run.checkpoint), str(output), **options)
    assert '\n' not in str(caught.value)
    assert sorted(str(path) for path in output.parent.rglob('*')) == before


def test_a_folder_that_is_not_empty_is_left_alone(trained_run, tmp_path):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'mine.txt').write_text('mine')
    refused(trained_run('llama', **LORA), tmp_path / 'out', CheckpointError, 'not empty')


def test_wrong_options_are_refused(trained_run, tmp_path):
    run, out = trained_run('llama', **LORA), tmp_path / 'out'
    refused(run, out, ConfigError, 'float32, bfloat16, float16', dtype='int8')
    refused(run, out, ConfigError, '5GB', max_shard_size='five')
    refused(run, out, ConfigError, 'no checkpoint in an original layout of llama', file_format='original')
    refused(run, out, ConfigError, 'hf or original', file_format='gguf')
    refused(run, out, ConfigError, 'cpu, cuda or auto', device='tpu')
    refused(run, out, ConfigError, 'not found', config='nowhere/recipe.py')


def test_a_broken_checkpoint_is_refused(trained_run, tmp_path):
    run = trained_run('llama', **LORA)
    refused(run, tmp_path / 'out', CheckpointError, 'none', checkpoint=str(tmp_path / 'none'))
    broken = tmp_path / 'iter_2.pth'
    shutil.copytree(run.checkpoint, broken)
    with (broken / 'model.safetensors').open('r+b') as file:
        file.seek(-1, 2)
        file.write(b'\x7f')
    refused(run, tmp_path / 'out', CheckpointError, 'sha256', checkpoint=str(broken))
    (broken / 'manifest.json').unlink()
    refused(run, tmp_path / 'out', CheckpointError, 'not finished', checkpoint=str(broken))


def test_a_checkpoint_of_another_model_is_refused(trained_run, tiny_model, tmp_path, rewrite_base):
    run = trained_run('llama', **LORA)
    path = rewrite_base(run, tiny_model('qwen2_5_vl'), tmp_path)
    refused(run, tmp_path / 'out', CheckpointError, 'was not trained from', checkpoint=str(path))


def test_the_config_says_where_a_base_model_went(trained_run, tmp_path, rewrite_base):
    run = trained_run('llama', **LORA)
    path = rewrite_base(run, tmp_path / 'gone', tmp_path)
    pth_to_hf(run.config, str(path), str(tmp_path / 'out'))
    assert json.loads((tmp_path / 'out' / 'adapter_config.json').read_text())['base_model_name_or_path'] == run.base
    text = Path(run.config).read_text().replace(run.base, str(tmp_path / 'gone_too'))
    (tmp_path / 'recipe.py').write_text(text)
    refused(run, tmp_path / 'out2', ModelError, 'no model at', checkpoint=str(path), config=str(tmp_path / 'recipe.py'))


def test_nothing_in_a_checkpoint_is_executed(trained_run, tmp_path, rewrite):
    run = trained_run('llama', **LORA)
    evil = f'import pathlib\npathlib.Path({str(tmp_path / "ran")!r}).touch()\n'
    path = rewrite(run, tmp_path, lambda text: evil + text)
    pth_to_hf(run.config, str(path), str(tmp_path / 'out'))
    assert not (tmp_path / 'ran').exists()


def test_files_that_were_added_later_are_not_read(trained_run, tmp_path, rewrite):
    """The processor's folder is read as a whole; an adapter_config.json that no manifest lists is nobody's."""
    run = trained_run('llama', **LORA)
    path = rewrite(run, tmp_path, lambda text: text)
    (path / 'notes.txt').write_text('mine')
    pth_to_hf(run.config, str(path), str(tmp_path / 'out'))
    (path / 'processor' / 'chat_template.jinja.bak').write_text('{{ evil }}')
    refused(
        run, tmp_path / 'out2', CheckpointError, 'processor/chat_template.jinja.bak was added after it was saved',
        checkpoint=str(path),
    )  # fmt: skip


def test_nothing_is_left_of_an_export_that_fails_midway(trained_run, tmp_path, rewrite_base):
    run = trained_run('llama', llm='full')
    base = tmp_path / 'base'
    shutil.copytree(run.base, base)
    (base / 'model.safetensors').unlink()
    path = rewrite_base(run, base, tmp_path)
    (tmp_path / 'place').mkdir()
    refused(run, tmp_path / 'place' / 'out', UserError, 'holds no weights', checkpoint=str(path))
