# vlmtune train qwen2_5_0_5b_pretrain_text  (one GPU with 24 GB)
# Continued pretraining on plain text ({"text": "..."} a line): every token is learned, no chat template.
from mmengine.config import read_base

with read_base():
    from vlmtune.presets.default_runtime import *

from mmengine.optim import CosineAnnealingLR, LinearLR
from torch.optim import AdamW

from vlmtune.data import Processor, SupervisedDataset, load_rows, plain_text_map_fn, text_map_fn
from vlmtune.engine import DatasetInfoHook, EvaluateChatHook, TrainLoop
from vlmtune.models import SupervisedFinetune

#######################################################################
#                          PART 1  Settings                           #
#######################################################################
# Model
pretrained_model_name_or_path = 'Qwen/Qwen2.5-0.5B'
prompt_template = None  # only the sample answers use one

# Data
data_root = 'data/corpus'
data_path = data_root + '/train.jsonl'
max_length = 8192  # tokens
pack_to_max_length = True

# Tuning
tune = dict(llm='full')
quantization = None
dtype = 'bfloat16'
gradient_checkpointing = True
attn_implementation = 'sdpa'

# Optimisation
batch_size = 1  # packs per device
accumulative_counts = 32
dataloader_num_workers = 2
max_steps = 5000
optim_type = AdamW
lr = 3e-5
betas = (0.9, 0.95)
weight_decay = 0.1
max_norm = 1.0
warmup_ratio = 0.01
seed = 42

# Saving and looking, counted in optimizer steps
save_steps = 1000
save_total_limit = 2
evaluation_freq = 500
evaluation_inputs = ['What is the subject of this corpus?']
SYSTEM = None

#######################################################################
#                      PART 2  Model & processor                      #
#######################################################################
processor = dict(
    type=Processor, pretrained_model_name_or_path=pretrained_model_name_or_path, prompt_template=prompt_template
)
model = dict(
    type=SupervisedFinetune,
    pretrained_model_name_or_path=pretrained_model_name_or_path,
    tune=tune,
    quantization=quantization,
    dtype=dtype,
    gradient_checkpointing=gradient_checkpointing,
    attn_implementation=attn_implementation,
)

#######################################################################
#                    PART 3  Dataset & dataloader                     #
#######################################################################
train_dataset = dict(
    type=SupervisedDataset,
    rows=dict(type=load_rows, path=data_path),
    dataset_map_fn=dict(type=text_map_fn),
    template_map_fn=dict(type=plain_text_map_fn),
    max_length=max_length,
)
train_dataloader = dict(
    dataset=train_dataset,
    batch_size=batch_size,
    num_workers=dataloader_num_workers,
    pack_to_max_length=pack_to_max_length,
)

#######################################################################
#                    PART 4  Scheduler & optimizer                    #
#######################################################################
optim_wrapper = dict(
    optimizer=dict(type=optim_type, lr=lr, betas=betas, weight_decay=weight_decay),
    clip_grad=dict(max_norm=max_norm),
)
warmup_steps = int(warmup_ratio * max_steps)
param_scheduler = [
    dict(type=LinearLR, start_factor=1e-5, by_epoch=False, begin=0, end=warmup_steps),
    dict(type=CosineAnnealingLR, eta_min=0.0, by_epoch=False, begin=warmup_steps, end=max_steps),
]
train_cfg = dict(type=TrainLoop, max_steps=max_steps, accumulative_counts=accumulative_counts)

#######################################################################
#                           PART 5  Runtime                           #
#######################################################################
default_hooks.checkpoint.interval = save_steps
default_hooks.checkpoint.max_keep_ckpts = save_total_limit
questions = dict(inputs=evaluation_inputs, system=SYSTEM)
custom_hooks = [dict(type=DatasetInfoHook), dict(type=EvaluateChatHook, every_n_iters=evaluation_freq, **questions)]
randomness = dict(seed=seed)
