"""A LLaVA from parts against XTuner: goldens/make_llava_parts.py says how the numbers were made."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, CLIPVisionModel

from vlmtune.data import Processor
from vlmtune.layouts import find_source, open_weights, read_config
from vlmtune.layouts.llava_parts import LLAVA_PARTS
from vlmtune.models.loading import build_outline, load_model
from vlmtune.structures import Conversation, ImagePart, ImageRef, ImageSize, Message, TextPart
from vlmtune.testing.tiny_processors import PREPROCESSORS
from vlmtune.testing.tiny_towers import write_tiny_tower
from vlmtune.utils.errors import ConfigError

TESTS = Path(__file__).resolve().parents[1]
CASES = ('one_image', 'several_images', 'several_turns', 'text_only')
PATCHES, MARK = 9, -200  # of an image; XTuner's mark of one
# The same operations in another order, in float32, on logits of size 3: measured 2e-6, with merged adapters 4e-6.
TOLERANCE = 1e-5
NOTE = json.loads((TESTS / 'goldens' / 'llava_parts.json').read_text(encoding='utf-8'))


@pytest.fixture(scope='module')
def golden() -> dict[str, torch.Tensor]:
    return load_file(TESTS / 'goldens' / 'llava_parts.safetensors')


def group(golden: Mapping[str, torch.Tensor], start: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(start): tensor for name, tensor in golden.items() if name.startswith(start)}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content), encoding='utf-8')


def settings_of(parts: Path, pretrained_pth: str | Path | None = 'iter_1.pth', **others: Any) -> dict[str, Any]:
    settings = dict(llm_name_or_path=str(parts / 'llm'), visual_encoder_name_or_path=str(parts / 'tower'))
    pth = None if pretrained_pth is None else str(parts / pretrained_pth)
    return settings | dict(pretrained_pth=pth) | others


def logits_of(model: torch.nn.Module, golden: Mapping[str, torch.Tensor], case: str) -> torch.Tensor:
    image = model.config.image_token_id
    given = golden[f'inputs/{case}/input_ids'].tolist()
    ids = [i for token in given for i in ([image] * PATCHES if token == MARK else [token])]
    pixels = golden[f'inputs/{case}/pixel_values']
    with torch.no_grad():
        return model(
            input_ids=torch.tensor([ids]), pixel_values=pixels if len(pixels) else None, use_cache=False
        ).logits[0]


def assert_logits(settings: dict[str, Any], golden: Mapping[str, torch.Tensor], expected: str) -> None:
    model, family = load_model(settings, dtype=torch.float32)
    assert family.model_type == 'llava'
    assert not model.config.tie_word_embeddings
    for case in CASES:
        logits = logits_of(model, golden, case)[:, : NOTE['llm']['vocab_size']]
        torch.testing.assert_close(logits, golden[f'{expected}/{case}'], atol=TOLERANCE, rtol=0)


# ---- as XTuner


@pytest.mark.parametrize('projector', ['iter_1.pth', 'hf/projector', 'mm_projector.bin'])
def test_logits(projector: str, llava_parts: Path, golden: dict[str, torch.Tensor]):
    assert_logits(settings_of(llava_parts, projector), golden, 'logits')


def test_logits_of_the_three_folders(llava_parts: Path, golden: dict[str, torch.Tensor]):
    assert_logits(settings_of(llava_parts, 'hf'), golden, 'adapted')


def test_a_work_dir_stands_for_its_last_checkpoint(llava_parts: Path, golden: dict[str, torch.Tensor], tmp_path: Path):
    ours = {
        f'model.multi_modal_projector.linear_{1 + int(name[6]) // 2}.{name[8:]}': tensor
        for name, tensor in group(golden, 'folders/projector/').items()
    }
    for step, scale in ((1, 0.0), (2, 1.0)):
        (tmp_path / f'iter_{step}.pth').mkdir()
        saved = {name: scale * tensor for name, tensor in ours.items()}
        save_file(saved, tmp_path / f'iter_{step}.pth' / 'model.safetensors')
    (tmp_path / 'last_checkpoint').write_text('iter_2.pth\n')
    assert_logits(settings_of(llava_parts, tmp_path), golden, 'logits')


def test_padded_pixels(llava_parts: Path, golden: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture):
    with caplog.at_level('INFO'):
        processor = Processor(settings_of(llava_parts, pad_image_to_square=True))
    assert 'slower' not in caplog.text
    plain = Processor(settings_of(llava_parts))
    images = group(golden, 'images/')
    assert len(images) == 5
    for name, pixels in images.items():
        image = Image.fromarray(pixels.numpy())
        found = processor.image_inputs([image])['pixel_values'][0]
        torch.testing.assert_close(found, golden[f'pixels/{name}'], atol=1e-5, rtol=0)  # theirs rounds more often
        if image.width != image.height:
            assert (plain.image_inputs([image])['pixel_values'][0] - found).abs().max() > 0.1


# ---- prompts and tokens


def ask(*, image: bool = True) -> Conversation:
    parts = (*((ImagePart(0),) if image else ()), TextPart('What is it?'))
    return Conversation((Message('user', parts),), (ImageRef(path='x.png'),) if image else ())


def test_prompt_of_a_named_template(llava_parts: Path):
    processor = Processor(settings_of(llava_parts), prompt_template='internlm2_chat')
    text = processor.renderer.render(ask(), add_generation_prompt=True).text
    start, end, bos = '<|im_start|>', '<|im_end|>', processor.tokenizer.bos_token
    assert text == f'{bos}{start}user\n<image>\nWhat is it?{end}\n{start}assistant\n'


def test_the_language_models_own_template_takes_images(llava_parts: Path):
    processor, own = Processor(settings_of(llava_parts)), Processor(str(llava_parts / 'llm'))
    text = processor.renderer.render(ask(), add_generation_prompt=True).text
    plain = own.renderer.render(ask(image=False), add_generation_prompt=True).text
    assert text == plain.replace('What', '<image>\nWhat')
    sample = processor.tokenize(ask(), image_sizes=[ImageSize(60, 40)])
    assert (sample.input_ids == processor.image_token_id).sum() == PATCHES


def test_new_rows_are_the_mean_of_the_others(llava_parts: Path, golden: dict[str, torch.Tensor]):
    model, _ = load_model(settings_of(llava_parts), dtype=torch.float32)
    have, rows = NOTE['llm']['vocab_size'], model.config.text_config.vocab_size
    assert rows % 64 == 0
    assert have <= model.config.image_token_id < rows
    for weight, name in (
        (model.get_input_embeddings().weight, 'model.tok_embeddings'),
        (model.lm_head.weight, 'output'),
    ):
        old = golden[f'weights/llm/{name}.weight']
        torch.testing.assert_close(weight[:have], old)
        torch.testing.assert_close(weight[have:], old.mean(0).expand(rows - have, -1))


def test_a_tokenizer_with_room_keeps_its_rows(tiny_model: Any, llava_parts: Path):
    llm = tiny_model('qwen2', tie_word_embeddings=True)
    settings = settings_of(llava_parts, None, llm_name_or_path=str(llm))
    model, _ = load_model(settings, dtype=torch.float32)
    own = read_config(str(llm))
    assert model.config.image_token_id < model.config.text_config.vocab_size == own.vocab_size
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.config.tie_word_embeddings


# ---- parts


def test_a_siglip_has_no_class_token(tiny_model: Any, tmp_path: Path):
    tower = write_tiny_tower('siglip', tmp_path / 'siglip')
    settings = dict(llm_name_or_path=str(tiny_model('llama')), visual_encoder_name_or_path=str(tower))
    processor, (model, _) = Processor(settings), load_model(settings, dtype=torch.float32)
    image = Image.new('RGB', (50, 30), 'red')
    sample = processor.tokenize(ask(), image_sizes=[ImageSize(50, 30)])
    count = int((sample.input_ids == processor.image_token_id).sum())
    features = model.model.get_image_features(processor.image_inputs([image])['pixel_values']).pooler_output
    assert count == PATCHES == features[0].shape[0] == model.config.image_seq_length
    assert_source(model, tower, start='vision_model.')
    with pytest.raises(ConfigError, match="has none; set 'full'"):
        Processor(settings | dict(vision_feature_select_strategy='default'))


def test_a_whole_clip_and_its_encoder_alone_are_the_same(tiny_model: Any, tmp_path: Path):
    tower = write_tiny_tower('clip', tmp_path / 'clip')
    CLIPVisionModel.from_pretrained(tower).save_pretrained(tmp_path / 'alone')
    shutil.copy(tower / 'preprocessor_config.json', tmp_path / 'alone')
    shutil.copytree(tmp_path / 'alone', tmp_path / 'bare')
    weights = load_file(tmp_path / 'alone' / 'model.safetensors')
    bare = {name.removeprefix('vision_model.'): tensor for name, tensor in weights.items()}
    save_file(bare, tmp_path / 'bare' / 'model.safetensors', {'format': 'pt'})
    for folder in (tower, tmp_path / 'alone', tmp_path / 'bare'):
        settings = dict(llm_name_or_path=str(tiny_model('llama')), visual_encoder_name_or_path=str(folder))
        model, _ = load_model(settings, dtype=torch.float32)
        assert_source(model, tower, start='vision_model.')


def assert_source(model: torch.nn.Module, tower: Path, *, start: str) -> None:
    weights = {name.removeprefix(start): w for name, w in open_weights(tower).items() if name.startswith(start)}
    mine = model.model.vision_tower.state_dict()
    assert set(weights) == set(mine)
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, weights[name].read())


def test_layer_and_class_token_are_settings(llava_parts: Path, golden: dict[str, torch.Tensor]):
    settings = settings_of(llava_parts, vision_feature_layer=-1, vision_feature_select_strategy='full')
    processor, (model, _) = Processor(settings), load_model(settings, dtype=torch.float32)
    sample = processor.tokenize(ask(), image_sizes=[ImageSize(60, 40)])
    assert (sample.input_ids == processor.image_token_id).sum() == PATCHES + 1 == model.config.image_seq_length
    pixels = golden['inputs/one_image/pixel_values']
    with torch.no_grad():
        last = model.model.vision_tower(pixels).last_hidden_state
        features = model.model.get_image_features(pixels).pooler_output[0]
        torch.testing.assert_close(features, model.model.multi_modal_projector(last)[0])


def test_a_new_projector_is_always_the_same_and_leaves_random_numbers_alone(llava_parts: Path):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, _ = load_model(settings_of(llava_parts, None), dtype=torch.float32)
    assert torch.rand(1) == expected
    second, _ = load_model(settings_of(llava_parts, None), dtype=torch.float32)
    for mine, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    weight = first.model.multi_modal_projector.linear_1.weight
    assert 0.9 / weight.shape[1] ** 0.5 < weight.abs().max() <= 1 / weight.shape[1] ** 0.5


def test_saved_it_is_a_plain_llava(llava_parts: Path, golden: dict[str, torch.Tensor], tmp_path: Path):
    settings = settings_of(llava_parts, 'hf', pad_image_to_square=True)
    model, _ = load_model(settings, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    processor = Processor(settings)
    processor.save(tmp_path)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits_of(plain, golden, 'one_image'), logits_of(model, golden, 'one_image'))
    again, image = Processor(str(tmp_path)), Image.new('RGB', (50, 30), 'red')
    assert again.tokenize(ask(), image_sizes=[ImageSize(50, 30)]).input_ids.tolist() == (
        processor.tokenize(ask(), image_sizes=[ImageSize(50, 30)]).input_ids.tolist()
    )
    pixels = [p.image_inputs([image])['pixel_values'] for p in (again, processor)]
    assert torch.equal(*pixels)


def test_the_source_of_equal_parts_is_one_folder(llava_parts: Path):
    source = find_source(settings_of(llava_parts))
    assert source == find_source(dict(reversed(settings_of(llava_parts).items())))
    assert source != find_source(settings_of(llava_parts, 'hf'))
    assert Path(source).name == 'llava-llm-tower'
    assert find_source('org/name') == 'org/name'


def test_the_config_says_nothing_of_where_its_parts_lay(tiny_model: Any, tmp_path: Path):
    clip = write_tiny_tower('clip', tmp_path / 'clip')
    CLIPVisionModel.from_pretrained(clip).save_pretrained(tmp_path / 'alone')
    shutil.copy(clip / 'preprocessor_config.json', tmp_path / 'alone')
    llm = tiny_model('qwen2')
    settings = dict(llm_name_or_path=str(llm), visual_encoder_name_or_path=str(tmp_path / 'alone'))
    load_model(settings)[0].save_pretrained(tmp_path / 'out')
    text = (tmp_path / 'out' / 'config.json').read_text(encoding='utf-8')
    assert str(tmp_path) not in text
    assert str(llm) not in text


# ---- full size


@pytest.mark.parametrize('tower', ['clip_vit_l14_336', 'siglip_so400m_384'])
def test_every_weight_of_the_parts_at_full_size(
    tower: str, llava_parts: Path, tmp_path: Path, unfolded: Callable[..., Any], native_shapes: Callable[..., Any]
):
    """Every weight of InternLM2-chat-1.8B and of the tower has its place, and every place has its weight."""
    fixtures = [TESTS / 'fixtures' / name for name in ('layouts/internlm2-chat-1_8b.json', f'towers/{tower}.json')]
    llm, vision = (json.loads(path.read_text(encoding='utf-8')) for path in fixtures)
    folders = tmp_path / 'internlm2-chat-1_8b', tmp_path / tower
    for folder, fixture, files in zip(
        folders, (llm, vision), (llava_parts / 'llm', llava_parts / 'tower'), strict=True
    ):
        shutil.copytree(files, folder, ignore=shutil.ignore_patterns('*.safetensors'))
        write_json(folder / 'config.json', fixture['config'])
    side = vision['config']['vision_config']['image_size']
    images = PREPROCESSORS['llava'] | dict(crop_size=dict(height=side, width=side))
    write_json(folders[1] / 'preprocessor_config.json', images)
    config = read_config(find_source(dict(
        llm_name_or_path=str(folders[0]), visual_encoder_name_or_path=str(folders[1])
    )))  # fmt: skip
    assert config.image_seq_length == {'clip_vit_l14_336': 576, 'siglip_so400m_384': 729}[tower]
    wide, text = vision['config']['vision_config']['hidden_size'], llm['config']['hidden_size']
    originals = {f'llm.{name}': shape for name, shape in unfolded(llm['tensors']).items()}
    originals |= {f'visual_encoder.{name}': shape for name, shape in unfolded(vision['tensors']).items()}
    originals |= {'projector.model.0.weight': (text, wide), 'projector.model.2.weight': (text, text)}
    originals |= {'projector.model.0.bias': (text,), 'projector.model.2.bias': (text,)}
    found = native_shapes(LLAVA_PARTS, config, originals)
    expected = {name: tuple(tensor.shape) for name, tensor in build_outline(config).state_dict().items()}
    rows = llm['config']['vocab_size']
    assert found == {name: (min(s[0], rows) if 'embed_tokens' in name or 'lm_head' in name else s[0], *s[1:])
                     for name, s in expected.items()}  # fmt: skip
