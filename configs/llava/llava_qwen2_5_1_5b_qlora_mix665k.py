# vlmtune train llava_qwen2_5_1_5b_qlora_mix665k  (one GPU with 24 GB)
# LLaVA from parts, second stage: instructions, LoRA on CLIP and on Qwen2.5-1.5B-Instruct in 4 bits.
from mmengine.config import read_base

with read_base():
    from vlmtune.presets.default_runtime import *

from mmengine.optim import CosineAnnealingLR, LinearLR
from torch.optim import AdamW

from vlmtune.data import Processor, SupervisedDataset, chat_template_map_fn, llava_map_fn, load_rows
from vlmtune.engine import DatasetInfoHook, EvaluateChatHook, TrainLoop
from vlmtune.models import SupervisedFinetune

#######################################################################
#                          PART 1  Settings                           #
#######################################################################
# Model
llm_name_or_path = 'Qwen/Qwen2.5-1.5B-Instruct'
visual_encoder_name_or_path = 'openai/clip-vit-large-patch14-336'
pretrained_pth = 'work_dirs/llava_qwen2_5_1_5b_projector_lcs558k'  # its last checkpoint; or iter_N.pth, or XTuner's
pad_image_to_square = True

# Data
data_root = 'data/llava_data'
data_path = data_root + '/LLaVA-Instruct-150K/llava_v1_5_mix665k.json'
image_folder = data_root + '/llava_images'
max_length = 4096  # tokens, the 576 of an image included
pack_to_max_length = True

# Tuning
tune = dict(vision_encoder=dict(mode='lora', r=64, alpha=16), projector='full', llm='lora')
lora_r = 512
lora_alpha = 256
lora_dropout = 0.05
quantization = 'nf4'
dtype = 'bfloat16'
gradient_checkpointing = True
attn_implementation = 'sdpa'

# Optimisation
batch_size = 1  # packs per device
accumulative_counts = 32  # about 128 samples a step
dataloader_num_workers = 4
max_epochs = 1
optim_type = AdamW
lr = 2e-4
betas = (0.9, 0.999)
weight_decay = 0.0
max_norm = 1.0
warmup_ratio = 0.03
seed = 42

# Saving and looking, counted in optimizer steps
save_steps = 500
save_total_limit = 2
evaluation_freq = 500
evaluation_inputs = ['Please describe this picture', 'What is unusual about this picture?']
evaluation_images = [image_folder + '/coco/train2017/000000000009.jpg'] * 2
SYSTEM = None

#######################################################################
#                      PART 2  Model & processor                      #
#######################################################################
llava = dict(
    llm_name_or_path=llm_name_or_path, visual_encoder_name_or_path=visual_encoder_name_or_path,
    pretrained_pth=pretrained_pth, pad_image_to_square=pad_image_to_square)  # fmt: skip
processor = dict(type=Processor, pretrained_model_name_or_path=llava)
model = dict(
    type=SupervisedFinetune,
    pretrained_model_name_or_path=llava,
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
    dataset_map_fn=dict(type=llava_map_fn),
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
