"""TRL's SFTTrainer on the workload: prompt/completion rows, so that it learns the answers only.

python benchmarks/contenders/trl_run.py WORKLOAD BATCH random|group_by_length
"""

import sys
import tempfile
import time
from pathlib import Path

import torch
from common import LEARNING_RATE, MAX_NORM, THREADS, answer, resident_mib
from datasets import Dataset, Image
from transformers import (
    AutoTokenizer,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer
from workload import read_rows


class ImagesOnlyProcessor(Qwen2_5_VLProcessor):
    """Its base insists on a video processor, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name, argument):
        """Accept that there is none."""
        if argument_name == 'video_processor' and argument is None:
            return type(None)
        return super().check_argument_for_proper_class(argument_name, argument)


class StepClock(TrainerCallback):
    """Seconds between the moment a step has its inputs and its end."""

    def __init__(self):
        self.seconds, self.steps = 0.0, 0

    def on_step_begin(self, *_, **__):
        """The inputs are there."""
        self.started = time.perf_counter()

    def on_step_end(self, *_, **__):
        """The weights are updated."""
        self.seconds += time.perf_counter() - self.started
        self.steps += 1


def build_rows(directory: Path, processor: ImagesOnlyProcessor) -> Dataset:
    """Rows with the file of the picture, which is decoded when the row is read, and lengths for grouping."""
    rows = read_rows(directory)
    user, assistant = [], []
    for _, question, reply in rows:
        user.append([{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': question}]}])
        assistant.append([{'role': 'assistant', 'content': [{'type': 'text', 'text': reply}]}])
    columns = dict(
        images=[[str(path)] for path, _, _ in rows],
        prompt=user,
        completion=assistant,
        length=[len(processor.tokenizer(reply)['input_ids']) for _, _, reply in rows],
    )
    return Dataset.from_dict(columns).cast_column('images', [Image()])


def main() -> None:
    """Train one epoch and print the figures."""
    directory, batch, order = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(THREADS)
    baseline = resident_mib()
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory / 'model', dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory / 'model')
    image_processor = Qwen2VLImageProcessorPil.from_pretrained(directory / 'model')
    processor = ImagesOnlyProcessor(image_processor, tokenizer, None, chat_template=tokenizer.chat_template)
    with tempfile.TemporaryDirectory() as scratch:
        settings = SFTConfig(
            output_dir=scratch, per_device_train_batch_size=batch, num_train_epochs=1, learning_rate=LEARNING_RATE,
            lr_scheduler_type='constant', max_grad_norm=MAX_NORM, weight_decay=0.0, logging_steps=1000, report_to=[],
            save_strategy='no', gradient_checkpointing=False, bf16=False, use_cpu=True, max_length=None,
            dataloader_num_workers=0, disable_tqdm=True, train_sampling_strategy=order, length_column_name='length',
            remove_unused_columns=False,  # or the lengths are gone when the sampler asks for them
        )  # fmt: skip
        started = time.perf_counter()
        rows = build_rows(directory, processor)
        clock = StepClock()
        trainer = SFTTrainer(
            model=model, args=settings, train_dataset=rows, processing_class=processor, callbacks=[clock]
        )
        trainer.train()
        total = time.perf_counter() - started
    answer(baseline_mib=baseline, step_seconds=clock.seconds, total_seconds=total, steps=clock.steps, samples=len(rows))


if __name__ == '__main__':
    main()
