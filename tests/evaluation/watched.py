"""Questions of a tiny data set, and a model that is watched while it answers them."""

import json

from vlmtune.data import SupervisedDataset, chat_template_map_fn, llava_map_fn, load_rows
from vlmtune.evaluation import open_questions

SHORT = dict(max_new_tokens=6)


def talk(question, answer, **extra):
    turns = [{'from': 'human', 'value': question}, {'from': 'gpt', 'value': answer}]
    return {'conversations': turns, **extra}


def ask(folder, processor, **options):
    dataset = dict(
        type=SupervisedDataset,
        rows=dict(type=load_rows, path=str(folder / 'rows.jsonl')),
        dataset_map_fn=dict(type=llava_map_fn),
        template_map_fn=dict(type=chat_template_map_fn),
        image_folder=str(folder),
        **options,
    )
    return open_questions(dataset, processor)


def answers(rows):
    """What does not depend on the clock."""
    return [{name: value for name, value in row.items() if name != 'seconds'} for row in rows]


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


class Watched:
    """A model that notes every batch that it is given, and does something before one of them."""

    def __init__(self, model, before=lambda number, inputs: None):
        self.model, self.before, self.batches, self.outputs = model, before, [], []

    def __getattr__(self, name):
        return getattr(self.model, name)

    def generate(self, **inputs):
        self.batches.append(inputs)
        self.before(len(self.batches), inputs)
        settings = {name: value for name, value in inputs.items() if name != 'synced_gpus'}
        self.outputs.append(self.model.generate(**settings))
        return self.outputs[-1]
