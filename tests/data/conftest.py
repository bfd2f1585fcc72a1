"""Processors of the tiny models, conversations in one line, what transformers' own processors make of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

from tests.data.plans import World
from vlmtune.data import (
    Processor,
    StreamingDataset,
    SupervisedDataset,
    chat_template_map_fn,
    llava_map_fn,
    load_rows,
)
from vlmtune.structures import Conversation, ImagePart, ImageRef, ImageSize, Message, TextPart

IMAGE = object()
# The others' constructors ask for a video processor, and that for torchvision.
BUILDABLE = ('llava', 'llava_next', 'idefics3', 'gemma3', 'paligemma')


@pytest.fixture(scope='session')
def processor(tiny_model) -> Callable[..., Processor]:
    """``processor('llava', prompt_template='vicuna')``; made once. Read only."""
    known: dict[str, Processor] = {}

    def factory(name: str, **settings: Any) -> Processor:
        key = repr((name, sorted(settings.items())))
        if key not in known:
            known[key] = Processor(str(tiny_model(name)), **settings)
        return known[key]

    return factory


@pytest.fixture
def make(processor) -> Callable[..., Processor]:
    """As ``processor``; LLaVA's own template never ends an answer."""
    return lambda name, **settings: processor(
        name, **({'prompt_template': 'vicuna'} if name in ('llava', 'llava_next') else {}), **settings
    )


@pytest.fixture(scope='session')
def image_mark() -> object:
    """Stands for an image in ``talk``."""
    return IMAGE


@pytest.fixture(scope='session')
def talk() -> Callable[..., Conversation]:
    """``talk(('user', image_mark, 'What?'), ('assistant', 'A cat.'))``."""

    def build(*turns: tuple) -> Conversation:
        messages, images = [], 0
        for role, *pieces in turns:
            parts = []
            for piece in pieces:
                parts.append(ImagePart(images) if piece is IMAGE else TextPart(piece))
                images += piece is IMAGE
            messages.append(Message(role, tuple(parts)))
        return Conversation(tuple(messages), tuple(ImageRef(path=f'{i}.png') for i in range(images)))

    return build


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of three pictures, 0.png to 2.png."""
    folder = tmp_path / 'images'
    folder.mkdir()
    for i, size in enumerate([(60, 90), (100, 40), (28, 28)]):
        Image.new('RGB', size, (50 * i, 100, 200)).save(folder / f'{i}.png')
    return folder


@pytest.fixture
def build(processor, images, tmp_path) -> Callable[..., SupervisedDataset]:
    """``build(row, row, ...)``: a data set over a .jsonl file of these rows."""

    def run(*rows: dict[str, Any], model: str = 'llava', **settings: Any) -> SupervisedDataset:
        path = tmp_path / 'train.jsonl'
        if rows:
            path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
        mine = processor(model, prompt_template='vicuna' if model == 'llava' else None)
        defaults = dict(
            rows=dict(type=load_rows, path=str(path)),
            dataset_map_fn=dict(type=llava_map_fn),
            template_map_fn=dict(type=chat_template_map_fn),
        )
        return SupervisedDataset(processor=mine, image_folder=str(images), **{**defaults, **settings})

    return run


@pytest.fixture
def write(tmp_path: Path) -> Callable[[list[Any]], Path]:
    """``write(rows)``: the path of a .jsonl file; a row that is text is written as it is."""

    def file(rows: list[Any]) -> Path:
        path = tmp_path / 'rows.jsonl'
        path.write_text(''.join((line if isinstance(line, str) else json.dumps(line)) + '\n' for line in rows))
        return path

    return file


@pytest.fixture
def stream(processor) -> Callable[..., StreamingDataset]:
    """``stream(rows)``: with windows of 8 rows."""

    def open_stream(rows: Any, **settings: Any) -> StreamingDataset:
        defaults = dict(
            processor=processor('llava', prompt_template='vicuna'),
            dataset_map_fn=llava_map_fn,
            template_map_fn=chat_template_map_fn,
            max_length=64,
            shuffle_window=8,
        )
        return StreamingDataset(rows, **{**defaults, **settings})

    return open_stream


@pytest.fixture
def world(tmp_path, processor) -> World:
    """A data set whose plan is kept in ``world.cache``."""
    return World(tmp_path, processor)


@pytest.fixture
def outcome(caplog) -> Callable[[], str]:
    """``outcome()``: 'hit', or why rows were planned, of what was built since the last call."""
    caplog.set_level('INFO')

    def said() -> str:
        lines = [record.getMessage() for record in caplog.records if record.name == 'vlmtune.data.plan_cache']
        caplog.clear()
        if any('nothing changed' in line for line in lines):
            return 'hit'
        (reason,) = [line for line in lines if 'planning' in line]
        return reason.partition(': ')[2].partition('; planning')[0]

    return said


def as_messages(conversation: Conversation, *, as_parts: bool) -> list[dict[str, Any]]:
    """The form that transformers takes."""
    out = []
    for message in conversation.messages:
        parts = [
            {'type': 'text', 'text': p.text} if isinstance(p, TextPart) else {'type': 'image'} for p in message.parts
        ]
        out.append({'role': message.role, 'content': parts if as_parts else message.text})
    return out


def _family_processor(mine: Processor) -> Any:
    """The family's processor; one that cannot be built gets what its expansion reads by hand."""
    if mine.family.model_type in BUILDABLE:
        return AutoProcessor.from_pretrained(mine.source)
    image_processor = AutoImageProcessor.from_pretrained(mine.source)
    settings = mine.joint_settings
    name = (
        settings.get('processor_class')
        or json.loads(Path(mine.source, 'preprocessor_config.json').read_text())['processor_class']
    )
    processor = object.__new__(getattr(transformers, name))
    processor.__dict__.update(
        tokenizer=AutoTokenizer.from_pretrained(mine.source),
        image_processor=image_processor,
        image_token=mine.tokenizer.convert_ids_to_tokens(mine.image_token_id),
        start_image_token='<img>',
        end_image_token='</img>',
        fake_image_token='<fake_token_around_image>',
        global_image_token='<global-img>',
        **{key: value for key, value in settings.items() if key not in ('processor_class', 'image_token')},
    )
    return processor


