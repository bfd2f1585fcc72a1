# vlmtune train llava_onevision_qwen2_0_5b_full_sequences  (one GPU with 24 GB)
# Sequences of pictures, 730 tokens each; a picture alone is cut into tiles, up to 8700 tokens. ShareGPT rows.
from mmengine.config import read_base

with read_base():
    from vlmtune.presets.default_runtime import *

from mmengine.optim import CosineAnnealingLR, LinearLR
from torch.optim import AdamW

from vlmtune.data import Processor, SupervisedDataset, chat_template_map_fn, load_rows, sharegpt_map_fn
from vlmtune.engine import DatasetInfoHook, EvaluateChatHook, TrainLoop
from vlmtune.models import SupervisedFinetune

#######################################################################
#                          PART 1  Settings                           #
#######################################################################
# Model
pretrained_model_name_or_path = 'llava-hf/llava-onevision-qwen2-0.5b-ov-hf'

# Data
data_root = 'data/assembly'
data_path = data_root + '/train.json'
image_folder = data_root + '/images'
max_length = 10240  # tokens, image tokens included
pack_to_max_length = True

# Tuning
tune = dict(vision_encoder=dict(mode='full', lr=2e-6), projector='full', llm='full')
quantization = None
dtype = 'bfloat16'
gradient_checkpointing = True
attn_implementation = 'sdpa'

# Optimisation
batch_size = 1  # packs per device
accumulative_counts = 8
dataloader_num_workers = 4
max_epochs = 2
optim_type = AdamW
lr = 1e-5
betas = (0.9, 0.999)
weight_decay = 0.0
max_norm = 1.0
warmup_ratio = 0.03
seed = 42

# Saving and looking, counted in optimizer steps
save_steps = 200
save_total_limit = 2
evaluation_freq = 100
evaluation_inputs = ['What changed between the two pictures?', 'Which step comes next?']
evaluation_images = [[image_folder + '/0001_a.jpg', image_folder + '/0001_b.jpg'], image_folder + '/0002_a.jpg']
SYSTEM = None

#######################################################################
#                      PART 2  Model & processor                      #
#######################################################################
processor = dict(type=Processor, pretrained_model_name_or_path=pretrained_model_name_or_path)
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
