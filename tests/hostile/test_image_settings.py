"""Numbers of an image processor that are none, in a stranger's files and in a config: one line that names them."""

import json
import shutil

import pytest

from vlmtune.data import Processor
from vlmtune.utils.errors import ConfigError, ModelError

IMAGE_FILE = 'preprocessor_config.json'
FOR_ALL = {'image_mean': [1], 'image_std': [0, 1, 1], 'rescale_factor': 'x', 'resample': 99}
OF_FAMILIES = {
    'qwen2_vl': [
        ('max_pixels', 0),
        ('patch_size', 0),
        ('merge_size', 0),
        ('merge_size', 1 << 40),
        ('min_pixels', 10**12),
        ('max_pixels', 3000),  # the files say at least 3136
        ('max_pixels', None),
    ],
    'qwen3_vl': [('max_pixels', 3), ('size', {'shortest_edge': 0, 'longest_edge': 4096})],
    'points': [('max_pixels', 'many'), ('patch_size', 14.5)],
    'internvl': [('max_patches', value) for value in ('many', 2.5, None, 0, -1, True, 10**9)] + [('min_patches', 7)],
    'minicpmv2': [('max_slice_nums', 0), ('max_slice_nums', 10**9), ('scale_resolution', 'x'), ('patch_size', 0)],
    'smolvlm': [('size', {'longest_edge': 10**9}), ('max_image_size', {'longest_edge': 0})],
    'llava': [('crop_size', {'height': -1, 'width': 42}), ('size', {'shortest_edge': 'x'})],
    'llava_next': [('image_grid_pinpoints', 5), ('image_grid_pinpoints', [[28, 0]])],
    'gemma3': [('size', {'height': 10**9, 'width': 10**9}), ('image_seq_length', 'x')],
}
CASES = [(name, key, value) for name, cases in OF_FAMILIES.items() for key, value in cases]
CASES += [(name, key, value) for name in OF_FAMILIES for key, value in FOR_ALL.items()]
# MiniCPM-V's own file has other names for these; no value is as good as no key.
IN_FILES = [case for case in CASES if case[2] is not None and not (case[0] == 'minicpmv2' and case[1] in FOR_ALL)]


@pytest.mark.parametrize(('name', 'key', 'value'), CASES)
def test_a_setting_of_a_config(name, key, value, tiny_model, refused):
    with refused(f'^image_processor: (size|max_patches|{key})=.*; expected', ConfigError):
        Processor(str(tiny_model(name)), image_processor={key: value})


@pytest.mark.parametrize(('name', 'key', 'value'), IN_FILES)
def test_a_setting_of_a_file(name, key, value, tiny_model, tmp_path, refused):
    folder = shutil.copytree(tiny_model(name), tmp_path / name)
    path = folder / IMAGE_FILE
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, key: value}))
    with refused(f'^{folder}: {IMAGE_FILE}: (size|max_patches|{key})=.*; expected', ModelError):
        Processor(str(folder))


@pytest.mark.parametrize(
    'content', [{'size': {'min_pixels': 3136, 'max_pixels': 12845056}}, {'min_pixels': None, 'size': None}], ids=str
)
def test_forms_that_older_files_have(content, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model('qwen2_vl'), tmp_path / 'qwen2_vl')
    kept = json.loads((folder / IMAGE_FILE).read_text())
    (folder / IMAGE_FILE).write_text(json.dumps({**kept, **content}))
    assert Processor(str(folder), image_processor={'max_pixels': 100_000}).image_processor.size['longest_edge'] == 10**5
