# vlmtune train quickstart_lora  (2 CPU cores, about a minute)
# The quickstart: the committed base model answers short questions; LoRA teaches it to describe a picture in a sentence.
# `make quickstart` prepares the data, runs this, is killed and resumes, converts, merges, chats and measures.
from mmengine.config import read_base

with read_base():
    from vlmtune.presets.default_runtime import *

from mmengine.optim import CosineAnnealingLR, LinearLR
from torch.optim import AdamW

from vlmtune.data import Processor, SupervisedDataset, chat_template_map_fn, llava_map_fn, load_rows
from vlmtune.engine import DatasetInfoHook, EvaluateChatHook, TrainLoop, ValLoop
from vlmtune.evaluation import exact_match
from vlmtune.models import SupervisedFinetune

#######################################################################
#                          PART 1  Settings                           #
#######################################################################
# Model
pretrained_model_name_or_path = 'quickstart/base'
prompt_template = None  # the model's own

# Data
data_root = 'quickstart/data'
data_path = data_root + '/describe_train.jsonl'
val_data_path = data_root + '/describe_held_out.jsonl'  # None: no validation
image_folder = data_root + '/images'
max_length = 256  # tokens, image tokens included
pack_to_max_length = False  # samples are nearly of one length

# Tuning
tune = dict(vision_encoder='frozen', projector='frozen', llm='lora')
lora_r = 16
lora_alpha = 32
lora_dropout = 0.0
quantization = None
dtype = 'float32'
gradient_checkpointing = False
attn_implementation = 'sdpa'

# Optimisation
batch_size = 16  # per device
accumulative_counts = 1
dataloader_num_workers = 0
max_epochs = 3
optim_type = AdamW
lr = 5e-3
betas = (0.9, 0.999)
weight_decay = 0.0
max_norm = 1.0
warmup_ratio = 0.06
seed = 0

# Saving and looking
save_steps = 50
save_total_limit = 2
evaluation_freq = 50
evaluation_inputs = ['Describe the picture.', 'Describe the picture.', 'what color is the shape?']
evaluation_images = [f'{image_folder}/test/{i}.png' for i in (0, 1, 0)]
SYSTEM = None
val_interval = 100  # and behind the last step
val_batch_size = 32  # questions answered together

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
val_dataset = dict(train_dataset, rows=dict(type=load_rows, path=val_data_path))
val_dataloader = dict(dataset=val_dataset, batch_size=val_batch_size) if val_data_path else None
val_evaluator = dict(metrics=[dict(type=exact_match)], generation=dict(max_new_tokens=24))
val_cfg = dict(type=ValLoop, interval=val_interval, limit=64)

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
default_hooks.logger.interval = 20
questions = dict(inputs=evaluation_inputs, images=evaluation_images, system=SYSTEM, max_new_tokens=24)
custom_hooks = [dict(type=DatasetInfoHook), dict(type=EvaluateChatHook, every_n_iters=evaluation_freq, **questions)]
randomness = dict(seed=seed)
