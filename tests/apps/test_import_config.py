"""An XTuner config becomes one of ours that loads: same settings, counted as they are counted here."""

import logging

import pytest

from vlmtune.cli import main
from vlmtune.config import load_config
from vlmtune.data import MixedDataset, SupervisedDataset

LLAVA = """
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, CLIPVisionModel
from xtuner.dataset import LLaVADataset
from xtuner.dataset.map_fns import llava_map_fn, template_map_fn_factory
from xtuner.model import LLaVAModel
from xtuner.utils import PROMPT_TEMPLATE

llm_name_or_path = 'internlm/internlm2-chat-7b'
visual_encoder_name_or_path = 'openai/clip-vit-large-patch14-336'
pretrained_pth = './work_dirs/pretrain/iter_9742.pth'
data_root = './data/flowers/'
data_path = data_root + 'train.json'
image_folder = f'{data_root}images'
prompt_template = PROMPT_TEMPLATE.internlm2_chat
max_length = int(2048 - (336 / 14)**2)
batch_size = 4
accumulative_counts = 8
dataloader_num_workers = 2
max_epochs = 2
lr = 3e-5
betas = (0.9, 0.95)
weight_decay = 0
max_norm = 1
warmup_ratio = 0.05
save_steps = 800
save_total_limit = 3
evaluation_freq = 80
SYSTEM = ''
evaluation_images = 'rose.png'
evaluation_inputs = ['What flower is it?', 'Which colour?']
model = dict(
    type=LLaVAModel, freeze_llm=True, freeze_visual_encoder=True, pretrained_pth=pretrained_pth,
    llm=dict(type=AutoModelForCausalLM.from_pretrained, pretrained_model_name_or_path=llm_name_or_path,
             quantization_config=dict(type=BitsAndBytesConfig, load_in_4bit=True, bnb_4bit_quant_type='nf4')),
    llm_lora=dict(type=LoraConfig, r=64, lora_alpha=32, lora_dropout=0.1),
    visual_encoder_lora=dict(type=LoraConfig, r=16, lora_alpha=8))
dataset = dict(type=LLaVADataset, data_path=data_path, image_folder=image_folder, dataset_map_fn=llava_map_fn,
               template_map_fn=dict(type=template_map_fn_factory, template=prompt_template), max_length=max_length,
               pad_image_to_square=True)
train_dataloader = dict(batch_size=batch_size, dataset=dataset)
optim_wrapper = dict(accumulative_counts=accumulative_counts, dtype='bfloat16')
"""
MIXED = LLAVA.replace(
    'dataset=dataset)',
    """dataset=dict(type=ConcatDataset, datasets=[
    dict(dataset_of=1, type=LLaVADataset, data_path=data_root + 'zh.jsonl', image_folder=None,
         dataset_map_fn=llava_map_fn, pad_image_to_square=True),
    dict(type=RegionDataset, data_path="it's image_folder=image_folder.json", image_folder=image_folder,
         dataset_map_fn=llava_map_fn, pad_image_to_square=True, max_dataset_length=700),
    dataset]))""",
)
INTERNVL = """
from xtuner.model import InternVL_V1_5
path = 'OpenGVLab/InternVL2-8B'
data_path = './rows.json'
image_folder = './images'
max_length = 4096
batch_size = 2
accumulative_counts = 1
lr = 1e-6
save_steps = 100
save_total_limit = 1
model = dict(type=InternVL_V1_5, model_path=path, freeze_llm=False, freeze_visual_encoder=True)
optim_wrapper = dict(dtype='float16')
"""


@pytest.fixture
def imported(tmp_path):
    def go(text, *, name='theirs.py'):
        (tmp_path / name).write_text(text, encoding='utf-8')
        return main(['import-config', str(tmp_path / name), str(tmp_path / 'ours.py')]), tmp_path / 'ours.py'

    return go


def test_a_llava_config_keeps_its_settings(imported):
    code, path = imported(LLAVA)
    cfg = load_config(path)
    assert code == 0
    parts = cfg.model.pretrained_model_name_or_path
    assert parts.llm_name_or_path == 'internlm/internlm2-chat-7b'
    assert parts.pretrained_pth == './work_dirs/pretrain/iter_9742.pth'
    assert parts.pad_image_to_square is True
    assert cfg.processor.prompt_template == 'internlm2_chat'
    assert cfg.train_dataloader.dataset.rows.path == './data/flowers/train.json'
    assert cfg.train_dataloader.dataset.image_folder == './data/flowers/images'
    assert cfg.model.tune == dict(vision_encoder=dict(mode='lora', r=16, alpha=8), projector='full', llm='lora')
    assert cfg.model.lora == dict(r=64, alpha=32, dropout=0.1)
    assert (cfg.model.quantization, cfg.model.dtype) == ('nf4', 'bfloat16')
    assert cfg.train_dataloader.batch_size == 4
    assert cfg.train_dataloader.pack_to_max_length is False
    assert cfg.optim_wrapper.optimizer.lr == 3e-5
    assert list(cfg.optim_wrapper.optimizer.betas) == [0.9, 0.95]
    assert cfg.custom_hooks[1].images == ['rose.png', 'rose.png']


