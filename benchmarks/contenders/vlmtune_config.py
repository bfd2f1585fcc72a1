# A run of the vlmtune contender (vlmtune_run.py) or of gpu_step.py; these fill in the settings.
from mmengine.config import read_base

with read_base():
    from vlmtune.presets.default_runtime import *

from torch.optim import AdamW

from vlmtune.data import Processor, SupervisedDataset, chat_template_map_fn, llava_map_fn, load_rows
from vlmtune.engine import TrainLoop
from vlmtune.models import SupervisedFinetune

#######################################################################
#                          PART 1  Settings                           #
#######################################################################
workload = ''
max_length = 2048  # tokens, image tokens included
pack_to_max_length = True
batch_size = 1
dataloader_num_workers = 0
llm = 'full'
vision = 'full'  # the projector, too
dtype = 'float32'
gradient_checkpointing = False
attn_implementation = 'sdpa'
lr = 1e-4
max_norm = 1.0
max_epochs = 1  # None where max_steps is given
max_steps = None

#######################################################################
#                      PART 2  Model & processor                      #
#######################################################################
pretrained_model_name_or_path = workload + '/model'
processor = dict(type=Processor, pretrained_model_name_or_path=pretrained_model_name_or_path)
model = dict(
    type=SupervisedFinetune,
    pretrained_model_name_or_path=pretrained_model_name_or_path,
    tune=dict(vision_encoder=vision, projector=vision, llm=llm),
    lora=dict(r=16, alpha=32),
    dtype=dtype,
    gradient_checkpointing=gradient_checkpointing,
    attn_implementation=attn_implementation,
)

#######################################################################
#                    PART 3  Dataset & dataloader                     #
#######################################################################
train_dataset = dict(
    type=SupervisedDataset,
    rows=dict(type=load_rows, path=workload + '/rows.jsonl'),
    dataset_map_fn=dict(type=llava_map_fn),
    template_map_fn=dict(type=chat_template_map_fn),
    image_folder=workload + '/images',
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
optim_wrapper = dict(optimizer=dict(type=AdamW, lr=lr, weight_decay=0.0, fused=True), clip_grad=dict(max_norm=max_norm))
train_cfg = dict(type=TrainLoop, max_epochs=max_epochs, max_steps=max_steps)

#######################################################################
#                           PART 5  Runtime                           #
#######################################################################
default_hooks.checkpoint = None
plan_cache_dir = None
randomness = dict(seed=0)
