import json

import pytest
import torch

from vlmtune.utils import json_files
from vlmtune.utils.errors import CheckpointError, ModelError
from vlmtune.utils.json_files import read_object, write_json


def test_what_is_written_is_read(tmp_path):
    write_json(tmp_path / 'a.json', dict(z='图', a=[1], dtype=torch.float32))
    assert (tmp_path / 'a.json').read_text('utf-8').splitlines()[-2:] == ['  "z": "图"', '}']
    assert read_object(tmp_path / 'a.json') == dict(a=[1], dtype='torch.float32', z='图')


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'{', 'a.json is not valid json'),
        (b'\xff', 'a.json is not valid json'),
        (b'{"a":' * 200_000, 'a.json is not valid json'),
        (b'[1]', 'a.json holds a list, expected an object'),
        (json.dumps(dict(a='x' * 4096)).encode(), r'a.json has 4,\d+ bytes, more than any model needs'),
        (None, 'a.json cannot be read: No such file'),
    ],
)
@pytest.mark.parametrize('error', [CheckpointError, ModelError])
def test_what_is_no_object_is_one_line(content, message, error, tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, '_MOST_BYTES', 4096 if b'xx' in (content or b'') else 1 << 28)
    if content is not None:
        (tmp_path / 'a.json').write_bytes(content)
    with pytest.raises(error, match=message) as caught:
        read_object(tmp_path / 'a.json', error=error)
    assert '\n' not in str(caught.value)