def test_what_is_counted_otherwise_is_converted_and_told(imported, caplog):
    with caplog.at_level(logging.WARNING, 'vlmtune'):
        _, path = imported(LLAVA)
    cfg = load_config(path)
    assert cfg.train_dataloader.dataset.max_length == 1472 + 576
    assert cfg.default_hooks.checkpoint.interval == 100
    assert cfg.custom_hooks[1].every_n_iters == 10
    assert 'divided by 8' in caplog.text
    assert '576 tokens of an image' in caplog.text


def test_several_data_sets_become_a_mixture(imported, caplog):
    with caplog.at_level(logging.WARNING, 'vlmtune'):
        _, path = imported(MIXED)
    cfg = load_config(path)
    mixture = cfg.train_dataloader.dataset
    assert mixture.type is MixedDataset
    assert [one.type for one in mixture.datasets] == [SupervisedDataset] * 3
    assert [(one.rows.path, one.image_folder) for one in mixture.datasets] == [
        ('./data/flowers/zh.jsonl', None),
        ("it's image_folder=image_folder.json", './data/flowers/images'),
        ('./data/flowers/train.json', './data/flowers/images'),
    ]
    assert {one.max_length for one in mixture.datasets} == {1472 + 576}
    assert 'repeats' not in mixture
    assert 'data set 1 is a RegionDataset, which makes rows of its own' in caplog.text
    assert 'data set 1: max_dataset_length=700 is not taken' in caplog.text


def test_data_sets_of_an_internvl_config_and_how_often_each_is_seen(imported):
    data = "dict(data_paths=['a.json', 'b.json'], image_folders=['a', 'b'], repeat_times=[1, 2])"
    _, path = imported(INTERNVL + f'train_dataloader = dict(dataset={data})')
    mixture = load_config(path).train_dataloader.dataset
    assert [(one.rows.path, one.image_folder) for one in mixture.datasets] == [('a.json', 'a'), ('b.json', 'b')]
    assert list(mixture.repeats) == [1, 2]
    held_out = load_config(path, dict(val_data_path='c.json')).val_dataloader.dataset
    assert (held_out.rows.path, held_out.image_folder) == ('c.json', 'a')


def test_an_internvl_config_trained_in_full(imported):
    _, path = imported(INTERNVL)
    cfg = load_config(path)
    assert cfg.model.pretrained_model_name_or_path == 'OpenGVLab/InternVL2-8B'
    assert cfg.model.tune == dict(vision_encoder='frozen', projector='full', llm='full')
    assert cfg.model.dtype == 'float16'


def test_a_config_is_never_run(imported, tmp_path):
    code, _ = imported(INTERNVL + f"open({str(tmp_path / 'ran')!r}, 'w')\nlr = __import__('os').getpid()\n")
    assert code == 1
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('name', ['lr', 'betas', 'data_path', 'evaluation_inputs', 'path'])
def test_nothing_of_a_config_becomes_code_of_ours(imported, tmp_path, name):
    ran = tmp_path / 'ran'
    text = f'{name} = {{"b=1)\\nopen({str(ran)!r}, \'w\')\\nlr = dict(b": 1}}'
    code, path = imported(INTERNVL.replace('model = dict(', text + '\nmodel = dict('))
    assert not ran.exists()
    assert not path.exists() or code == 0


@pytest.mark.parametrize(
    ('text', 'told'),
    [
        (INTERNVL + 'accumulative_counts = args.n', 'accumulative_counts is args.n; expected a positive integer'),
        (INTERNVL + 'accumulative_counts = 0', 'accumulative_counts is 0; expected a positive integer'),
        (INTERNVL + 'lr = dict(a=1)', 'lr: expected a number'),
        ('x = 1', 'model.type is None; expected LLaVAModel or InternVL_V1_5'),
        ('model = dict(type=SupervisedFinetune)', 'model.type is SupervisedFinetune'),
        ('model = dict(', 'is no Python file'),
        (INTERNVL.replace("'./rows.json'", 'find_rows()'), 'data_path is find_rows(); expected a plain value'),
        (LLAVA.replace('dataset=dataset', 'dataset=[dataset, dataset]'), '.py: train_dataloader.dataset: expected one'),
        (
            LLAVA.replace('dict(batch_size=batch_size, dataset=dataset)', 'loader()'),
            'train_dataloader.dataset: expected',
        ),
        (
            MIXED.replace('image_to_square=True, max', 'image_to_square=False, max'),
            'pad_image_to_square is [True, False,',
        ),
        (MIXED.replace("data_root + 'zh.jsonl'", 'find()'), 'data_path is find(); expected a plain value'),
        (INTERNVL + "data_path = ['a.json', 'b.json']", '[2, 1, 2] data_paths, image_folders and repeat_times'),
    ],
)
def test_what_cannot_be_taken_is_one_line(imported, capsys, text, told):
    code, path = imported(text)
    line = capsys.readouterr().err.strip()
    assert code == 1
    assert told in line
    assert '\n' not in line
    assert not path.exists()


def test_nothing_is_overwritten(imported, tmp_path, capsys):
    (tmp_path / 'ours.py').write_text('precious')
    assert imported(LLAVA)[0] == 1
    assert (tmp_path / 'ours.py').read_text() == 'precious'
    assert 'expected the name of a new .py file' in capsys.readouterr().err


def test_a_file_that_is_not_there(tmp_path, capsys):
    assert main(['import-config', str(tmp_path / 'none.py'), str(tmp_path / 'ours.py')]) == 1
    assert capsys.readouterr().err.endswith(
        'none.py cannot be read: No such file or directory; expected an XTuner config\n'
    )
