"""InternVL2 against the official code: goldens/make_internvl.py says how the numbers were made."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_all_supported_aspect_ratios

from vlmtune.data import Processor, llava_map_fn
from vlmtune.data.placeholders import tiles
from vlmtune.layouts import find_layout, open_weights, read_config, to_original
from vlmtune.layouts.internvl_chat import INTERNVL_CHAT
from vlmtune.models.loading import load_model
from vlmtune.structures import Conversation, ImageSize, Message, TextPart

TESTS = Path(__file__).resolve().parents[1]
GOLDENS = ('internvl2_1b', 'internvl2_2b', 'internvl2_4b', 'internvl2_40b')  # Qwen2, InternLM2, Phi-3, Llama with a 6B
# The same operations in another order, in float32, on logits of size 3: measured 6e-6 for Phi-3, else 3e-6.
TOLERANCE = 1e-5


class Golden:
    """What the official code made, and the folder in which its checkpoint lies."""

    def __init__(self, name: str, folder: Path) -> None:
        self.folder = folder
        self.note: dict[str, Any] = json.loads((TESTS / 'goldens' / f'{name}.json').read_text(encoding='utf-8'))
        self.tensors = load_file(TESTS / 'goldens' / f'{name}.safetensors')
        self.weights = self.named('weights')
        for file, content in self.named('files').items():
            (folder / file).write_bytes(content.numpy().tobytes())
        save_file(self.weights, folder / 'model.safetensors', metadata={'format': 'pt'})
        self.write('config.json', self.note['config'])

    def named(self, kind: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(f'{kind}/'): t for key, t in self.tensors.items() if key.startswith(f'{kind}/')}

    def write(self, name: str, content: dict[str, Any]) -> None:
        (self.folder / name).write_text(json.dumps(content), encoding='utf-8')

    def changed(self, **settings: Any) -> None:
        """Other settings in config.json; those with a dot in a section of it."""
        config = json.loads(json.dumps(self.note['config']))
        for key, value in settings.items():
            section, _, name = key.rpartition('__')
            (config[section] if section else config)[name] = value
        self.write('config.json', config)

    def images(self, case: str) -> list[Image.Image]:
        arrays = [self.tensors[f'inputs/{case}/image_{i}'] for i in range(len(self.note['cases'][case]['sizes']))]
        return [Image.fromarray(array.numpy()) for array in arrays]

    def conversation(self, case: str) -> Conversation:
        """The case as a LLaVA row, whose last answer is taken off again."""
        turns = []
        for question, answer in self.note['cases'][case]['turns']:
            turns += [{'from': 'human', 'value': question}, {'from': 'gpt', 'value': answer or '-'}]
        names = [f'{i}.png' for i, _ in enumerate(self.images(case))]
        whole = llava_map_fn({'image': names, 'conversations': turns})
        return Conversation(whole.messages[:-1], images=whole.images)


@pytest.fixture(scope='module', params=GOLDENS)
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return Golden(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def own(tmp_path: Path) -> Golden:
    """A checkpoint that the test may change."""
    folder = tmp_path / 'original'
    folder.mkdir()
    return Golden('internvl2_2b', folder)


def sizes_of(images: list[Image.Image]) -> list[ImageSize]:
    return [ImageSize(image.height, image.width) for image in images]


# ---- as the official code


def logits_of(model: torch.nn.Module, golden: Golden, case: str) -> torch.Tensor:
    ids, pixels = (golden.tensors.get(f'inputs/{case}/{name}') for name in ('input_ids', 'pixel_values'))
    assert ids is not None
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids[None], pixel_values=pixels, use_cache=False).logits[0]
    return logits


def test_logits(golden: Golden):
    model, family = load_model(str(golden.folder), dtype=torch.float32)
    assert family.model_type == 'internvl'
    for case in golden.note['cases']:
        expected = golden.tensors[f'logits/{case}']
        torch.testing.assert_close(logits_of(model, golden, case), expected, atol=TOLERANCE, rtol=0)


def test_features_of_another_layer(tmp_path: Path):
    golden = Golden('internvl2_1b', tmp_path)
    golden.changed(select_layer=-2)
    model, _ = load_model(str(tmp_path), dtype=torch.float32)
    expected = golden.tensors['second_last_layer/one_image']
    torch.testing.assert_close(logits_of(model, golden, 'one_image'), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.usefixtures('pillow_of_the_goldens')
def test_prompts_and_pixels(golden: Golden):
    """Pixels are the same bytes; 1e-6 is what the order of multiplication and addition makes of them."""
    processor = Processor(str(golden.folder))
    for case in golden.note['cases']:
        images = golden.images(case)
        sample = processor.tokenize(golden.conversation(case), image_sizes=sizes_of(images), add_generation_prompt=True)
        assert sample.input_ids.tolist() == golden.tensors[f'inputs/{case}/input_ids'].tolist()
        if images:
            pixels = processor.image_inputs(images)['pixel_values']
            torch.testing.assert_close(pixels, golden.tensors[f'inputs/{case}/pixel_values'], atol=1e-6, rtol=0)


def test_an_image_has_the_official_tiles(own: Golden):
    """Over 21,000 pairs of a size and a limit; a thumbnail is one more where there is more than one tile."""
    assert len(get_all_supported_aspect_ratios(1, 12)) == 35
    choices = load_file(TESTS / 'goldens' / 'internvl2_tiles.safetensors')['choices'].tolist()
    assert len(choices) > 20_000
    own.changed(force_image_size=448, vision_config__image_size=448, vision_config__patch_size=14)
    processor = Processor(str(own.folder))
    for most, width, height, columns, rows in choices:
        processor.image_processor.max_patches = most
        count = columns * rows + (columns * rows > 1)
        tokens = tiles(processor, ImageSize(height, width), images=1)
        assert tokens.runs[1][1] == 256 * count, (most, width, height)


def test_what_no_logit_shows(golden: Golden):
    """Head and embeddings never share weights, whatever llm_config says; norms of q and k would do in either order."""
    raw = json.loads(json.dumps(golden.note['config']))
    raw['llm_config']['tie_word_embeddings'] = True
    config = INTERNVL_CHAT.read_config(raw)
    assert not config.tie_word_embeddings
    assert not config.text_config.tie_word_embeddings
    for part in 'qk':
        match = INTERNVL_CHAT.name_map(config).match(f'vision_model.encoder.layers.3.attn.{part}_norm.weight')
        assert match is not None
        assert match.native == (f'model.vision_tower.encoder.layer.3.attention.{part}_norm.weight',)


def test_the_original_comes_back_bit_by_bit(golden: Golden):
    model, _ = load_model(str(golden.folder), dtype=torch.float32)
    source = open_weights(golden.folder)
    config = read_config(str(golden.folder))
    written = dict(to_original(model.state_dict(), source=source, layout=INTERNVL_CHAT, config=config))
    assert written.keys() == golden.weights.keys()
    for name, tensor in written.items():
        assert torch.equal(tensor, golden.weights[name]), name


def test_what_a_layout_reads_needs_no_code_of_the_folder(own: Golden):
    for name in ('tokenization_internlm2', 'modeling_internvl_chat', 'configuration_internvl_chat', 'conversation'):
        (own.folder / f'{name}.py').write_text('raise SystemExit("run")')
    load_model(str(own.folder))
    Processor(str(own.folder))


def test_a_tokenizer_that_names_code_is_read_without_it(tmp_path: Path):
    golden = Golden('internvl2_1b', tmp_path)
    expected = Processor(str(tmp_path)).encode_text('What').tolist()
    config = json.loads((tmp_path / 'tokenizer_config.json').read_text(encoding='utf-8'))
    golden.write('tokenizer_config.json', {**config, 'auto_map': {'AutoTokenizer': ['tokenization_own.Own', None]}})
    (tmp_path / 'tokenization_own.py').write_text('raise SystemExit("run")')
    assert Processor(str(tmp_path)).encode_text('What').tolist() == expected


def test_written_in_the_layout_of_transformers_it_is_the_same_model(golden: Golden, tmp_path: Path):
    model, _ = load_model(str(golden.folder), dtype=torch.float32)
    processor = Processor(str(golden.folder))
    model.save_pretrained(tmp_path)
    processor.save(tmp_path)
    assert find_layout(str(tmp_path)) is None
    other = AutoModelForImageTextToText.from_pretrained(tmp_path)
    again = Processor(str(tmp_path))
    images = golden.images('one_image')
    sample = again.tokenize(golden.conversation('one_image'), image_sizes=sizes_of(images), add_generation_prompt=True)
    with torch.no_grad():
        logits = other(input_ids=torch.tensor(sample.input_ids)[None].long(), **again.image_inputs(images)).logits[0]
    torch.testing.assert_close(logits, golden.tensors['logits/one_image'], atol=TOLERANCE, rtol=0)


# ---- the prompt


def prompt(folder: Path, *messages: tuple[str, str]) -> str:
    processor = Processor(str(folder))
    conversation = Conversation(tuple(Message(role, (TextPart(text),)) for role, text in messages))  # type: ignore[arg-type]
    return processor.renderer.render(conversation, add_generation_prompt=True).text


@pytest.mark.parametrize('name', ['internvl2_2b', 'internvl2_4b'])
def test_a_conversation_may_bring_its_own_system_message(name: str, tmp_path: Path):
    folder = Golden(name, tmp_path).folder
    text = prompt(folder, ('system', 'Be brief.'), ('user', 'Hi'))
    if name == 'internvl2_2b':
        assert text == '<s><|im_start|>system\nBe brief.<|im_end|><|im_start|>user\nHi<|im_end|><|im_start|>assistant\n'
    else:
        assert text == '<s><|system|>\nBe brief.<|end|><|user|>\nHi<|end|><|assistant|>\n'


def test_the_templates_of_later_versions(own: Golden):
    """InternVL2.5 ends turns with a line break and introduces itself in other words; config.json may hold its own."""
    own.changed(template='internvl2_5')
    text = prompt(own.folder, ('user', 'Hi'))
    assert text.startswith('<s><|im_start|>system\n你是书生·万象，英文名是InternVL，')
    assert text.endswith('<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n')
    own.changed(template='internvl2_5', system_message='It\'s "{{ 1 + 1 }}"\\n')
    assert prompt(own.folder, ('user', 'Hi')).startswith('<s><|im_start|>system\nIt\'s "{{ 1 + 1 }}"\\n<|im_end|>')


def test_a_system_message_may_hold_any_words(own: Golden):
    own.changed(system_message='FIRST look at the IMAGE, HEAD to TAIL; AFTER that, answer.')
    text = prompt(own.folder, ('user', 'Hi'))
    assert '<|im_start|>system\nFIRST look at the IMAGE, HEAD to TAIL; AFTER that, answer.<|im_end|>' in text


def test_a_chat_template_beside_the_original_counts_if_it_shows_images(own: Golden):
    """An export with another prompt has one; those that some authors add are for text."""
    file = own.folder / 'chat_template.jinja'
    file.write_text("{{ messages[0]['content'] }}", encoding='utf-8')
    assert prompt(own.folder, ('user', 'Hi')).startswith('<s><|im_start|>system')
    file.write_text("Q: {% for p in messages[0]['content'] %}{% if p['type'] == 'image' %}<IMG_CONTEXT>{% else %}"
                    "{{ p['text'] }}{% endif %}{% endfor %}<|im_end|>", encoding='utf-8')  # fmt: skip
    assert prompt(own.folder, ('user', 'Hi')) == 'Q: Hi<|im_end|>'


def test_an_answer_is_learned_through_the_token_that_ends_it(own: Golden):
    processor = Processor(str(own.folder))
    messages = (Message('user', (TextPart('Hi'),)), Message('assistant', (TextPart('A bowl.'),)))
    sample = processor.tokenize(Conversation(messages))
    learned = sample.input_ids[np.asarray(sample.labels) != -100]
    assert processor.tokenizer.decode(learned) == 'A bowl.<|im_end|>'


# ---- real models


@pytest.mark.parametrize('name', [f'internvl2-{size}b' for size in (1, 2, 4, 8, 26, 40)])
def test_every_weight_of_a_real_model_has_its_place(name: str, check_real_model: Callable[..., None]):
    check_real_model(INTERNVL_CHAT, name)
    raw = json.loads((TESTS / 'fixtures' / 'layouts' / f'{name}.json').read_text(encoding='utf-8'))['config']
    assert INTERNVL_CHAT.read_config(raw).image_seq_length == 256
