"""Stretches of weights are those of the flattened tensor; a file that does not fit is refused in words."""

import pytest
import torch
from safetensors.torch import save_file

from vlmtune.engine.trainable_file import TrainableFile
from vlmtune.utils.errors import CheckpointError
from vlmtune.utils.tensor_file import layout_of

WEIGHTS = {'cube': torch.randn(4, 3, 5), 'flat': torch.randn(17), 'number': torch.randn(()), 'wide': torch.randn(2, 40)}
LAYOUT = {name: layout_of(weight) for name, weight in WEIGHTS.items()}


@pytest.fixture
def path(tmp_path):
    save_file(WEIGHTS, tmp_path / 'model.safetensors')
    return tmp_path / 'model.safetensors'


@pytest.mark.parametrize('name', WEIGHTS)
def test_every_stretch(name, path):
    flat = WEIGHTS[name].flatten()
    with TrainableFile(path, layout=LAYOUT) as file:
        assert torch.equal(file.whole(name), WEIGHTS[name])
        for start in range(len(flat) + 1):
            for numel in range(len(flat) - start + 1):
                assert torch.equal(file.stretch(name, start=start, numel=numel), flat[start : start + numel])


def test_other_names(path):
    message = r"1 tensors are missing \(first: \['more'\]\), 1 are not trained here \(first: \['wide'\]\)"
    layout = {name: entry for name, entry in LAYOUT.items() if name != 'wide'} | {'more': LAYOUT['flat']}
    with pytest.raises(CheckpointError, match=message):
        TrainableFile(path, layout=layout)


def test_more_names_than_train_here(path):
    with pytest.raises(CheckpointError, match=r'0 tensors are missing .*, 1 are not trained here'):
        TrainableFile(path, layout={name: entry for name, entry in LAYOUT.items() if name != 'wide'})


def test_other_shapes(path):
    with pytest.raises(CheckpointError, match=r'wide is \(2, 40\) in the checkpoint, \(17,\) here; use the config'):
        TrainableFile(path, layout={**LAYOUT, 'wide': LAYOUT['flat']})


@pytest.mark.parametrize('content', [None, b'', b'no safetensors file'])
def test_no_such_file(content, tmp_path):
    path = tmp_path / 'model.safetensors'
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match='cannot be read as a safetensors file'):
        TrainableFile(path, layout=LAYOUT)
