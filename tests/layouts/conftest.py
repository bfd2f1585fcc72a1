"""What tests of real names share, and the parts of a LLaVA."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig

from vlmtune.layouts import Layout
from vlmtune.models.loading import build_outline
from vlmtune.testing.tiny_processors import PREPROCESSORS
from vlmtune.testing.tiny_tokenizers import build_tokenizer

GOLDENS = Path(__file__).resolve().parents[1] / 'goldens'
FIXTURES = Path(__file__).resolve().parents[1] / 'fixtures' / 'layouts'


@pytest.fixture(scope='session')
def pillow_of_the_goldens() -> None:
    """Fails, with the reason, under another major version of Pillow than made the goldens' pixels."""
    notes = [json.loads(path.read_text(encoding='utf-8')) for path in GOLDENS.glob('*.json')]
    made = {note['versions']['pillow'] for note in notes if 'pillow' in note['versions']}
    assert made
    if {version.split('.')[0] for version in made} != {PIL.__version__.split('.')[0]}:
        pytest.fail(
            f'the pixels in tests/goldens were made with Pillow {", ".join(sorted(made))}, and this is '
            f'{PIL.__version__}: 13 resizes some images downwards first, 12 always across first, which gives other '
            "bytes. Install the Pillow of requirements.txt: pip install 'pillow>=12.3,<13'",
            pytrace=False,
        )


def _unfolded(tensors: Mapping[str, Sequence[Any]]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for pattern, (_, shape) in tensors.items():
        head, _, rest = pattern.partition('{')
        hole, brace, tail = rest.partition('}')
        first, last = map(int, hole.split('..')) if brace else (0, 0)
        found |= {f'{head}{i if brace else ""}{tail}': tuple(shape) for i in range(first, last + 1)}
    return found


def _native_shapes(
    layout: Layout, config: PreTrainedConfig, originals: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    names, found = layout.name_map(config), {}
    for original, shape in originals.items():
        if names.is_kept(original):
            continue
        match = names.match(original)
        assert match is not None, original
        assert not found.keys() & set(match.native), original
        parts = match.rule.split(torch.empty(shape, device='meta'))
        found |= {name: tuple(part.shape) for name, part in zip(match.native, parts, strict=True)}
        assert tuple(match.rule.join(list(parts)).shape) == shape, original
    return found


@pytest.fixture(scope='session')
def unfolded() -> Callable[..., dict[str, tuple[int, ...]]]:
    """``unfolded({'a.{0..2}.b': [dtype, shape]})``: 'a.0.b', 'a.1.b' and 'a.2.b' with their shape."""
    return _unfolded


@pytest.fixture(scope='session')
def native_shapes() -> Callable[..., dict[str, tuple[int, ...]]]:
    """``native_shapes(layout, config, originals)``: the shapes of what they are here; each must have a place."""
    return _native_shapes


def _group(golden: Mapping[str, torch.Tensor], start: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(start): tensor for name, tensor in golden.items() if name.startswith(start)}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content), encoding='utf-8')


@pytest.fixture(scope='session')
def llava_parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden's parts as they lie on disk: an InternLM2, a CLIP, and what XTuner saves of a projector. Read only."""
    note = json.loads((GOLDENS / 'llava_parts.json').read_text(encoding='utf-8'))
    golden = load_file(GOLDENS / 'llava_parts.safetensors')
    root = tmp_path_factory.mktemp('parts')
    llm, tower = root / 'llm', root / 'tower'
    for folder, part in ((llm, 'llm'), (tower, 'visual_encoder')):
        folder.mkdir()
        save_file(_group(golden, f'weights/{part}/'), folder / 'model.safetensors', {'format': 'pt'})
    code = dict(architectures=['InternLM2ForCausalLM'], model_type='internlm2', torch_dtype='float32')
    _write_json(llm / 'config.json', note['llm'] | code)
    build_tokenizer('llama3').save_pretrained(llm)
    _write_json(tower / 'config.json', note['visual_encoder'] | dict(model_type='clip_vision_model'))
    _write_json(tower / 'preprocessor_config.json', PREPROCESSORS['llava'])
    projector = _group(golden, 'weights/pth/')
    torch.save({'state_dict': projector, 'meta': {'iter': 1}}, root / 'iter_1.pth')
    official = {name.replace('projector.model.', 'model.mm_projector.'): tensor for name, tensor in projector.items()}
    torch.save(official, root / 'mm_projector.bin')
    for name, settings in note['folders'].items():
        folder = root / 'hf' / name
        folder.mkdir(parents=True)
        stem = 'adapter_' if 'adapter' in name else ''
        save_file(_group(golden, f'folders/{name}/'), folder / f'{stem}model.safetensors', {'format': 'pt'})
        _write_json(folder / f'{stem}config.json', settings)
    return root


@pytest.fixture(scope='session')
def check_real_model() -> Callable[[Layout, str], None]:
    """``check_real_model(layout, 'points_1_5_7b')``: a real model's names and shapes and ours, one to one both ways."""

    def check(layout: Layout, name: str) -> None:
        fixture = json.loads((FIXTURES / f'{name}.json').read_text(encoding='utf-8'))
        assert {dtype for dtype, _ in fixture['tensors'].values()} == {'BF16'}
        config = layout.read_config(fixture['config'])
        expected = {key: tuple(tensor.shape) for key, tensor in build_outline(config).state_dict().items()}
        if config.tie_word_embeddings:
            expected.pop('lm_head.weight')
        assert _native_shapes(layout, config, _unfolded(fixture['tensors'])) == expected

    return check
