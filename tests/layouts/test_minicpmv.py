"""MiniCPM-V 2.0 against the official code: goldens/make_minicpmv.py says how the numbers were made."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vlmtune.data import Processor
from vlmtune.layouts import open_weights, read_config, to_original
from vlmtune.layouts.minicpmv import MINICPMV
from vlmtune.models.loading import load_model
from vlmtune.structures import Conversation, ImagePart, ImageRef, ImageSize, Message, TextPart
from vlmtune.utils.errors import DataError, ModelError

TESTS = Path(__file__).resolve().parents[1]
CASES = {  # pictures that are shown, and which of the turns are said
    'one_image': (['wide'], slice(0, 1)),
    'several_images': (['small', 'high'], slice(2, 3)),
    'several_turns': (['small'], slice(0, 3)),
    'text_only': ([], slice(2, 3)),
}
# The same operations in another order (views are encoded together), in float32, on logits of size 4: measured 6e-6.
TOLERANCE = 1e-5


class Golden:
    """What the official code made, and the folder in which its checkpoint lies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.note: dict[str, Any] = json.loads((TESTS / 'goldens' / 'minicpmv.json').read_text(encoding='utf-8'))
        self.tensors = load_file(TESTS / 'goldens' / 'minicpmv.safetensors')
        self.weights = {
            key.removeprefix('weights/'): t for key, t in self.tensors.items() if key.startswith('weights/')
        }
        save_file(self.weights, folder / 'model.safetensors', metadata={'format': 'pt'})
        (folder / 'tokenizer.model').write_bytes(self.tensors['files/tokenizer.model'].numpy().tobytes())
        self.write('config.json', self.note['config'])
        self.write('tokenizer_config.json', self.note['tokenizer_config'])

    def write(self, name: str, content: dict[str, Any]) -> None:
        (self.folder / name).write_text(json.dumps(content), encoding='utf-8')

    def pictures(self, case: str) -> list[Image.Image]:
        return [Image.fromarray(self.tensors[f'pictures/{name}'].numpy()) for name in CASES[case][0]]

    def ids(self, case: str) -> torch.Tensor:
        return self.tensors[f'inputs/{case}/input_ids'].long()

    def conversation(self, case: str) -> Conversation:
        shown, turns = CASES[case]
        return talk([(turn['role'], turn['content']) for turn in self.note['turns'][turns]], images=len(shown))


def talk(turns: Sequence[tuple[str, str]], *, images: int = 0) -> Conversation:
    """The images come first in the first message."""
    shown = [ImagePart(i) for i in range(images)]
    messages = [
        Message(role, (*(shown if i == 0 else ()), TextPart(text)))  # type: ignore[arg-type]
        for i, (role, text) in enumerate(turns)
    ]
    return Conversation(tuple(messages), tuple(ImageRef(path='x') for _ in shown))


def sizes(pictures: Sequence[Image.Image]) -> list[ImageSize]:
    return [ImageSize(picture.height, picture.width) for picture in pictures]


@pytest.fixture(scope='module')
def golden(tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return Golden(tmp_path_factory.mktemp('minicpmv'))


@pytest.fixture(scope='module')
def processor(golden: Golden) -> Processor:
    return Processor(str(golden.folder))


@pytest.fixture
def own(tmp_path: Path) -> Golden:
    """A checkpoint that the test may break."""
    return Golden(tmp_path)


# ---- as the official code


@pytest.mark.usefixtures('pillow_of_the_goldens')
def test_logits(golden: Golden, processor: Processor):
    model, family = load_model(str(golden.folder), dtype=torch.float32)
    assert family.model_type == 'minicpmv2'
    for case in CASES:
        images = processor.image_inputs(golden.pictures(case))
        with torch.no_grad():
            logits = model(input_ids=golden.ids(case)[None], **images, use_cache=False).logits[0]
        expected = golden.tensors[f'logits/{case}']
        assert expected.std() > 0.9
        torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0, msg=lambda text, c=case: f'{c}: {text}')


