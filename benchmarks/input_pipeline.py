"""Images per second from JPEG bytes to the batch: vlmtune's loader, the library's image processor, Pillow alone.

"Pillow" decodes and resizes to the sizes that the model takes, and nothing more; what resizes with Pillow in one
process cannot be faster. "Library" is the image processor of transformers called the plain way on the decoded image.
"Bytes" is vlmtune's function in its place, which makes the batch's bytes; the model makes floats of them on its device.
"Floats" does that too, on the CPU. These take one image at a time, no tokens, no batch. The loader's numbers hold
everything from the file to the collated batch. Every process has one torch thread. The contenders run in turn, several
rounds; the table shows medians.

python benchmarks/input_pipeline.py [--images 64] [--rounds 5]
"""

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe_machine
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader

from vlmtune.data import Processor, SupervisedDataset, build_train_loader, chat_template_map_fn, llava_map_fn
from vlmtune.data.images import load_image
from vlmtune.structures import ImageRef
from vlmtune.testing import write_tiny_model

WIDTH, HEIGHT = 640, 480  # pixels
BATCH = 4  # samples, one image each
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # model type: (what it stands for, its hub settings)
    'qwen2_5_vl': ('Qwen2.5-VL, 644 x 476', dict(min_pixels=56 * 56, max_pixels=12_845_056)),
    'llava': ('LLaVA-1.5, 336 x 336', dict(size={'shortest_edge': 336}, crop_size={'height': 336, 'width': 336})),
    'internvl': ('InternVL3, 12 tiles of 448 and one', dict(size={'height': 448, 'width': 448}, max_patches=12)),
}
RESIZED = {'qwen2_5_vl': [(644, 476)], 'llava': [(448, 336)], 'internvl': [(1792, 1344), (448, 448)]}  # (width, height)


def draw_photo(seed: int) -> bytes:
    """A JPEG of soft light, 40 shapes and the grain of a sensor; quality 90."""
    random = np.random.default_rng(seed)
    light = Image.fromarray(random.integers(40, 216, (6, 8, 3), dtype=np.uint8))
    canvas = light.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(canvas)
    for _ in range(40):
        left, top = random.integers(0, (WIDTH, HEIGHT)).tolist()
        width, height = random.integers(8, 160, 2).tolist()
        shape = pen.ellipse if random.random() < 0.5 else pen.rectangle
        shape((left, top, left + width, top + height), fill=tuple(random.integers(0, 256, 3).tolist()))
    grain = np.asarray(canvas) + random.normal(0, 6, (HEIGHT, WIDTH, 3))
    file = io.BytesIO()
    Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(file, 'JPEG', quality=90)
    return file.getvalue()


def plain(processor: Processor, photos: list[bytes]) -> float:
    """Images per second of the library's image processor."""
    started = time.perf_counter()
    for photo in photos:
        processor.image_processor(Image.open(io.BytesIO(photo)).convert('RGB'), return_tensors='pt')
    return len(photos) / (time.perf_counter() - started)


def pixels(make: Callable[[list[Image.Image]], Any], photos: list[bytes]) -> float:
    """Images per second of vlmtune's decoding and bytes or floats."""
    started = time.perf_counter()
    for photo in photos:
        make([load_image(ImageRef(data=photo))])
    return len(photos) / (time.perf_counter() - started)


def pillow(name: str, photos: list[bytes]) -> float:
    """Images per second of decoding and resizing alone."""
    started = time.perf_counter()
    for photo in photos:
        image = Image.open(io.BytesIO(photo))
        image.load()
        for size in RESIZED[name]:
            image.resize(size, Image.Resampling.BICUBIC)
    return len(photos) / (time.perf_counter() - started)


def loader(dataset: SupervisedDataset, workers: int) -> float:
    """Images per second of the loader; the start of its workers and what they made ahead are not counted."""
    batches: DataLoader = build_train_loader(dataset, seed=0, batch_size=BATCH, num_workers=workers)
    ahead = 2 * workers + 1  # batches
    images, started = 0, time.perf_counter()
    for index, batch in enumerate(batches):
        if index == ahead:
            images, started = 0, time.perf_counter()
        images += len(batch['input_ids'])
    return (images - (len(batch['input_ids']) if len(batches) > ahead else 0)) / (time.perf_counter() - started)


def build_dataset(name: str, folder: Path, photos: int, settings: dict[str, Any]) -> SupervisedDataset:
    """A data set of one question and answer about each photo, for a tiny model with real image settings."""
    tile = dict(vision_config=dict(image_size=[448, 448])) if name == 'internvl' else {}
    model = write_tiny_model(name, folder / name, **tile)
    template = 'vicuna' if name == 'llava' else None
    turns = [{'from': 'human', 'value': '<image>\nWhat is it?'}, {'from': 'gpt', 'value': 'Shapes.'}]
    return SupervisedDataset(
        [{'image': f'{index}.jpg', 'conversations': turns} for index in range(photos)],
        processor=Processor(str(model), prompt_template=template, image_processor=settings),
        dataset_map_fn=llava_map_fn,
        template_map_fn=chat_template_map_fn,
        image_folder=str(folder),
        max_length=8192,
    )


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--images', type=int, default=64)
    parser.add_argument('--rounds', type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    photos = [draw_photo(seed) for seed in range(options.images)]
    size = statistics.mean(len(photo) for photo in photos) / 1024
    print(f'machine: {describe_machine()}; one torch thread per process; {options.rounds} rounds in turn, medians')
    print(f'{len(photos)} photographs drawn of light, shapes and grain, {WIDTH} x {HEIGHT}, JPEG of {size:.0f} KiB; ')
    print(f'batches of {BATCH}\n')
    print('| images per second | Pillow | library | bytes | floats | loader, 0 workers | 1 worker | 2 workers | gain |')
    print('|---|---|---|---|---|---|---|---|---|')
    with tempfile.TemporaryDirectory() as folder:
        for index, photo in enumerate(photos):
            Path(folder, f'{index}.jpg').write_bytes(photo)
        for name, (title, settings) in FAMILIES.items():
            dataset = build_dataset(name, Path(folder), len(photos), settings)
            contenders: list[Callable[[], float]] = [lambda n=name: pillow(n, photos)]
            contenders.append(lambda d=dataset: plain(d.processor, photos))
            contenders.append(lambda d=dataset: pixels(d.processor.image_bytes, photos))
            contenders.append(lambda d=dataset: pixels(d.processor.image_inputs, photos))
            contenders += [lambda d=dataset, w=workers: loader(d, w) for workers in (0, 1, 2)]
            rounds = [[contender() for contender in contenders] for _ in range(options.rounds)]
            speeds = [statistics.median(column) for column in zip(*rounds, strict=True)]
            gain = ', '.join(
                f'{what} {speeds[i] / speeds[1]:.2f} x library' for i, what in ((2, 'bytes'), (4, 'loader'))
            )
            print(f'| {title} | {" | ".join(f"{speed:.1f}" for speed in speeds)} | {gain} |', flush=True)


if __name__ == '__main__':
    main()
