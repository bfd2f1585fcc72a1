"""Checkpoints without training: a tiny model, its trainable weights moved, written the way the engine writes."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.apps.asked import QUESTIONS
from vlmtune.config import dump_config, load_config
from vlmtune.data import Processor
from vlmtune.engine import checkpoint
from vlmtune.engine.checkpoint import CONFIG_FILE, PROCESSOR_DIR, WEIGHTS_FILE
from vlmtune.evaluation.generation import answering, encode_prompt, prompt_inputs
from vlmtune.models import SupervisedFinetune
from vlmtune.structures import Conversation, ImagePart, ImageRef, Message, TextPart
from vlmtune.utils.disk import Written, hash_file

LORA = dict(r=4, alpha=16)
_CONFIG = """
from vlmtune.data import SupervisedDataset, load_rows
from vlmtune.models import SupervisedFinetune

pretrained_model_name_or_path = {base!r}
model = dict(type=SupervisedFinetune, pretrained_model_name_or_path=pretrained_model_name_or_path, tune={tune!r},
             quantization={quantization!r}, dtype={dtype!r}, lora={lora!r})
train_dataloader = dict(dataset=dict(type=SupervisedDataset, rows=dict(type=load_rows, path='/data/squares.json')))
"""


@dataclass(frozen=True)
class Run:
    """A finished tiny run."""

    base: str
    config: str
    checkpoint: str
    model: SupervisedFinetune
    processor: Processor

    def logits(self, model: torch.nn.Module | None = None) -> torch.Tensor:
        """float[1, L, V] for a fixed conversation, of the trained model or another one, computed as in training."""
        model = self.model.model if model is None else model
        autocast = torch.autocast('cpu', dtype=self.model.dtype, enabled=self.model.dtype != torch.float32)
        with torch.no_grad(), answering(model), autocast:
            return model(**self.inputs(), use_cache=False).logits.float()

    def inputs(self) -> dict[str, torch.Tensor]:
        image = Path(self.config).with_name('square.png')
        sample = encode_prompt(self.processor, question(image if self.processor.family.has_vision else None))
        return prompt_inputs(self.processor, [sample])


def question(image: Path | None = None, text: str = 'What colour is the square?') -> Conversation:
    parts = () if image is None else (ImagePart(0),)
    images = () if image is None else (ImageRef(path=str(image)),)
    return Conversation((Message('user', (*parts, TextPart(text))),), images)


@pytest.fixture(scope='session')
def trained_run(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """``trained_run('llava', llm='lora', projector='full')``; the same arguments give the same run. Read only."""
    made: dict[str, Run] = {}

    def factory(
        model_type: str,
        *,
        lora: dict[str, object] | None = None,
        quantization: str | None = None,
        dtype: str = 'float32',
        special_tokens: tuple[str, ...] = (),
        image_processor: dict[str, object] | None = None,
        model_options: dict[str, object] | None = None,
        base: Path | None = None,
        **tune: str,
    ) -> Run:
        key = repr((model_type, lora, quantization, dtype, special_tokens, image_processor, model_options, base, tune))
        if key not in made:
            source = str(base or tiny_model(model_type, **(model_options or {})))
            template = 'vicuna' if model_type in ('llava', 'llava_next') else None  # their own never ends an answer
            processor = Processor(
                source, prompt_template=template, special_tokens=special_tokens, image_processor=image_processor
            )
            model = SupervisedFinetune(
                source,
                tune=tune,
                lora={**LORA, **(lora or {})},
                quantization=quantization,
                dtype=dtype,
                vocab_size=_vocab_size(processor) if special_tokens else None,
            )
            folder = tmp_path_factory.mktemp('run')
            Image.new('RGB', (60, 40), 'red').save(folder / 'square.png')
            settings = dict(
                base=source, tune=tune, quantization=quantization, dtype=dtype, lora={**LORA, **(lora or {})}
            )
            (folder / 'recipe.py').write_text(_CONFIG.format(**settings))
            _move_weights(model)
            path = _write_checkpoint(model, processor, folder)
            made[key] = Run(source, str(folder / 'recipe.py'), str(path), model, processor)
        return made[key]

    return factory


@pytest.fixture
def rewrite() -> Callable[[Run, Path, Callable[[str], str]], Path]:
    """``rewrite(run, folder, change)``: its checkpoint with another config.py, and a manifest that holds."""

    def factory(run: Run, folder: Path, change: Callable[[str], str]) -> Path:
        target = folder / 'iter_2.pth'
        shutil.copytree(run.checkpoint, target)
        config, manifest = target / 'config.py', json.loads((target / 'manifest.json').read_text())
        config.write_text(change(config.read_text()))
        manifest['files']['config.py'] = dict(size=config.stat().st_size, sha256=hash_file(config))
        (target / 'manifest.json').write_text(json.dumps(manifest))
        return target

    return factory


@pytest.fixture
def rewrite_base(rewrite) -> Callable[[Run, Path, Path], Path]:
    """``rewrite_base(run, base, folder)``: its checkpoint, as if it had been trained on that base."""
    return lambda run, base, folder: rewrite(run, folder, lambda text: text.replace(run.base, str(base)))


def _vocab_size(processor: Processor) -> int:
    """More than the embeddings have, as with a tokenizer that fills them."""
    return processor.config.get_text_config().vocab_size + len(processor.special_tokens)


GOLDENS = Path(__file__).resolve().parents[1] / 'goldens'


@pytest.fixture(scope='session')
def internlm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny InternLM2 as its authors store one: two files of weights, two dtypes, code, a licence. Read only."""
    folder = tmp_path_factory.mktemp('internlm2') / 'internlm2-tiny'
    folder.mkdir()
    golden, note = load_file(GOLDENS / 'internlm2.safetensors'), json.loads((GOLDENS / 'internlm2.json').read_text())
    weights = {name.removeprefix('weights/'): t for name, t in golden.items() if name.startswith('weights/')}
    files: dict[str, dict[str, torch.Tensor]] = {f'model-0000{i}-of-00002.safetensors': {} for i in (1, 2)}
    for name, tensor in weights.items():
        kept = tensor if 'norm' in name else tensor.bfloat16()
        files[f'model-0000{1 + (".layers.1." in name)}-of-00002.safetensors'][name] = kept
    places = {name: file for file, tensors in files.items() for name in tensors}
    for file, tensors in files.items():
        save_file(tensors, folder / file, metadata={'format': 'pt'})
    (folder / 'model.safetensors.index.json').write_text(
        json.dumps({'metadata': {'total_size': 1}, 'weight_map': places})
    )
    (folder / 'config.json').write_text(json.dumps(note['config'] | dict(torch_dtype='bfloat16'), indent=4))
    (folder / 'tokenizer_config.json').write_text(json.dumps(note['tokenizer_config']))
    (folder / 'generation_config.json').write_text(json.dumps(dict(bos_token_id=1, eos_token_id=[2])))
    (folder / 'tokenizer.model').write_bytes(golden['files/tokenizer.model'].numpy().tobytes())
    for name in ('modeling_internlm2.py', 'tokenization_internlm2.py', 'configuration_internlm2.py'):
        (folder / name).write_text('raise SystemExit("this was run")')
    (folder / 'LICENSE').write_text('as it is')
    (folder / 'README.md').write_text('the card of the base')
    (folder / '.hidden').write_text('of git')
    return folder


