# vlmtune train qwen2_5_vl_3b_full_forms --nproc 4 --deepspeed zero2  (4 GPUs with 80 GB)
# Forms and invoices to JSON: tens of thousands of OpenAI messages, everything behind the vision encoder learns.
from mmengine.config import read_base

with read_base():
    from vlmtune.presets.default_runtime import *

from mmengine.optim import CosineAnnealingLR, LinearLR
from torch.optim import AdamW

from vlmtune.data import Processor, SupervisedDataset, chat_template_map_fn, load_rows, openai_map_fn
from vlmtune.engine import DatasetInfoHook, EvaluateChatHook, TrainLoop
from vlmtune.models import SupervisedFinetune

#######################################################################
#                          PART 1  Settings                           #
#######################################################################
# Model
pretrained_model_name_or_path = 'Qwen/Qwen2.5-VL-3B-Instruct'

# Data
data_root = 'data/invoices'
data_path = data_root + '/train.jsonl'
image_folder = data_root + '/images'
max_length = 8192  # tokens, image tokens included
pack_to_max_length = True
max_pixels = 2048 * 28 * 28  # 2048 image tokens

# Tuning
tune = dict(vision_encoder='frozen', projector=dict(mode='full', lr=2e-5), llm='full')
quantization = None
dtype = 'bfloat16'
gradient_checkpointing = True
attn_implementation = 'sdpa'

# Optimisation
batch_size = 1  # packs per device
accumulative_counts = 4
dataloader_num_workers = 8
max_epochs = 2
optim_type = AdamW
lr = 1e-5
betas = (0.9, 0.999)
weight_decay = 0.01
max_norm = 1.0
warmup_ratio = 0.03
seed = 42

# Saving and looking, counted in optimizer steps
save_steps = 500
save_total_limit = 1
evaluation_freq = 250
evaluation_inputs = ['Read this invoice.', 'What is the total?']
evaluation_images = [image_folder + '/invoice_0001.png', image_folder + '/invoice_0001.png']
SYSTEM = 'Answer with JSON only.'

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
    dataset_map_fn=dict(type=openai_map_fn),
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
questions = dict(inputs=evaluation_inputs, images=evaluation_images, system=SYSTEM)
custom_hooks = [dict(type=DatasetInfoHook), dict(type=EvaluateChatHook, every_n_iters=evaluation_freq, **questions)]
randomness = dict(seed=seed)
