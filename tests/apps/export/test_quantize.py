"""4-bit exports. The tests that quantise for real need the extra ``quantize``."""

import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vlmtune.apps.export.quantize import quantize
from vlmtune.data import Processor
from vlmtune.utils.errors import CheckpointError, ConfigError, ModelError

LAYER = 'model.layers.0.mlp.up_proj'
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # places of eight columns inside one int32


def refused(base: Any, output: Any, error: type[Exception], match: str, **options: Any) -> None:
    with pytest.raises(error, match=match) as caught:
        quantize(str(base), str(output), **{'method': 'gptq', 'group_size': 32, **options})
    assert '\n' not in str(caught.value)
    assert not (output.is_dir() and any(output.iterdir())) or 'not empty' in match


def test_what_cannot_be_quantised(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'auto_round', None)
    out = tmp_path / 'out'
    refused(tiny_model('llama'), out, ConfigError, r"pip install 'vlmtune\[quantize\]'")
    refused(tiny_model('points'), out, ModelError, 'is a points in a layout that transformers does not read')
    refused(tiny_model('internlm2'), out, ModelError, 'write it by --format hf first')
    refused(tiny_model('llama'), tiny_model('llama'), CheckpointError, 'not empty')
    config = json.loads((tiny_model('llama') / 'config.json').read_text())
    (tmp_path / 'done').mkdir()
    (tmp_path / 'done' / 'config.json').write_text(
        json.dumps(config | dict(quantization_config=dict(quant_method='awq')))
    )
    refused(tmp_path / 'done', out, ModelError, 'is quantised already')


RECIPE = """
from vlmtune.data import SupervisedDataset, chat_template_map_fn, llava_map_fn, load_rows

train_dataloader = dict(
    dataset=dict(type=SupervisedDataset, rows=dict(type=load_rows, path={rows!r}), image_folder={folder!r},
                 dataset_map_fn=dict(type=llava_map_fn), template_map_fn=dict(type=chat_template_map_fn),
                 max_length=512), batch_size=1)
"""


@pytest.fixture
def tuned_on(tmp_path, tiny_model, monkeypatch):
    """``tuned_on(answers, **options)``: what AutoRound is given to tune a model on rows of these answers."""

    def run(answers: list[str], *, error: type[Exception] = ModelError, match: str = 'seen', **options: Any) -> Any:
        Image.new('RGB', (60, 40), 'red').save(tmp_path / 'red.png')
        turns = [[dict(value='<image>\nWhat?', **{'from': 'human'}), dict(value=a, **{'from': 'gpt'})] for a in answers]
        rows = tmp_path / 'rows.json'
        rows.write_text(json.dumps([dict(image='red.png', conversations=both) for both in turns]))
        (tmp_path / 'recipe.py').write_text(RECIPE.format(rows=str(rows), folder=str(tmp_path)))
        given: dict[str, Any] = {}

        def take(*_: Any, **settings: Any) -> None:
            given.update(settings)
            raise ValueError('seen')

        monkeypatch.setitem(sys.modules, 'auto_round', SimpleNamespace(AutoRound=take))
        options = dict(data=str(tmp_path / 'recipe.py'), **options)
        refused(tiny_model('qwen2_5_vl'), tmp_path / 'out', error, match, **options)
        return given

    return run


def test_rows_are_joined_so_that_a_short_one_does_not_cut_the_others(tuned_on, tiny_model):
    answers = ['a', 'a long answer ' * 8, 'another one ' * 8]
    given = tuned_on(answers, max_length=32)
    shapes = {tuple(block.shape) for block in given['dataset']}
    assert shapes == {(1, 32)}
    assert given['nsamples'] == len(given['dataset']) > 2
    assert given['seqlen'] == 32
    ids = torch.cat(given['dataset'], dim=1)[0].tolist()
    processor = Processor(str(tiny_model('qwen2_5_vl')))
    assert processor.image_token_id not in ids
    text = processor.tokenizer.decode(ids)
    assert [text.count('What?'), 'a long answer a long' in text, 'another one another' in text] == [3, True, True]
    (block,) = tuned_on(answers, max_length=4096)['dataset']
    assert len(ids) <= block.shape[1] < len(ids) + 32


def test_hardly_any_text_tunes_nothing(tuned_on):
    tuned_on(['a'], error=ConfigError, match='1 rows have .* tokens of text, expected 64 at least')


def unpack(values: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Eight numbers of 4 bits from each int32: [..., N] -> [..., N, 8]."""
    return torch.stack([(values >> (4 * place)) & 15 for place in order], dim=-1)


def weights_of(folder: Any, method: str) -> torch.Tensor:
    """float[out, in] of a layer, decoded by the definition of the format."""
    packed, zeros, scales = (
        load_file(folder / 'model.safetensors')[f'{LAYER}.{n}'] for n in ('qweight', 'qzeros', 'scales')
    )
    groups = scales.shape[0]
    if method == 'gptq':  # rows of the input are packed, zero points are one too small
        values = unpack(packed).transpose(1, 2).flatten(0, 1)
        offsets = unpack(zeros).flatten(1) + 1
    else:
        values, offsets = unpack(packed, _AWQ_ORDER).flatten(1), unpack(zeros, _AWQ_ORDER).flatten(1)
    each = values.shape[0] // groups
    spread = [tensor.repeat_interleave(each, dim=0) for tensor in (offsets, scales.float())]
    return ((values - spread[0]) * spread[1]).T


@pytest.mark.slow
@pytest.mark.parametrize('method', ['awq', 'gptq'])
@pytest.mark.parametrize('family', ['llama', 'qwen2_5_vl'])
def test_weights_are_rounded_and_the_rest_stays(family, method, tiny_model, tmp_path):
    base, out = tiny_model(family), tmp_path / 'out'
    quantize(str(base), str(out), method=method, group_size=32)
    settings = json.loads((out / 'config.json').read_text())['quantization_config']
    assert (settings['quant_method'], settings['bits'], settings['group_size']) == (method, 4, 32)
    before, after = (load_file(folder / 'model.safetensors') for folder in (base, out))
    want = before[f'{LAYER}.weight']
    groups = want.unflatten(1, (-1, 32))
    spread = 2 * groups.abs().amax(-1) if method == 'gptq' else groups.amax(-1) - groups.amin(-1)
    steps = (weights_of(out, method) - want).abs() / (spread / 15).repeat_interleave(32, dim=1)
    assert steps.mean() < 0.3  # 0.25 where all are rounded to the nearest
    assert steps.max() < 2  # the largest of a group may be cut
    kept = [name for name in before if 'visual' in name or 'embed' in name or 'norm' in name or 'lm_head' in name]
    assert len(kept) > 3
    assert all(torch.equal(before[name], after[name].to(before[name].dtype)) for name in kept)
    names = {path.name for path in out.iterdir()}
    assert {'tokenizer.json', 'chat_template.jinja', 'generation_config.json', 'README.md'} <= names
    assert 'preprocessor_config.json' in names or family == 'llama'