@pytest.mark.parametrize('case', CASES)
def test_prompts(golden: Golden, processor: Processor, case: str):
    pictures = sizes(golden.pictures(case))
    sample = processor.tokenize(golden.conversation(case), image_sizes=pictures, add_generation_prompt=True)
    assert sample.input_ids.tolist() == golden.ids(case).tolist()


@pytest.mark.usefixtures('pillow_of_the_goldens')
@pytest.mark.parametrize('case', [case for case in CASES if case != 'text_only'])
def test_pixels_are_those_of_the_official_slices_bit_by_bit(golden: Golden, processor: Processor, case: str):
    made = processor.image_bytes(golden.pictures(case))
    grids, patches = made['patch_grids'].tolist(), made['pixel_bytes']
    for number, (rows, columns) in enumerate(grids):
        mine, patches = patches[: rows * columns], patches[rows * columns :]
        picture = mine.view(rows, columns, 3, 14, 14).permute(2, 0, 3, 1, 4).reshape(3, rows * 14, columns * 14)
        assert torch.equal(picture, golden.tensors[f'inputs/{case}/slice_{number}'])
    assert len(patches) == 0
    assert f'inputs/{case}/slice_{len(grids)}' not in golden.tensors
    values = processor.image_inputs(golden.pictures(case))['pixel_values']
    torch.testing.assert_close(values, made['pixel_bytes'].flatten(1) / 127.5 - 1, atol=1e-6, rtol=0)


def test_the_original_comes_back_bit_by_bit(golden: Golden):
    model, _ = load_model(str(golden.folder), dtype=torch.float32)
    config = read_config(str(golden.folder))
    written = dict(to_original(model.state_dict(), source=open_weights(golden.folder), layout=MINICPMV, config=config))
    assert written.keys() == golden.weights.keys()
    for name, tensor in written.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, golden.weights[name]), name


def test_no_code_of_the_folder_is_run(own: Golden):
    for name in ('modeling_minicpmv', 'configuration_minicpm', 'resampler'):
        (own.folder / f'{name}.py').write_text('raise SystemExit("run")')
    load_model(str(own.folder))
    Processor(str(own.folder))


# ---- what is learned and read


def test_one_end_is_shown_that_of_the_talk(processor: Processor):
    turns = [('user', 'What is it?'), ('assistant', 'A red square.'), ('user', 'And?'), ('assistant', 'Nothing.')]
    sample = processor.tokenize(talk(turns))
    eos = processor.tokenizer.eos_token_id
    assert (sample.input_ids == eos).nonzero()[0].tolist() == [len(sample.input_ids) - 1]
    learned = sample.labels != -100
    assert sample.labels[learned].tolist() == sample.input_ids[learned].tolist()
    assert processor.tokenizer.decode(sample.input_ids[learned]) == 'A red square.Nothing.</s>'
    assert processor.stop_token_ids() == [eos]


def test_a_system_message_leads_the_first_question(processor: Processor):
    sample = processor.tokenize(talk([('system', 'Be brief.'), ('user', 'What is it?')]), add_generation_prompt=True)
    text = processor.tokenizer.decode(sample.input_ids)
    assert text.count('<用户>') == 1
    assert text.endswith('<用户>Be brief.\nWhat is it?<AI>')


def test_rows_end_with_what_is_no_image(processor: Processor):
    """The original pads with the token that stands for image features."""
    assert processor.tokenizer.unk_token_id == processor.image_token_id
    assert processor.tokenizer.pad_token_id == processor.tokenizer.eos_token_id


def test_marks_in_a_text_are_text(processor: Processor):
    tokens = processor.tokenize(talk([('user', '<image><unk></image></s><slice>'), ('assistant', 'No.')])).input_ids
    control = [processor.tokenizer.convert_tokens_to_ids(t) for t in ('<image>', '</image>', '<slice>', '<unk>')]
    assert not set(tokens.tolist()) & set(control)


