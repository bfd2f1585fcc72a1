import pytest

from vlmtune.utils.errors import ModelError
from vlmtune.utils.pretrained import load_pretrained


class Unreachable:
    """In place of an Auto class: the hub cannot be reached."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        raise OSError("we couldn't connect")


def test_a_name_that_is_no_folder_is_told_to_be_taken_for_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.setattr('vlmtune.utils.pretrained.hub_answers', lambda: True)
    with pytest.raises(
        ModelError, match=r'cannot load models/mine \(no folder here, so taken for a hub id\) with Unr.*connect'
    ):
        load_pretrained(Unreachable, 'models/mine')
    (tmp_path / 'config.json').write_text('{}')
    with pytest.raises(ModelError, match=rf'cannot load {tmp_path} with Unreachable'):
        load_pretrained(Unreachable, str(tmp_path))


@pytest.mark.parametrize('has_config', [True, False])
def test_an_adapter_is_no_model(has_config, tmp_path):
    if has_config:
        (tmp_path / 'config.json').write_text('{}')
    (tmp_path / 'adapter_config.json').write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')
    with pytest.raises(ModelError, match=f'^{tmp_path} is an adapter; name its base model here, or remove'):
        load_pretrained(Unreachable, str(tmp_path))
