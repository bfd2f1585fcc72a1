"""Writes the quickstart's data from the PyPI package easy-vqa: real PNG files, questions and answers.

    python quickstart/prepare_data.py [--base]

easy-vqa (MIT, 5,000 images of 64x64 pixels, 48,248 questions) shows one coloured shape per image. The fine-tuning task
is one that its questions never ask for: describing the picture in a sentence. Colour and shape of an image are read
from the answers to its questions. ``--base`` also writes what the base model is trained on.
"""

import argparse
import json
import random
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import easy_vqa
from PIL import Image, ImageOps

DATA = Path(__file__).resolve().parent / 'data'
COLOURS = ('black', 'blue', 'brown', 'gray', 'green', 'red', 'teal', 'yellow')
SHAPES = ('circle', 'rectangle', 'triangle')
DESCRIBE = 'Describe the picture.'
FINE_TUNE_IMAGES = 1600
HELD_OUT_IMAGES = 400
SHIFT = 6  # pixels, of the shifted copies that the base model's first stage sees
COPIES = 3  # changed copies per image


class Thing(NamedTuple):
    """What an image shows."""

    colour: str
    shape: str


def sentence(thing: Thing) -> str:
    """The answer that the fine-tuning teaches."""
    return f'There is a {thing.colour} {thing.shape} in the picture.'


def questions(split: str) -> dict[int, list[tuple[str, str]]]:
    """Image -> its (question, answer) pairs, in the package's order."""
    read = easy_vqa.get_train_questions if split == 'train' else easy_vqa.get_test_questions
    by_image: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for question, answer, image in zip(*read(), strict=True):
        by_image[image].append((question, answer))
    return by_image


def find_thing(pairs: Iterable[tuple[str, str]]) -> Thing | None:
    """Colour and shape from the answers of one image; None if they do not tell both."""
    colour = shape = None
    for question, answer in pairs:
        if answer in COLOURS:
            colour = answer
        elif answer in SHAPES:
            shape = answer
        elif (answer == 'yes') != bool(re.search(r'\b(no|not)\b', question)):  # it is there
            words = re.findall(r'\w+', question)
            colour = next((word for word in words if word in COLOURS), colour)
            shape = next((word for word in words if word in SHAPES), shape)
    return Thing(colour, shape) if colour and shape else None


def row(image: str, turns: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """One LLaVA-style row: the image stands in the first question."""
    messages = []
    for i, (question, answer) in enumerate(turns):
        messages.append({'from': 'human', 'value': ('<image>\n' if i == 0 else '') + question})
        messages.append({'from': 'gpt', 'value': answer})
    return {'image': image, 'conversations': messages}


def write_rows(name: str, rows: Iterable[dict[str, Any]]) -> None:
    """Write ``data/<name>.jsonl``."""
    lines = [json.dumps(r) for r in rows]
    (DATA / f'{name}.jsonl').write_text('\n'.join(lines) + '\n', 'utf-8')
    print(f'{name}.jsonl: {len(lines)} rows')


def copy_images() -> None:
    """Copy the package's PNG files to ``data/images/{train,test}``."""
    for split, paths in (('train', easy_vqa.get_train_image_paths()), ('test', easy_vqa.get_test_image_paths())):
        folder = DATA / 'images' / split
        folder.mkdir(parents=True, exist_ok=True)
        for image, path in paths.items():
            shutil.copyfile(path, folder / f'{image}.png')


def described(split: str, *, count: int) -> list[dict[str, Any]]:
    """``count`` images of a split, picked by a fixed seed, each with its sentence."""
    things = {image: find_thing(pairs) for image, pairs in questions(split).items()}
    usable = sorted(image for image, thing in things.items() if thing is not None)
    picked = random.Random(0).sample(usable, count)
    return [row(f'{split}/{image}.png', [(DESCRIBE, sentence(things[image]))]) for image in picked]  # type: ignore[arg-type]


def changed_copies() -> Iterator[dict[str, Any]]:
    """The train images and shifted, mirrored copies of each, named in two words: teaches the base model to see."""
    rng = random.Random(1)
    folder = DATA / 'images' / 'changed'
    folder.mkdir(parents=True, exist_ok=True)
    for image, pairs in sorted(questions('train').items()):
        thing = find_thing(pairs)
        if thing is None:
            continue
        name = f'{thing.colour} {thing.shape}'
        yield row(f'train/{image}.png', [('what is it?', name)])
        with Image.open(DATA / 'images' / 'train' / f'{image}.png') as file:
            original = file.convert('RGB')
        for copy in range(COPIES):
            path = f'changed/{image}_{copy}.png'
            _change(original, rng).save(DATA / 'images' / path)
            yield row(path, [('what is it?', name)])


def _change(image: Image.Image, rng: random.Random) -> Image.Image:
    """Shift by up to SHIFT pixels over the image's own background, and mirror one time in two."""
    shifted = Image.new('RGB', image.size, image.getpixel((0, 0)))  # type: ignore[arg-type]
    shifted.paste(image, (rng.randint(-SHIFT, SHIFT), rng.randint(-SHIFT, SHIFT)))
    return ImageOps.mirror(shifted) if rng.random() < 0.5 else shifted


def grouped_questions(*, turns: int) -> Iterator[dict[str, Any]]:
    """Every question of the train split once, ``turns`` per row in a shuffled order."""
    rng = random.Random(2)
    for image, pairs in sorted(questions('train').items()):
        rng.shuffle(pairs)
        for start in range(0, len(pairs), turns):
            yield row(f'train/{image}.png', pairs[start : start + turns])


def reminders() -> Iterator[dict[str, Any]]:
    """Every picture's name and a quarter of the questions: two stages of questions have pushed naming out."""
    for image, pairs in sorted(questions('train').items()):
        thing = find_thing(pairs)
        if thing is not None:
            yield row(f'train/{image}.png', [('what is it?', f'{thing.colour} {thing.shape}')])
        for pair in random.Random(image).sample(pairs, len(pairs) // 4):
            yield row(f'train/{image}.png', [pair])


def main() -> None:
    """Write the files of the quickstart, and with --base those of the base model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--base', action='store_true', help='also write what the base model is trained on')
    arguments = parser.parse_args()
    DATA.mkdir(exist_ok=True)
    copy_images()
    write_rows('describe_train', described('train', count=FINE_TUNE_IMAGES))
    write_rows('describe_held_out', described('test', count=HELD_OUT_IMAGES))
    if arguments.base:
        write_rows('base_1_names', changed_copies())
        write_rows('base_2_questions', grouped_questions(turns=4))
        write_rows('base_3_questions', grouped_questions(turns=1))
        write_rows('base_4_reminders', reminders())
        test = sorted(questions('test').items())
        write_rows('questions_test', (row(f'test/{image}.png', [pair]) for image, pairs in test for pair in pairs))


if __name__ == '__main__':
    main()
