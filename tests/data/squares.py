"""Rows about the pictures of ``images``."""

import json


def row(*texts, image=None):
    turns = [{'from': ('human', 'gpt')[i % 2], 'value': text} for i, text in enumerate(texts)]
    return {'conversations': turns} | ({} if image is None else {'image': image})


GOOD = row('What is it?', 'A square.')
SEEN = row('<image>\nWhat is it?', 'A square.', image='0.png')
LONG = row('Hi', 'Hello', '<image>\nWhat is it?', 'A square.', '<image>Again?', 'no ' * 200, image=['0.png', '1.png'])
BAD = row('<image>\nWhat?', 'x', image='gone.png')


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
