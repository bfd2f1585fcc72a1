# vlmtune train qwen2_vl_2b_full_captions  (one GPU with 80 GB)
# Detailed captions in a house style: every part learns, the vision encoder slowly. ShareGPT rows.
from mmengine.config import read_base

with read_base():
    from vlmtune.presets.default_runtime import *

from mmengine.optim import CosineAnnealingLR, LinearLR
from torch.optim import AdamW

from vlmtune.data import Processor, SupervisedDataset, chat_template_map_fn, load_rows, sharegpt_map_fn
from vlmtune.engine import DatasetInfoHook, EvaluateChatHook, TrainLoop, ValLoop
from vlmtune.evaluation import bleu, rouge_l
from vlmtune.models import SupervisedFinetune

#######################################################################
#                          PART 1  Settings                           #
#######################################################################
# Model
pretrained_model_name_or_path = 'Qwen/Qwen2-VL-2B-Instruct'

# Data
data_root = 'data/captions'
data_path = data_root + '/captions.json'
val_data_path = data_root + '/val.json'  # held-out rows; None: no validation
image_folder = data_root + '/images'
max_length = 6144  # tokens, image tokens included
pack_to_max_length = True
max_pixels = 1024 * 28 * 28  # 1024 image tokens

# Tuning
tune = dict(vision_encoder=dict(mode='full', lr=2e-6), projector='full', llm='full')
quantization = None
dtype = 'bfloat16'
gradient_checkpointing = True
attn_implementation = 'sdpa'

# Optimisation
batch_size = 1  # packs per device
accumulative_counts = 16
dataloader_num_workers = 4
max_epochs = 2
optim_type = AdamW
lr = 1e-5
betas = (0.9, 0.95)
weight_decay = 0.1
max_norm = 1.0
warmup_ratio = 0.03
seed = 42

# Saving and looking, counted in optimizer steps
save_steps = 500
save_total_limit = 1
evaluation_freq = 250
evaluation_inputs = ['Write a caption of one sentence.', 'Write a caption of three sentences.']
evaluation_images = [image_folder + '/0001.jpg', image_folder + '/0001.jpg']
SYSTEM = None
val_interval = 500  # and behind the last step
val_batch_size = 8  # questions answered together

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
    dataset_map_fn=dict(type=sharegpt_map_fn),
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
val_evaluator = dict(metrics=[dict(type=rouge_l), dict(type=bleu)], generation=dict(max_new_tokens=128))
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
default_hooks.checkpoint.save_best = 'val/rouge_l' if val_data_path else None
questions = dict(inputs=evaluation_inputs, images=evaluation_images, system=SYSTEM)
custom_hooks = [dict(type=DatasetInfoHook), dict(type=EvaluateChatHook, every_n_iters=evaluation_freq, **questions)]
randomness = dict(seed=seed)