@torch.no_grad()
def _move_weights(model: SupervisedFinetune) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.named_trainable().values():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def _write_checkpoint(model: SupervisedFinetune, processor: Processor, folder: Path) -> Path:
    target = folder / checkpoint.checkpoint_name(2)
    staging = checkpoint.start(target)
    save_file({name: p.detach().clone() for name, p in model.named_trainable().items()}, staging / WEIGHTS_FILE)
    dump_config(load_config(folder / 'recipe.py'), staging / CONFIG_FILE)
    processor.save(staging / PROCESSOR_DIR)
    if model.lora_config is not None:
        model.lora_config.save_pretrained(str(staging))
    files = {
        path.relative_to(staging).as_posix(): Written(path.stat().st_size, hash_file(path))
        for path in staging.rglob('*')
        if path.is_file()
    }
    checkpoint.seal(staging, target, files=files, meta=dict(iteration=2, world_size=1, resumable=False))
    return target


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with pictures and questions, in which commands run."""
    monkeypatch.chdir(tmp_path)
    turns = []
    for i, question in enumerate(QUESTIONS):
        Image.new('RGB', (40 + 20 * i, 300 if i == 3 else 60), (50 * i, 20, 90)).save(tmp_path / f'{i}.png')
        turns.append([{'from': 'human', 'value': f'<image>\n{question}'}, {'from': 'gpt', 'value': f'answer {i}'}])
    rows = [dict(image=f'{i}.png', conversations=talk) for i, talk in enumerate(turns)]
    (tmp_path / 'rows.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return tmp_path