def test_images_that_the_processor_did_not_make_are_refused(golden: Golden, processor: Processor):
    model, _ = load_model(str(golden.folder), dtype=torch.float32)
    images = processor.image_inputs(golden.pictures('several_turns'))
    with pytest.raises(ModelError, match=r'64 image tokens \(id 0\) in the input, but the images make 16 features'):
        model(input_ids=golden.ids('one_image')[None], **images, use_cache=False)
    with pytest.raises(DataError, match='shows 0 images but the conversation has 1'):
        processor.tokenize(golden.conversation('text_only'), image_sizes=[ImageSize(9, 9)])


# ---- the real model


def test_every_weight_of_the_real_model_has_its_place(
    check_real_model: Callable[..., None], unfolded: Callable[..., Any]
):
    check_real_model(MINICPMV, 'minicpmv_2')
    fixture = json.loads((TESTS / 'fixtures' / 'layouts' / 'minicpmv_2.json').read_text(encoding='utf-8'))
    assert len(unfolded(fixture['tensors'])) == 694  # as many as its index names


def test_the_settings_of_the_real_model():
    fixture = json.loads((TESTS / 'fixtures' / 'layouts' / 'minicpmv_2.json').read_text(encoding='utf-8'))
    config: Any = MINICPMV.read_config(fixture['config'])
    text, vision = config.text_config, config.vision_config
    assert (text.logits_scaling, text.embedding_multiplier, config.scale_emb) == (9, 1, 12)
    assert text.residual_multiplier == pytest.approx(1.4 / 40**0.5)
    assert text.attention_multiplier == pytest.approx(1 / 8)
    assert (vision.num_hidden_layers, vision.intermediate_size, vision.hidden_act) == (26, 4304, 'gelu')


# ---- what is refused


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(version=2.6), r'config\.json: version is 2\.6; expected MiniCPM-V 2\.0'),
        (dict(slice_config={}), r'config\.json has slice_config, as MiniCPM-V 2\.5 and 2\.6; expected 2\.0'),
        (dict(vision_config={}), r'config\.json has vision_config, as MiniCPM-V 2\.5 and 2\.6'),
        (dict(scale_resolution=None), r'config\.json has no scale_resolution, which MiniCPM-V 2\.0 has'),
        (dict(slice_mode=False), r'config\.json: slice_mode is False; expected True'),
        (dict(rope_scaling={'type': 'dynamic'}), r"rope_scaling is \{'type': 'dynamic'\}; expected None"),
        (dict(vision_encoder='vit_tiny_patch14_224'), r"vision_encoder is 'vit_tiny_patch14_224'; expected a SigLIP"),
        (dict(patch_size=16), r"patch_size is 16, but vision_encoder is 'vit_test_patch14_siglip_84'"),
        (dict(unk_token_id=5), r'tokenizer\.model: <unk> is token 0, but config\.json: unk_token_id is 5'),
    ],
)
def test_other_versions_are_refused(own: Golden, change: dict[str, Any], message: str):
    own.write('config.json', {**own.note['config'], **change})
    with pytest.raises(ModelError, match=message):
        Processor(str(own.folder))


def test_a_tokenizer_without_the_marks_of_images(own: Golden, tiny_model):
    (own.folder / 'tokenizer.model').write_bytes((tiny_model('internlm2') / 'tokenizer.model').read_bytes())
    own.write('tokenizer_config.json', {})
    with pytest.raises(
        ModelError, match=r'tokenizer\.model, .* lacks 4 special tokens of minicpmv2 \(first: </image>\)'
    ):
        Processor(str(own.folder))


def test_weights_that_do_not_fit(own: Golden):
    name = 'resampler.attn.in_proj_weight'
    rest = {key: tensor for key, tensor in own.weights.items() if key != name}
    for weights, message in (
        (rest, r'no MiniCPM-V 2\.0 as config\.json describes it: .*missing.*attn\.k_proj\.weight'),
        ({**own.weights, 'vpm.head.weight': torch.zeros(1)}, r'1 weights are unknown \(first: vpm\.head\.weight\)'),
        ({**rest, name: torch.zeros(3, 3)}, r'resampler\.attn\.in_proj_weight is \(3, 3\)'),
    ):
        save_file(weights, own.folder / 'model.safetensors')
        with pytest.raises(ModelError, match=message):
            load_model(str(own.folder))
