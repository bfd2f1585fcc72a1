"""Exact match of a model's greedy answers to rows of questions about images.

python quickstart/evaluate.py MODEL quickstart/data/describe_held_out.jsonl [--limit 100] [--shuffle-images]
"""

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path

from vlmtune.data import Processor, llava_map_fn, load_rows
from vlmtune.evaluation import exact_match, generate
from vlmtune.models import load_model
from vlmtune.models.loading import parse_dtype
from vlmtune.structures import Conversation

IMAGES = Path(__file__).resolve().parent / 'data' / 'images'


def read_questions(path: str, *, limit: int | None) -> tuple[list[Conversation], list[str]]:
    """Conversations without their last answer, and that answer."""
    conversations = [llava_map_fn(row) for row in list(load_rows(path))[:limit]]
    questions = [replace(conversation, messages=conversation.messages[:-1]) for conversation in conversations]
    return questions, [conversation.messages[-1].text for conversation in conversations]


def shuffle_images(questions: list[Conversation]) -> list[Conversation]:
    """The same questions, each about another one's image: what a model that does not look still gets right."""
    images = [question.images for question in questions]
    random.Random(0).shuffle(images)
    return [replace(question, images=other) for question, other in zip(questions, images, strict=True)]


def accuracy(model_dir: str, path: str, *, limit: int | None = None, shuffled: bool = False) -> float:
    """Share of answers that equal their reference."""
    model, _ = load_model(model_dir, dtype=parse_dtype('float32'))
    questions, references = read_questions(path, limit=limit)
    if shuffled:
        questions = shuffle_images(questions)
    answers = generate(model, Processor(model_dir), questions, batch_size=64, image_root=IMAGES, max_new_tokens=24)
    return exact_match(answers, references)


def main() -> None:
    """Print one number as json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('model')
    parser.add_argument('rows')
    parser.add_argument('--limit', type=int)
    parser.add_argument('--shuffle-images', action='store_true')
    arguments = parser.parse_args()
    score = accuracy(arguments.model, arguments.rows, limit=arguments.limit, shuffled=arguments.shuffle_images)
    print(json.dumps(dict(model=arguments.model, rows=arguments.rows, exact_match=round(score, 4))))


if __name__ == '__main__':
    main()
