"""POINTS-Reader and POINTS-1.5 against the official code: goldens/make_points.py says how the numbers were made."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vlmtune.data import Processor
from vlmtune.data.templates import find_template
from vlmtune.evaluation import generate
from vlmtune.layouts import find_layout, open_weights, read_config, to_native, to_original
from vlmtune.layouts.points import POINTS
from vlmtune.models.loading import build_outline, load_model
from vlmtune.structures import IGNORE_INDEX, Conversation, ImagePart, ImageRef, ImageSize, Message, TextPart
from vlmtune.testing.tiny_processors import PREPROCESSORS
from vlmtune.testing.tiny_tokenizers import build_tokenizer
from vlmtune.utils.errors import ModelError

TESTS = Path(__file__).resolve().parents[1]
GOLDENS = ('points_reader', 'points_1_5')
CASES = ('one_image', 'several_images', 'several_turns', 'text_only')


class Golden:
    """What the official code made, and the folder in which its checkpoint lies."""

    def __init__(self, name: str, folder: Path) -> None:
        self.folder = folder
        self.note: dict[str, Any] = json.loads((TESTS / 'goldens' / f'{name}.json').read_text(encoding='utf-8'))
        self.tensors = load_file(TESTS / 'goldens' / f'{name}.safetensors')
        self.weights = self.part('weights/')
        save_file(self.weights, folder / 'model.safetensors', metadata={'format': 'pt'})
        build_tokenizer('points').save_pretrained(folder)
        self.write('config.json', self.note['config'])
        self.write('preprocessor_config.json', {**PREPROCESSORS['qwen2_vl'], **self.note['preprocessor']})

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}

    def images(self, case: str) -> list[Image.Image]:
        found = self.part(f'images/{case}/')
        return [Image.fromarray(found[str(i)].numpy()) for i in range(len(found))]

    def conversation(self, case: str) -> Conversation:
        messages, shown = [], 0
        for role, parts in self.note['prompts'][case]['messages']:
            made: list[Any] = []
            for kind, value in parts:
                made.append(ImagePart(shown) if kind == 'image' else TextPart(value))
                shown += kind == 'image'
            messages.append(Message(role, tuple(made)))
        return Conversation(tuple(messages), tuple(ImageRef(path=f'{i}.png') for i in range(shown)))

    def write(self, name: str, content: dict[str, Any]) -> None:
        (self.folder / name).write_text(json.dumps(content), encoding='utf-8')

    def change(self, name: str, **keys: Any) -> None:
        """Other values in a json file; None takes a key away."""
        content = {**json.loads((self.folder / name).read_text(encoding='utf-8')), **keys}
        self.write(name, {key: value for key, value in content.items() if value is not None})


@pytest.fixture(scope='module', params=GOLDENS)
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return Golden(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def reader(tmp_path: Path) -> Golden:
    """A POINTS-Reader that the test may break."""
    return Golden('points_reader', tmp_path)


@pytest.fixture
def older(tmp_path: Path) -> Golden:
    """A POINTS-1.5 that the test may break."""
    return Golden('points_1_5', tmp_path)


def sizes_of(images: list[Image.Image]) -> list[ImageSize]:
    return [ImageSize(image.height, image.width) for image in images]


# ---- as the official code


@pytest.mark.parametrize('attention', ['eager', 'sdpa'])
def test_logits(golden: Golden, attention: str):
    """Logits of size 8. Where the official code ran, with AVX-512, eager attention gives its bits; a processor without
    it sums in another order: measured 1.4e-5 with AVX2, 1.2e-4 without."""
    model, family = load_model(str(golden.folder), dtype=torch.float32, attn_implementation=attention)
    assert family.model_type == 'points'
    for case in CASES:
        with torch.no_grad():
            logits = model(**golden.part(f'inputs/{case}/'), use_cache=False).logits
        torch.testing.assert_close(logits, golden.tensors[f'logits/{case}'], atol=3e-4, rtol=0)


@pytest.mark.usefixtures('pillow_of_the_goldens')
@pytest.mark.parametrize('case', CASES)
def test_prompts_and_pixels(golden: Golden, case: str):
    processor, images = Processor(str(golden.folder)), golden.images(case)
    sample = processor.tokenize(golden.conversation(case), image_sizes=sizes_of(images), add_generation_prompt=True)
    assert sample.input_ids.tolist() == golden.tensors[f'inputs/{case}/input_ids'][0].tolist()
    assert processor.tokenizer.decode(sample.input_ids) == golden.note['prompts'][case]['text']
    if images:
        inputs = processor.image_inputs(images)
        assert torch.equal(inputs['image_grid_thw'], golden.tensors[f'inputs/{case}/image_grid_thw'])
        # Bytes are normalised by one multiplication and one addition here, by several there, in float32.
        expected = golden.tensors[f'inputs/{case}/pixel_values']
        torch.testing.assert_close(inputs['pixel_values'], expected, atol=2e-6, rtol=0)


def test_a_question_is_the_same_in_training_and_when_it_is_asked(golden: Golden):
    processor, asked = Processor(str(golden.folder)), golden.conversation('several_turns')
    sizes = sizes_of(golden.images('several_turns'))
    prompt = processor.tokenize(asked, image_sizes=sizes, add_generation_prompt=True).input_ids
    answered = Conversation((*asked.messages, Message('assistant', (TextPart('Yes.'),))), asked.images)
    sample = processor.tokenize(answered, image_sizes=sizes, learned=[5])
    assert sample.input_ids[: len(prompt)].tolist() == prompt.tolist()
    learned = sample.input_ids[sample.labels != IGNORE_INDEX]
    assert processor.tokenizer.decode(learned) == 'Yes.<|im_end|>'
    assert sample.labels[len(prompt)] == learned[0]


def test_the_original_comes_back_bit_by_bit(golden: Golden):
    model, _ = load_model(str(golden.folder), dtype=torch.float32)
    source, config = open_weights(golden.folder), read_config(str(golden.folder))
    written = dict(to_original(model.state_dict(), source=source, layout=POINTS, config=config))
    assert written.keys() == golden.weights.keys()
    assert sum('vision_encoder.merger' in name for name in written) == 6
    for name, tensor in written.items():
        assert torch.equal(tensor, golden.weights[name]), name


@pytest.mark.usefixtures('pillow_of_the_goldens')
def test_answers_are_those_without_a_cache(reader: Golden, tmp_path: Path):
    model, _ = load_model(str(reader.folder), dtype=torch.float32)
    model.eval()
    processor, asked = Processor(str(reader.folder)), reader.conversation('several_images')
    images = reader.images('several_images')
    refs = []
    for i, image in enumerate(images):
        image.save(tmp_path / f'{i}.png')
        refs.append(ImageRef(path=str(tmp_path / f'{i}.png')))
    inputs = reader.part('inputs/several_images/')
    expected: list[int] = []
    for _ in range(5):
        with torch.no_grad():
            expected.append(int(model(**inputs, use_cache=False).logits[0, -1].argmax()))
        inputs['input_ids'] = torch.cat([inputs['input_ids'], torch.tensor([expected[-1:]])], 1)
    answer = generate(model, processor, [Conversation(asked.messages, tuple(refs))], max_new_tokens=5, do_sample=False)
    stop = set(processor.stop_token_ids())
    kept = next((expected[:i] for i, token in enumerate(expected) if token in stop), expected)
    assert answer == [processor.tokenizer.decode(kept, skip_special_tokens=True).strip()]


# ---- what lies in a folder


def test_a_config_without_a_model_type_is_known_by_its_class(older: Golden):
    """The code of POINTS-1.5 writes none."""
    older.change('config.json', model_type=None)
    assert find_layout(str(older.folder)) is POINTS
    assert load_model(str(older.folder), dtype=torch.float32)[1].model_type == 'points'


def test_a_head_that_lies_beside_the_embeddings_it_is_tied_to(reader: Golden):
    head = reader.weights['llm.model.embed_tokens.weight'].clone()
    save_file({**reader.weights, 'llm.lm_head.weight': head}, reader.folder / 'model.safetensors')
    model, _ = load_model(str(reader.folder), dtype=torch.float32)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    source, config = open_weights(reader.folder), read_config(str(reader.folder))
    written = dict(to_original(model.state_dict(), source=source, layout=POINTS, config=config))
    assert torch.equal(written['llm.lm_head.weight'], head)


def test_the_limits_of_an_image_stand_in_either_place(reader: Golden):
    limits = {'shortest_edge': 784, 'longest_edge': 6272}
    for keys in (
        dict(min_pixels=784, max_pixels=6272, size={'shortest_edge': 1, 'longest_edge': 2, 'min_pixels': 784}),
        dict(min_pixels=None, max_pixels=None, size=limits),
    ):
        reader.change('preprocessor_config.json', image_processor_type='Qwen2ImageProcessorForPOINTSV15', **keys)
        found = Processor(str(reader.folder)).image_processor.size
        assert {name: found[name] for name in limits} == limits
    changed = Processor(str(reader.folder), image_processor=dict(max_pixels=1568)).image_processor
    assert changed.size['longest_edge'] == 1568


def test_the_chat_template_of_the_language_model_is_not_used(reader: Golden):
    expected = find_template('points')
    template = (reader.folder / 'chat_template.jinja').read_text(encoding='utf-8')
    assert Processor(str(reader.folder)).tokenizer.chat_template == expected != template
    (reader.folder / 'chat_template.jinja').unlink()
    reader.change('tokenizer_config.json', chat_template=template)  # where older checkpoints keep it
    assert Processor(str(reader.folder)).tokenizer.chat_template == expected
    (reader.folder / 'chat_template.jinja').write_text('<|image_pad|>', encoding='utf-8')  # an export of ours
    assert Processor(str(reader.folder)).tokenizer.chat_template == '<|image_pad|>'


def test_no_code_of_the_folder_is_run(reader: Golden):
    (reader.folder / 'modeling_pointsv15_chat.py').write_text('raise SystemExit("run")')
    reader.change('config.json', auto_map={'AutoModelForCausalLM': 'modeling_pointsv15_chat.POINTSV15ChatModel'})
    reader.change('tokenizer_config.json', auto_map={'AutoTokenizer': ['modeling_pointsv15_chat.X', None]})
    load_model(str(reader.folder))
    Processor(str(reader.folder))


# ---- real models


@pytest.mark.parametrize('name', ['points_1_5_7b', 'points_reader_3b'])
def test_every_weight_of_a_real_model_has_its_place(name: str, check_real_model: Callable[..., None]):
    check_real_model(POINTS, name)


# ---- what is not one of them


@pytest.mark.parametrize(
    ('llm', 'match'),
    [
        (
            dict(model_type='llama'),
            r"config\.json: llm_config\.model_type is 'llama'; expected qwen2 \(POINTS-Reader\)",
        ),
        (dict(norm_type='layer_norm'), r"llm_config\.norm_type is 'layer_norm'; expected what POINTS-1\.5-Qwen2\.5-7B"),
        (dict(num_kv_heads=4), r'llm_config\.num_kv_heads is 4'),
        (dict(sliding_window_type='x'), r"llm_config\.sliding_window_type is 'x'"),
        (dict(num_layers=None), r'llm_config lacks num_layers'),
    ],
)
def test_another_language_model(older: Golden, llm: dict[str, Any], match: str):
    changed = {**older.note['config']['llm_config'], **llm}
    older.change('config.json', llm_config={key: value for key, value in changed.items() if value is not None})
    with pytest.raises(ModelError, match=match):
        load_model(str(older.folder))


def test_no_vision_config(reader: Golden):
    reader.change('config.json', vision_config=None)
    with pytest.raises(ModelError, match=r'config\.json: vision_config is None; expected the settings'):
        load_model(str(reader.folder))


def test_the_tokenizer_of_another_model(reader: Golden):
    build_tokenizer('llama3').save_pretrained(reader.folder)
    with pytest.raises(ModelError, match=r"has the added token '<\|image_pad\|>'; this tokenizer belongs to another"):
        Processor(str(reader.folder))


def test_a_tokenizer_without_one_of_the_tokens(reader: Golden):
    for file in (reader.folder / 'tokenizer.json', reader.folder / 'tokenizer_config.json'):
        file.write_text(file.read_text(encoding='utf-8').replace('<|vision_start|>', '<|visual_start|>'))
    with pytest.raises(ModelError, match=r'lacks 1 special tokens of points \(first: <\|vision_start\|>\)'):
        Processor(str(reader.folder))


@pytest.mark.parametrize('name', ['tokenizer_config.json', 'preprocessor_config.json'])
def test_a_missing_file(reader: Golden, name: str):
    (reader.folder / name).unlink()
    with pytest.raises(ModelError, match=rf'has no {name}; download it'):
        Processor(str(reader.folder))


def test_weights_that_do_not_fit(reader: Golden):
    outline = build_outline(read_config(str(reader.folder)))
    expected = {name: tensor.shape for name, tensor in outline.state_dict().items()}
    lost = 'vision_projector.mlp.0.weight'
    weights = {name: weight for name, weight in open_weights(reader.folder).items() if name != lost}
    weights['vision_encoder.blocks.9.norm1.bias'] = weights['vision_encoder.blocks.0.norm1.bias']
    with pytest.raises(ModelError, match=r'no POINTS-1\.5 .*blocks\.9\.norm1\.bias.*multi_modal_projector\.mlp\.0'):
        to_native(weights, layout=POINTS, config=outline.config, expected=expected, tied=frozenset({'lm_head.weight'}))