@pytest.fixture(scope='session')
def their_processor() -> Callable[[Processor], Any]:
    """``their_processor(mine)``: transformers' processor of the same model; made once."""
    known: dict[str, Any] = {}

    def find(mine: Processor) -> Any:
        if mine.source not in known:
            known[mine.source] = _family_processor(mine)
        return known[mine.source]

    return find


def _paligemma_ids(processor: Any, conversation: Conversation, images: list[Image.Image]) -> list[int]:
    """It takes a question and an answer instead of a rendered conversation, and never a question without an image."""
    question, *answer = (message.text for message in conversation.messages)
    text = ['<image>' * len(images) + question]
    return processor(images=[images], text=text, suffix=answer or None)['input_ids'][0]


@pytest.fixture(scope='session')
def theirs(their_processor) -> Callable[..., list[int]]:
    """Token ids as transformers' own processor makes them, from real pixels and with the same chat template."""

    def ids(mine: Processor, conversation: Conversation, sizes: list[ImageSize], **render: Any) -> list[int]:
        images = [Image.radial_gradient('L').resize((size.width, size.height)).convert('RGB') for size in sizes]
        if mine.family.model_type == 'paligemma':
            return _paligemma_ids(their_processor(mine), conversation, images)
        text = AutoTokenizer.from_pretrained(mine.source).apply_chat_template(
            as_messages(conversation, as_parts=mine.family.has_vision),
            tokenize=False,
            chat_template=mine.tokenizer.chat_template,
            **render,
        )
        if not mine.family.has_vision:
            return mine.tokenizer(text, add_special_tokens=False)['input_ids']
        processor = their_processor(mine)
        by_sample = [images] if mine.family.model_type in ('gemma3', 'llava_onevision') else images
        if mine.family.model_type in BUILDABLE:
            adds_bos = not text.startswith(mine.tokenizer.bos_token)  # as its apply_chat_template decides
            shown = by_sample if images else None
            return processor(images=shown, text=[text], add_special_tokens=adds_bos)['input_ids'][0]
        if images:
            options = dict(getattr(type(processor), 'images_kwargs', {}))
            _, expansions = processor._process_images(by_sample, **options, return_tensors='pt')
            around = text.split(processor.image_token)
            text = around[0] + ''.join(e + after for e, after in zip(expansions, around[1:], strict=True))
        return processor.tokenizer(text)['input_ids']

    return ids
