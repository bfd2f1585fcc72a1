"""Rows on disk, pictures, and a data set over them whose plan is kept."""

import json

from PIL import Image

from vlmtune.data import SupervisedDataset, chat_template_map_fn, llava_map_fn, load_rows


def row(number, *, image=None, answer='A square.'):
    turns = [{'from': 'human', 'value': ('<image>\n' if image else '') + f'What is it, {number}?'}]
    turns.append({'from': 'gpt', 'value': answer})
    return {'conversations': turns} | ({} if image is None else {'image': image})


class World:
    """Rows on disk, images, and ``build(**changes)``: a data set over them, planned in this process."""

    def __init__(self, folder, processor):
        self.cache, self.images, self.rows = folder / 'plans', folder / 'images', folder / 'train.jsonl'
        self.processor = processor
        self.images.mkdir()
        for name, size in (('a.png', (60, 90)), ('b.png', (30, 30))):
            Image.new('RGB', size).save(self.images / name)
        self.write(row(0, image='a.png'), row(1, image='b.png'), row(2), row(3, image='a.png'))

    def write(self, *rows):
        self.rows.write_text(''.join(json.dumps(r) + '\n' for r in rows))

    def build(self, model='llava', **changes):
        settings = dict(
            rows=dict(type=load_rows, path=str(self.rows)),
            dataset_map_fn=dict(type=llava_map_fn),
            template_map_fn=dict(type=chat_template_map_fn),
            image_folder=str(self.images),
            max_length=64,
            cache_dir=str(self.cache),
            planning_workers=0,
        )
        if 'processor' not in changes:
            settings['processor'] = self.processor(model, prompt_template='vicuna' if model == 'llava' else None)
        return SupervisedDataset(**{**settings, **changes})
