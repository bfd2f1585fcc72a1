# vlmtune train qwen2_5_vl_7b_qlora_boxes  (one GPU with 24 GB)
# Finding things: <bbox> marks in the answers become boxes as the model knows them. ShareGPT rows with `objects`.
from mmengine.config import read_base

with read_base():
    from vlmtune.presets.default_runtime import *

from mmengine.optim import CosineAnnealingLR, LinearLR
from torch.optim import AdamW

from vlmtune.data import Processor, SupervisedDataset, chat_template_map_fn, load_rows, sharegpt_map_fn
from vlmtune.engine import DatasetInfoHook, EvaluateChatHook, TrainLoop, ValLoop
from vlmtune.evaluation import box_iou
from vlmtune.models import SupervisedFinetune

#######################################################################
#                          PART 1  Settings                           #
#######################################################################
# Model
pretrained_model_name_or_path = 'Qwen/Qwen2.5-VL-7B-Instruct'

# Data
data_root = 'data/boxes'
data_path = data_root + '/train.json'
val_data_path = data_root + '/val.json'  # held-out rows; None: no validation
image_folder = data_root + '/images'
max_length = 6144  # tokens, image tokens included
pack_to_max_length = True
max_pixels = 1600 * 28 * 28  # boxes are scaled with the image

# Tuning
tune = dict(vision_encoder='frozen', projector='lora', llm='lora')
lora_r = 64
lora_alpha = 64
lora_dropout = 0.05
quantization = 'nf4'
dtype = 'bfloat16'
gradient_checkpointing = True
attn_implementation = 'sdpa'

# Optimisation
batch_size = 1  # packs per device
accumulative_counts = 16
dataloader_num_workers = 4
max_steps = 2000
optim_type = AdamW
lr = 1e-4
betas = (0.9, 0.999)
weight_decay = 0.0
max_norm = 1.0
warmup_ratio = 0.05
seed = 42

# Saving and looking, counted in optimizer steps
save_steps = 250
save_total_limit = 2
evaluation_freq = 250
evaluation_inputs = ['Find every bird.', 'Where is the traffic light?']
evaluation_images = [image_folder + '/birds.jpg', image_folder + '/crossing.jpg']
SYSTEM = 'Answer with a JSON list of {"bbox_2d": [x1, y1, x2, y2], "label": "..."}.'
val_interval = 250  # and behind the last step
val_batch_size = 4  # questions answered together

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
    dataset_map_fn=dict(type=sharegpt_map_fn, boxes='pixel'),  # what the rows count; or 'unit', 'thousand'
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
val_evaluator = dict(metrics=[dict(type=box_iou)], generation=dict(max_new_tokens=256))
val_cfg = dict(type=ValLoop, interval=val_interval)

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
default_hooks.checkpoint.save_best = 'val/box_iou' if val_data_path else None
questions = dict(inputs=evaluation_inputs, images=evaluation_images, system=SYSTEM)
custom_hooks = [dict(type=DatasetInfoHook), dict(type=EvaluateChatHook, every_n_iters=evaluation_freq, **questions)]
randomness = dict(seed=seed)
