"""What a cache of the vision encoder's features saves in LLaVA's first stage, where the projector alone is trained.

A LLaVA with random weights: a CLIP tower of the size of ViT-B/14 at 224 pixels, a Llama of 4 layers and width 512. Rows
of one photograph, a question and an answer; two epochs of steps of 4 rows, from files to updated weights, without and
with the cache. Building it is timed apart; it is done once for all runs on the same images.

python benchmarks/vision_cache.py [--images 32]
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from input_pipeline import draw_photo
from machine import describe_machine

from vlmtune.data import Processor, SupervisedDataset, build_train_loader, chat_template_map_fn, llava_map_fn
from vlmtune.engine.vision_cache import use_vision_cache
from vlmtune.models import SupervisedFinetune
from vlmtune.structures import IGNORE_INDEX
from vlmtune.testing import write_tiny_model

SIDE = 224  # pixels
TOWER = dict(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    projection_dim=512,
    image_size=SIDE,
    patch_size=14,
)
LLM = dict(
    hidden_size=512,
    intermediate_size=1376,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=64,
)
STAGE = dict(vision_encoder='frozen', projector='full', llm='frozen')


def build(model: Path, folder: Path, images: int) -> tuple[SupervisedFinetune, SupervisedDataset]:
    """The model in LLaVA's first stage, and its data."""
    size = dict(size={'shortest_edge': SIDE}, crop_size={'height': SIDE, 'width': SIDE})
    turns = [{'from': 'human', 'value': '<image>\nWhat is it?'}, {'from': 'gpt', 'value': 'Soft light and shapes.'}]
    dataset = SupervisedDataset(
        [{'image': f'{index}.jpg', 'conversations': turns} for index in range(images)],
        processor=Processor(str(model), prompt_template='vicuna', image_processor=size),
        dataset_map_fn=llava_map_fn,
        template_map_fn=chat_template_map_fn,
        image_folder=str(folder),
    )
    torch.manual_seed(0)
    return SupervisedFinetune(str(model), tune=STAGE, dtype='float32'), dataset


def epochs(model: SupervisedFinetune, dataset: SupervisedDataset) -> tuple[list[float], list[float]]:
    """Seconds of two epochs, and the loss of every step."""
    loader = build_train_loader(dataset, seed=0, batch_size=4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    seconds, losses = [], []
    for _ in range(2):
        started = time.perf_counter()
        for batch in loader:
            loss = model(**batch) / int((batch['labels'] != IGNORE_INDEX).sum())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        seconds.append(time.perf_counter() - started)
    return seconds, losses


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--images', type=int, default=32)
    images = parser.parse_args().images
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for index in range(images):
            (folder / f'{index}.jpg').write_bytes(draw_photo(index))
        source = write_tiny_model('llava', folder / 'model', vision_config=TOWER, text_config=LLM)
        model, dataset = build(source, folder, images)
        without, expected = epochs(model, dataset)
        model, dataset = build(source, folder, images)
        started = time.perf_counter()
        use_vision_cache(model, dataset, folder=folder / 'cache')
        building = time.perf_counter() - started
        started = time.perf_counter()
        use_vision_cache(model, dataset, folder=folder / 'cache')
        opening = time.perf_counter() - started
        cached, found = epochs(model, dataset)
        size = sum(path.stat().st_size for path in (folder / 'cache').rglob('*.bin'))
    difference = max(abs(a - b) / b for a, b in zip(found, expected, strict=True))
    print(f'machine: {describe_machine()}; {torch.get_num_threads()} torch threads; float32\n')
    print(f'{images} images, {size / images / 2**20:.2f} MiB of features each; building the cache {building:.1f} s, ')
    print(f'opening it {opening:.1f} s; losses of {len(found)} steps differ by at most {difference:.0e}\n')
    print('| | first epoch | second epoch |\n|---|---|---|')
    for title, seconds in (('pixels', without), ('cache', cached)):
        print(f'| {title} | {seconds[0]:.1f} s | {seconds[1]:.1f} s |')


if __name__ == '__main__':
    main()
