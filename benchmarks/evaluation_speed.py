"""Answers per second: one by one, in batches as the file has them, and in batches of like length.

A tiny Qwen2.5-VL (that of mixed_lengths.py), pictures of 4 to 256 tokens, answers of 48 tokens each: an untrained model
never stops by itself. All contenders answer the same rows with the same weights, greedily.

python benchmarks/evaluation_speed.py [--rows 64] [--batch-size 16]
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import describe_machine

from vlmtune.data import Processor, SupervisedDataset, chat_template_map_fn, llava_map_fn, load_rows
from vlmtune.data.sample_loading import load_images
from vlmtune.evaluation import Questions, open_questions, predict
from vlmtune.evaluation.generation import answer_prompts, answering, prompt_inputs
from vlmtune.models import load_model

sys.path.insert(0, str(Path(__file__).parent / 'contenders'))
from workload import Kind, write_rows, write_workload

SIDES = (56, 112, 224, 448)
TOKENS = 48  # of an answer
NOTES = """
Every row is a run of its own over the same questions; images are read and resized in all of them. Processor seconds are
those of this process and hold also where the machine is busy with other things.
"""


class Timed(NamedTuple):
    """One contender."""

    name: str
    seconds: float
    cpu_seconds: float
    answers: list[str]


def in_file_order(model: Any, processor: Processor, questions: Questions, *, batch_size: int, **settings: Any) -> list:
    """Batches of rows that stand together in the file."""
    answers = []
    with answering(model):
        for start in range(0, len(questions), batch_size):
            batch = questions[start : start + batch_size]
            images = [load_images(question.prompt, root=question.root) for question in batch]
            inputs = prompt_inputs(processor, [question.prompt for question in batch], images=images)
            answers += [
                answer.text for answer in answer_prompts(model, processor, inputs, max_new_tokens=TOKENS, **settings)
            ]
    return answers


def timed(name: str, work: Callable[[], list[str]]) -> Timed:
    """Seconds of one contender."""
    wall, cpu = time.perf_counter(), time.process_time()
    answers = work()
    return Timed(name, time.perf_counter() - wall, time.process_time() - cpu, answers)


def contenders(folder: Path, *, rows: int, batch_size: int) -> list[Timed]:
    """Run all of them."""
    write_workload(folder, 'findings')
    write_rows(folder, Kind(heights=SIDES, widths=SIDES, mean=1.0, sigma=0.3, longest=9, rows=rows))
    processor = Processor(str(folder / 'model'))
    model, _ = load_model(str(folder / 'model'), dtype=torch.float32)
    dataset = dict(
        type=SupervisedDataset,
        rows=dict(type=load_rows, path=str(folder / 'rows.jsonl')),
        dataset_map_fn=dict(type=llava_map_fn),
        template_map_fn=dict(type=chat_template_map_fn),
        image_folder=str(folder / 'images'),
    )
    questions = open_questions(dataset, processor)

    def ours() -> list[str]:
        settings: dict[str, Any] = dict(batch_size=batch_size, generation=dict(max_new_tokens=TOKENS))
        found = predict(model, processor, questions, file=folder / 'predictions.jsonl', **settings)
        return [row['prediction'] for row in found]

    def plain(**settings: Any) -> list[str]:
        return in_file_order(model, processor, questions, **settings)

    plain(batch_size=rows)  # warm up
    return [
        timed('one by one, without a KV cache', lambda: plain(batch_size=1, use_cache=False)),
        timed('one by one', lambda: plain(batch_size=1)),
        timed(f'batches of {batch_size}, as the file has them', lambda: plain(batch_size=batch_size)),
        timed(f'`vlmtune test`: batches of {batch_size}, of like length', ours),
    ]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rows', type=int, default=64)
    parser.add_argument('--batch-size', type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = contenders(Path(folder), rows=options.rows, batch_size=options.batch_size)
    print(
        f'# Evaluation\n\nmachine: {describe_machine()}, 1 thread\n\n{options.rows} questions, {TOKENS} tokens each\n'
    )
    print('| | seconds | processor seconds | answers/s | times one by one | same answers |\n|---|---|---|---|---|---|')
    alone = found[1]
    for one in found:
        same = sum(a == b for a, b in zip(one.answers, alone.answers, strict=True))
        print(
            f'| {one.name} | {one.seconds:.1f} | {one.cpu_seconds:.1f} | {len(one.answers) / one.seconds:.2f} | '
            f'{alone.cpu_seconds / one.cpu_seconds:.1f} | {same} of {len(alone.answers)} |'
        )
    print(NOTES)


if __name__ == '__main__':
    main()
