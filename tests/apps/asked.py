"""A config of five questions about pictures, and what a trained model answers to them."""

import json

from vlmtune.evaluation import generate
from vlmtune.structures import Conversation, ImagePart, ImageRef, Message, TextPart

QUESTIONS = ['What is it?', 'Which colour is it, and why?', 'Where?', 'How large is it now?', 'Who?']
_CONFIG = """
from vlmtune.data import Processor, SupervisedDataset, chat_template_map_fn, llava_map_fn, load_rows
from vlmtune.models import SupervisedFinetune

pretrained_model_name_or_path = {base!r}
prompt_template = {template!r}
image_processor = None
quantization = {quantization!r}
processor = dict(type=Processor, pretrained_model_name_or_path=pretrained_model_name_or_path,
                 prompt_template=prompt_template, image_processor=image_processor)
model = dict(type=SupervisedFinetune, pretrained_model_name_or_path=pretrained_model_name_or_path,
             tune={tune!r}, lora=dict(r=4, alpha=16), quantization=quantization, dtype={dtype!r})
rows = dict(type=load_rows, path={rows!r})
{which}_dataloader = dict(
    dataset=dict(type=SupervisedDataset, rows=rows, dataset_map_fn=dict(type=llava_map_fn),
                 template_map_fn=dict(type=chat_template_map_fn), image_folder={folder!r}),
    batch_size=2)
{which}_evaluator = dict(metrics=['exact_match'], generation=dict(max_new_tokens=5))
"""


def write_config(work, run, *, which='test', quantization=None, dtype='float32', **tune):
    template = 'vicuna' if run.processor.family.model_type == 'llava' else None
    settings = dict(base=run.base, template=template, quantization=quantization, dtype=dtype, tune=tune, which=which)
    (work / 'mine.py').write_text(_CONFIG.format(**settings, rows=str(work / 'rows.jsonl'), folder=str(work)))
    return 'mine.py'


def told_by(run, work):
    """What the model of a run, still in memory, answers."""
    asked = []
    for i, question in enumerate(QUESTIONS):
        message = Message('user', (ImagePart(0), TextPart(question)))
        asked.append(Conversation((message,), (ImageRef(path=str(work / f'{i}.png')),)))
    return generate(run.model.model, run.processor, asked, autocast_dtype=run.model.dtype, max_new_tokens=5)


def predictions(folder):
    return [json.loads(line)['prediction'] for line in (folder / 'predictions.jsonl').read_text().splitlines()]
