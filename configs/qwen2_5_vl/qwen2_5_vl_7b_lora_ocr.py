# vlmtune train qwen2_5_vl_7b_lora_ocr  (one GPU with 48 GB)
# Pages at 144 dpi to Markdown, and where on the page every figure is: OpenAI messages with <bbox> marks and `objects`.
from mmengine.config import read_base

with read_base():
    from vlmtune.presets.default_runtime import *

from mmengine.optim import CosineAnnealingLR, LinearLR
from torch.optim import AdamW

from vlmtune.data import Processor, SupervisedDataset, chat_template_map_fn, load_rows, openai_map_fn
from vlmtune.engine import DatasetInfoHook, EvaluateChatHook, TrainLoop, ValLoop
from vlmtune.evaluation import cer
from vlmtune.models import SupervisedFinetune

#######################################################################
#                          PART 1  Settings                           #
#######################################################################
# Model
pretrained_model_name_or_path = 'Qwen/Qwen2.5-VL-7B-Instruct'

# Data
data_root = 'data/pages'
data_path = data_root + '/train.jsonl'
val_data_path = data_root + '/val.jsonl'  # held-out rows; None: no validation
image_folder = data_root + '/images'
max_length = 8192  # tokens, image tokens included
pack_to_max_length = True
max_pixels = 2600 * 28 * 28  # 2600 image tokens: A4 and US Letter at 144 dpi stay as they are; boxes follow it

# Tuning
tune = dict(vision_encoder='frozen', projector='lora', llm='lora')
lora_r = 32
lora_alpha = 64
lora_dropout = 0.05
quantization = None
dtype = 'bfloat16'
gradient_checkpointing = True
attn_implementation = 'sdpa'

# Optimisation
batch_size = 1  # packs per device
accumulative_counts = 8
dataloader_num_workers = 4
max_epochs = 3
optim_type = AdamW
lr = 1e-4
betas = (0.9, 0.999)
weight_decay = 0.01
max_norm = 1.0
warmup_ratio = 0.03
seed = 42

# Saving and looking, counted in optimizer steps
save_steps = 200
save_total_limit = 2
evaluation_freq = 200
evaluation_inputs = ['Transcribe this page as Markdown.', 'Where are the figures of this page?']
evaluation_images = [image_folder + '/page_0001.png', image_folder + '/page_0002.png']
SYSTEM = None
val_interval = 200  # and behind the last step
val_batch_size = 2  # questions answered together

#######################################################################
#                      PART 2  Model & processor                      #
#######################################################################
processor = dict(
    type=Processor,
    pretrained_model_name_or_path=pretrained_model_name_or_path,
    image_processor=dict(max_pixels=max_pixels),
)
model = dict(
    type=SupervisedFinetune,
    pretrained_model_name_or_path=pretrained_model_name_or_path,
    tune=tune,
    lora=dict(r=lora_r, alpha=lora_alpha, dropout=lora_dropout),
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
    dataset_map_fn=dict(type=openai_map_fn, boxes='pixel'),
    template_map_fn=dict(type=chat_template_map_fn),
    image_folder=image_folder,
    max_length=max_length,
)
train_dataloader = dict(
    dataset=train_dataset,
    batch_size=batch_size,
    num_workers=dataloader_num_workers,
    pack_to_max_length=pack_to_max_length,
)
val_dataset = dict(train_dataset, rows=dict(type=load_rows, path=val_data_path))
val_dataloader = dict(dataset=val_dataset, batch_size=val_batch_size) if val_data_path else None
val_evaluator = dict(metrics=[dict(type=cer)], generation=dict(max_new_tokens=4096))
val_cfg = dict(type=ValLoop, interval=val_interval)

#######################################################################
#                    PART 4  Scheduler & optimizer                    #
#######################################################################
optim_wrapper = dict(
    optimizer=dict(type=optim_type, lr=lr, betas=betas, weight_decay=weight_decay),
    clip_grad=dict(max_norm=max_norm),
)
warmup_epochs = warmup_ratio * max_epochs
param_scheduler = [
    dict(type=LinearLR, start_factor=1e-5, begin=0, end=warmup_epochs, convert_to_iter_based=True),
    dict(type=CosineAnnealingLR, eta_min=0.0, begin=warmup_epochs, end=max_epochs, convert_to_iter_based=True),
]
train_cfg = dict(type=TrainLoop, max_epochs=max_epochs, accumulative_counts=accumulative_counts)

#######################################################################
#                           PART 5  Runtime                           #
#######################################################################
default_hooks.checkpoint.interval = save_steps
default_hooks.checkpoint.max_keep_ckpts = save_total_limit
default_hooks.checkpoint.save_best = 'val/cer' if val_data_path else None
questions = dict(inputs=evaluation_inputs, images=evaluation_images, system=SYSTEM)
custom_hooks = [dict(type=DatasetInfoHook), dict(type=EvaluateChatHook, every_n_iters=evaluation_freq, **questions)]
randomness = dict(seed=seed)
