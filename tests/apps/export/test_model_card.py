"""What a model card says of the files of the base."""

import pytest

from vlmtune.apps.export.model_card import write_card
from vlmtune.families import find_family

PLAIN_LLAMA = dict(architectures=['LlamaForCausalLM'], model_type='llama', rope_scaling=None)


@pytest.mark.parametrize(
    ('llm', 'joined'),
    [({}, '`attention.wqkv`, `attn.qkv`'), (PLAIN_LLAMA, '`attn.qkv`')],
)
def test_joined_weights_are_those_that_the_base_holds(llm, joined, tiny_model, tmp_path):
    """Not those of all language models that its layout can have."""
    base = str(tiny_model('internvl_chat', llm_config=llm))
    write_card(tmp_path, 'adapter', family=find_family('internvl'), base=base, record=None)
    card = (tmp_path / 'README.md').read_text()
    assert f'with other names and with {joined} where this adapter' in card
