"""InternLM2 against the official code: goldens/make_internlm2.py says how the numbers were made."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from vlmtune.data import Processor
from vlmtune.families import FAMILIES
from vlmtune.layouts import NameMap, find_layout, native_view, open_weights, read_config, to_original
from vlmtune.layouts.internlm2 import INTERNLM2, internlm2_rules, internlm2_text_config
from vlmtune.models.loading import build_outline, load_model
from vlmtune.structures import Conversation, Message, TextPart
from vlmtune.utils.errors import ModelError

TESTS = Path(__file__).resolve().parents[1]
GOLDENS = ('internlm2', 'internlm2_biased')
CASES = ('english', 'chinese', 'several_turns', 'long')
# The same operations in another order, in float32, on logits of size 5: measured 4e-6.
TOLERANCE = 1e-5


class Golden:
    """What the official code made, and the folder in which its checkpoint lies."""

    def __init__(self, name: str, folder: Path) -> None:
        self.folder = folder
        self.note: dict[str, Any] = json.loads((TESTS / 'goldens' / f'{name}.json').read_text(encoding='utf-8'))
        self.tensors = load_file(TESTS / 'goldens' / f'{name}.safetensors')
        self.weights = {
            key.removeprefix('weights/'): t for key, t in self.tensors.items() if key.startswith('weights/')
        }
        save_file(self.weights, folder / 'model.safetensors', metadata={'format': 'pt'})
        (folder / 'tokenizer.model').write_bytes(self.tensors['files/tokenizer.model'].numpy().tobytes())
        self.write('config.json', self.note['config'])
        self.write('tokenizer_config.json', self.note['tokenizer_config'])

    def write(self, name: str, content: dict[str, Any]) -> None:
        (self.folder / name).write_text(json.dumps(content), encoding='utf-8')


@pytest.fixture(scope='module', params=GOLDENS)
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return Golden(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def own(tmp_path: Path) -> Golden:
    """A checkpoint that the test may break."""
    return Golden('internlm2', tmp_path)


# ---- as the official code


def test_logits(golden: Golden):
    model, family = load_model(str(golden.folder), dtype=torch.float32)
    assert family.model_type == 'llama'
    for case in CASES:
        with torch.no_grad():
            logits = model(input_ids=golden.tensors[f'inputs/{case}/input_ids'], use_cache=False).logits
        torch.testing.assert_close(logits, golden.tensors[f'logits/{case}'], atol=TOLERANCE, rtol=0)


def test_prompts(golden: Golden):
    processor = Processor(str(golden.folder))
    for case, turns in golden.note['cases'].items():
        texts = [('system', turns['system'])] if turns['system'] else []
        for question, answer in turns['history']:
            texts += [('user', question), ('assistant', answer)]
        messages = tuple(Message(role, (TextPart(text),)) for role, text in [*texts, ('user', turns['question'])])
        sample = processor.tokenize(Conversation(messages), add_generation_prompt=True)
        assert sample.input_ids.tolist() == golden.tensors[f'inputs/{case}/input_ids'][0].tolist()


def test_the_tokenizer_knows_what_the_original_knows(golden: Golden):
    tokenizer = Processor(str(golden.folder)).tokenizer
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ('<s>', '</s>', '</s>')
    for i, token in golden.note['tokenizer_config']['added_tokens_decoder'].items():
        assert tokenizer(token['content'], add_special_tokens=False)['input_ids'] == [int(i)]
    assert len(tokenizer) == golden.note['config']['vocab_size']
    assert tokenizer.decode(tokenizer('你是 who?\n')['input_ids'], skip_special_tokens=True) == '你是 who?\n'


def test_the_original_comes_back_bit_by_bit(golden: Golden):
    model, _ = load_model(str(golden.folder), dtype=torch.float32)
    source = open_weights(golden.folder)
    config = read_config(str(golden.folder))
    written = dict(to_original(model.state_dict(), source=source, layout=INTERNLM2, config=config))
    assert written.keys() == golden.weights.keys()
    for name, tensor in written.items():
        assert torch.equal(tensor, golden.weights[name]), name


def test_what_a_layout_reads_needs_no_code_of_the_folder(own: Golden):
    (own.folder / 'tokenization_internlm2.py').write_text('raise SystemExit("run")')
    (own.folder / 'modeling_internlm2.py').write_text('raise SystemExit("run")')
    load_model(str(own.folder))
    Processor(str(own.folder))


def test_a_folder_with_the_fast_tokenizer_alone(own: Golden, tmp_path: Path):
    with native_view(str(own.folder)) as view:
        made = (Path(view) / 'tokenizer.json').read_bytes()
    expected = Processor(str(own.folder)).encode_text('请介绍 <|im_start|> ').tolist()
    (own.folder / 'tokenizer.model').unlink()
    with pytest.raises(ModelError, match=r'has no tokenizer\.model; copy it'):
        Processor(str(own.folder))
    (own.folder / 'tokenizer.json').write_bytes(made)
    assert Processor(str(own.folder)).encode_text('请介绍 <|im_start|> ').tolist() == expected


# ---- real models


@pytest.mark.parametrize(
    'name', ['internlm2-chat-1_8b', 'internlm2-chat-7b', 'internlm2-chat-20b', 'internlm2_5-7b-chat']
)
def test_every_weight_of_a_real_model_has_its_place(name: str, check_real_model: Callable[..., None]):
    check_real_model(INTERNLM2, name)


# ---- what is refused


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(model_type='internlm'), r"model_type='internlm'; expected 'internlm2'.*the first InternLM and InternLM3"),
        (dict(model_type='internlm3'), r"model_type='internlm3'; expected 'internlm2'"),
        (dict(architectures=['InternLM2ForRewardModel']), r"architectures='InternLM2ForRewardModel'; expected"),
        (dict(rope_scaling=dict(type='yarn', factor=2.0)), r'rope_scaling=.*yarn.*expected null or.*linear, dynamic'),
        (dict(rope_scaling=dict(type='dynamic', factor=0.5)), r'a factor of at least 1'),
        (dict(rope_scaling='dynamic'), r"rope_scaling='dynamic'; expected null or"),
        (
            dict(num_key_value_heads=4),
            r'llm_config\.num_attention_heads=6 and llm_config\.num_key_value_heads=4; expected each',
        ),
    ],
)
def test_other_versions_are_refused(own: Golden, change: dict[str, Any], message: str):
    with pytest.raises(ModelError, match=message):
        internlm2_text_config({**own.note['config'], **change}, key='llm_config.')


def test_weights_that_do_not_fit_are_refused(own: Golden):
    def load(weights: dict[str, torch.Tensor]) -> None:
        save_file(weights, own.folder / 'model.safetensors')
        load_model(str(own.folder))

    wqkv = 'model.layers.1.attention.wqkv.weight'
    rest = {name: tensor for name, tensor in own.weights.items() if name != wqkv}
    with pytest.raises(ModelError, match=r'no InternLM2 as config\.json.*missing.*model\.layers\.1\.self_attn\.k_proj'):
        load(rest)
    with pytest.raises(ModelError, match=r'1 weights are unknown \(first: model\.layers\.1\.attention\.wqkv\.bias\)'):
        load({**own.weights, 'model.layers.1.attention.wqkv.bias': torch.zeros(80)})
    with pytest.raises(ModelError, match=r'model\.layers\.1\.attention\.wqkv\.weight is \(96, 48\)'):
        load({**rest, wqkv: torch.zeros(96, 48)})


def test_positions_of_none_are_plain_ones(own: Golden):
    config = internlm2_text_config({**own.note['config'], 'rope_scaling': None})
    assert config.rope_parameters == {'rope_type': 'default', 'rope_theta': 1e6}
    assert find_layout(str(own.folder)) is INTERNLM2


@pytest.mark.parametrize('model_type', ['internlm', 'internlm3'])
def test_the_first_and_the_third_generation_are_refused(model_type: str, own: Golden):
    own.write('config.json', {**own.note['config'], 'model_type': model_type})
    with pytest.raises(ModelError, match=rf"model type '{model_type}' is not supported, did you mean 'internlm2'\?"):
        load_model(str(own.folder))


@pytest.mark.parametrize(
    'model_type', [f.model_type for f in FAMILIES.values() if f.auto_class == 'causal_lm' and f.packing]
)
def test_its_names_are_none_of_another_language_model(model_type: str):
    """So picture models can have its rules beside the plain ones, whatever their language model is."""
    config = AutoConfig.for_model(model_type, num_hidden_layers=2)
    names = NameMap(internlm2_rules(config))
    matches = {name: match.native for name in build_outline(config).state_dict() if (match := names.match(name))}
    assert all(native == (name,) for name, native in matches.items())
