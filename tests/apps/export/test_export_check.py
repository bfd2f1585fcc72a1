"""``vlmtune export --check``: what convert writes holds, and what has gone wrong on the way shows."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlmtune.apps.export.adapter_rules import describe, verdicts
from vlmtune.apps.export.check import findings
from vlmtune.apps.export.convert import pth_to_hf
from vlmtune.apps.export.merge import merge
from vlmtune.cli import main
from vlmtune.families import find_family
from vlmtune.utils.errors import CheckpointError, ModelError

TUNE = dict(llm='lora', projector='full')


@pytest.fixture(scope='module')
def exported(trained_run, tmp_path_factory):
    """(run, its adapter, its merged model); read only."""
    made = {}

    def factory(family, tune=TUNE, **settings):
        key = repr((family, tune, settings))
        if key not in made:
            folder = tmp_path_factory.mktemp('export')
            run = trained_run(family, **settings, **tune)
            pth_to_hf(run.config, run.checkpoint, str(folder / 'adapter'))
            merge(run.base, str(folder / 'adapter'), str(folder / 'merged'), device='cpu')
            made[key] = run, folder / 'adapter', folder / 'merged'
        return made[key]

    return factory


def look(folder, run=None):
    trained = None if run is None else (run.config, run.checkpoint)
    return list(findings(str(folder), trained=trained))


def wrong(found):
    return [f'{finding.what}: {finding.text}' for finding in found if finding.kind == 'wrong']


def said(found, what):
    (text,) = [finding.text for finding in found if finding.what == what]
    return text


# ---- what holds


@pytest.mark.parametrize(
    ('family', 'settings'),
    [('llava', {}), ('llava', dict(quantization='nf4')), ('qwen2_5_vl', {}), ('internlm2', {})],
)
def test_a_merged_model_holds(exported, family, settings):
    run, _, merged = exported(family, TUNE if family != 'internlm2' else dict(llm='lora'), **settings)
    found = look(merged, run)
    assert wrong(found) == []
    assert {'weights', 'token ids', 'stop tokens', 'logits'} <= {
        finding.what for finding in found if finding.kind == 'ok'
    }
    pictures = [finding for finding in found if finding.what == 'pixels']
    assert [finding.kind for finding in pictures] == ([] if family == 'internlm2' else ['ok'])


def test_a_processor_that_writes_a_part_of_the_prompt_itself_writes_the_one_of_the_training(exported):
    run, _, merged = exported('paligemma', dict(llm='lora'))
    found = look(merged, run)
    assert wrong(found) == []
    assert next(finding.text for finding in found if 'AutoProcessor' in finding.text).endswith('equal')


@pytest.mark.parametrize(('family', 'settings'), [('llava', {}), ('qwen2_5_vl', dict(quantization='nf4'))])
def test_an_adapter_holds(exported, family, settings):
    run, adapter, _ = exported(family, dict(llm='lora'), **settings)
    found = look(adapter, run)
    assert wrong(found) == []
    assert 'away from those of the trained model' in said(found, 'logits')
    assert {'vLLM 0.33.0', 'SGLang 0.5.23', 'LMDeploy 0.16.0'} <= {finding.what for finding in found}


def test_new_tokens_hold(exported):
    tune = dict(llm='lora', embeddings='full', lm_head='full')
    run, _, merged = exported('llava', tune, special_tokens=('<ref>', '</ref>'))
    assert wrong(look(merged, run)) == []


@pytest.mark.parametrize(
    ('family', 'layout', 'settings'),
    [('internlm2', 'InternLM2', None), ('minicpmv2', 'MiniCPM-V 2.0', dict(max_slice_nums=1))],
)
def test_an_original_layout_holds(trained_run, tmp_path, family, layout, settings):
    run = trained_run(family, llm='full', image_processor=settings)
    pth_to_hf(run.config, run.checkpoint, str(tmp_path / 'out'), file_format='original')
    found = look(tmp_path / 'out', run)
    assert wrong(found) == []
    assert f'the layout of {layout}' in said(found, 'classes')
    assert said(found, 'token ids').endswith('equal')
    if settings:
        assert 'max_slice_nums is 4 in its files, and was 1 in training; set' in said(found, 'image settings')


def test_the_command_says_so(exported, capsys):
    run, _, merged = exported('llava')
    assert main(['export', '--check', str(merged), '--trained', run.config, run.checkpoint]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f'{merged} holds'
    assert any(line.startswith('ok     logits: ') for line in lines)
    assert main(['export', '--check', str(merged)]) == 0  # without the checkpoint: on its own
    assert 'note   logits: finite; give --trained' in capsys.readouterr().out


# ---- what has gone wrong


@pytest.fixture
def copy(exported, tmp_path):
    def factory(family='llava', which=2, **settings):
        made = exported(family, **settings)
        shutil.copytree(made[which], tmp_path / 'copy')
        return made[0], tmp_path / 'copy'

    return factory


def test_the_config_says_where_the_base_model_went(exported, rewrite, tmp_path):
    run, _, merged = exported('llava')
    moved = rewrite(run, tmp_path, lambda text: text.replace(run.base, str(tmp_path / 'gone')))
    assert wrong(list(findings(str(merged), trained=(run.config, str(moved))))) == []


def test_of_a_quantised_export_the_files_are_looked_at(copy):
    run, folder = copy('llava')
    config = json.loads((folder / 'config.json').read_text())
    config['quantization_config'] = dict(quant_method='awq', bits=4, group_size=32, zero_point=True)
    (folder / 'config.json').write_text(json.dumps(config))
    for trained in (run, None):
        found = look(folder, trained)
        assert wrong(found) == []
        assert 'they are quantised, so neither they nor logits are compared' in said(found, 'weights')
        assert {'token ids', 'pixels', 'stop tokens'} == {finding.what for finding in found if finding.kind == 'ok'}
    (folder / 'chat_template.jinja').write_text('{{ messages[0]["role"] }}')
    assert any(text.startswith('token ids') for text in wrong(look(folder, run)))
    (folder / 'model.safetensors').unlink()
    with pytest.raises(ModelError, match='holds no weights'):
        look(folder, run)


def test_an_export_without_its_training(exported):
    run, _, _ = exported('llava')
    (text,) = wrong(look(run.base, run))[-1:]
    assert text.startswith('logits: ')
    assert 'it is another model' in text


def test_a_change_that_rounding_could_hide(copy, monkeypatch):
    """A model that learned less than its dtype keeps apart: the base passes every bound, and holds nothing of it."""
    run, folder = copy()
    monkeypatch.setattr('vlmtune.apps.export.check._LIMITS', {torch.float32: 10.0})
    shutil.rmtree(folder)
    shutil.copytree(run.base, folder)
    assert 'what was learned is not in it, or was rounded away' in wrong(look(folder, run))[-1]


def test_a_weight_that_is_missing_or_too_many(copy):
    _, folder = copy()
    file = folder / 'model.safetensors'
    tensors = load_file(file)
    tensors['extra.weight'] = tensors.pop(next(name for name in tensors if 'q_proj' in name))
    save_file(tensors, file, metadata={'format': 'pt'})
    (text,) = [line for line in wrong(look(folder)) if line.startswith('weights')]
    assert '1 missing keys' in text
    assert '1 unexpected keys (first: extra.weight)' in text


def test_another_base(exported, tiny_model, copy):
    run, _, _ = exported('llava')
    wide = tiny_model('llava', text_config={'intermediate_size': 192})
    (text,) = wrong(look(wide, run))
    assert 'it is of another base' in text


def test_another_template(copy):
    run, folder = copy()
    file = folder / 'chat_template.jinja'
    file.write_text(file.read_text().replace('USER:', 'HUMAN:'))
    assert [line.partition(':')[0] for line in wrong(look(folder, run))][:2] == ['token ids', 'token ids']
    assert wrong(look(folder)) == []  # on its own it is a model like others


def test_another_resolution(copy):
    run, folder = copy('qwen2_5_vl')
    for name in ('preprocessor_config.json', 'processor_config.json'):
        if (folder / name).is_file():
            content = json.loads((folder / name).read_text())
            for settings in (content, content.get('image_processor', {})):
                if 'max_pixels' in settings or 'size' in settings:
                    settings['max_pixels'] = 28 * 28 * 4
                    settings['size'] = {'shortest_edge': 28 * 28 * 4, 'longest_edge': 28 * 28 * 4}
            (folder / name).write_text(json.dumps(content))
    assert any('preprocessor_config.json has other sizes' in line for line in wrong(look(folder, run)))


def test_answers_that_would_not_end(copy):
    _, folder = copy()
    file = folder / 'generation_config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(eos_token_id=0)))
    assert any('eos_token_id of generation_config.json lacks' in line for line in wrong(look(folder)))


def test_a_file_that_older_programs_read(copy):
    _, folder = copy()
    image = json.loads((folder / 'preprocessor_config.json').read_text())
    (folder / 'preprocessor_config.json').unlink()
    (folder / 'processor_config.json').write_text(json.dumps(dict(image_processor=image)))  # the newer way
    assert 'files: preprocessor_config.json is missing, which older programs read' in wrong(look(folder))


def test_what_cannot_be_loaded_is_one_line(copy, tmp_path):
    run, adapter = copy(which=1)
    tensors = load_file(adapter / 'adapter_model.safetensors')
    tensors.pop(next(iter(tensors)))
    save_file(tensors, adapter / 'adapter_model.safetensors', metadata={'format': 'pt'})
    with pytest.raises(CheckpointError, match='1 are missing'):
        look(adapter)
    with pytest.raises(ModelError, match='no model at'):
        look(tmp_path / 'none')
    with pytest.raises(CheckpointError):
        list(findings(str(adapter), trained=(run.config, str(tmp_path / 'iter_9.pth'))))


# ---- engines and adapters


NAMES = [f'base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_{x}.weight' for x in 'AB']
PLAIN = dict(r=8, lora_alpha=16, target_modules=['q_proj'])


def reasons(settings, names=NAMES, family='qwen2_5_vl', **kwargs):
    adapter = describe(PLAIN | settings, names, family=find_family(family), **kwargs)
    return {verdict.engine.split()[0]: verdict for verdict in verdicts(adapter)}


def test_a_plain_adapter_is_taken():
    found = reasons({})
    assert [bool(verdict.reasons) for verdict in found.values()] == [False, False, True]  # LMDeploy: its own names
    text = [name.replace('language_model.', '') for name in NAMES]
    assert not any(verdict.reasons for verdict in reasons({}, text, 'llama').values())
    assert found['vLLM'].options == ('--enable-lora',)


@pytest.mark.parametrize(
    ('settings', 'refusing', 'reason'),
    [
        (dict(modules_to_save=['lm_head']), {'vLLM', 'SGLang', 'LMDeploy'}, 'modules_to_save'),
        (dict(use_dora=True), {'vLLM', 'SGLang', 'LMDeploy'}, 'DoRA is not supported'),
        (dict(rank_pattern={'x': 4}), {'vLLM', 'SGLang', 'LMDeploy'}, 'one alpha / r'),
        (dict(use_rslora=True), {'SGLang', 'LMDeploy'}, 'rsLoRA'),
        (dict(target_modules='.*q_proj'), {'SGLang', 'LMDeploy'}, 'regular expression'),
    ],
)
def test_what_an_engine_does_not_take(settings, refusing, reason):
    text = [name.replace('language_model.', '') for name in NAMES]
    found = reasons(settings, text, 'llama')
    assert {name for name, verdict in found.items() if verdict.reasons} == refusing
    assert all(reason in ' '.join(found[name].reasons) for name in refusing)


def test_what_vllm_needs_to_be_told():
    vision = [f'base_model.model.model.visual.blocks.0.attn.proj.lora_{x}.weight' for x in 'AB']
    found = reasons(dict(r=40), NAMES + vision)
    assert found['vLLM'].options == ('--enable-lora', '--max-lora-rank 64', '--enable-tower-connector-lora')
    assert any('passed over' in reason for reason in found['SGLang'].reasons)


def test_names_that_are_no_lora():
    bad = reasons({}, [*NAMES, 'base_model.model.lm_head.weight'])
    assert all('base_model.model.lm_head.weight is no LoRA A or B' in ' '.join(v.reasons) for v in bad.values())
    fused = reasons({}, is_fused=True)
    assert all('original layout' in ' '.join(v.reasons) for v in fused.values())
