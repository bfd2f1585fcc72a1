"""The names a config may use at its top level, and what other tools call the same things."""

from collections.abc import Collection

from vlmtune.utils.suggest import did_you_mean

RUNNER_NAMES = frozenset(
    """
    processor model work_dir experiment_name train_dataloader optim_wrapper param_scheduler train_cfg
    val_dataloader val_evaluator val_cfg test_dataloader test_evaluator test_cfg strategy default_hooks custom_hooks
    load_from resume launcher env_cfg log_processor log_level visualizer trackers randomness default_scope vision_cache
    plan_cache_dir reset_optimizer timeouts requeue_exit_code
    """.split()
)
"""What the Runner takes. Every other top-level name must be used by the file itself."""

SETTINGS = frozenset(
    """
    pretrained_model_name_or_path llm_name_or_path visual_encoder_name_or_path pretrained_pth
    pad_image_to_square prompt_template new_tokens data_root data_path image_folder val_data_path max_length
    pack_to_max_length image_processor max_pixels
    tune lora_r lora_alpha lora_dropout quantization dtype gradient_checkpointing attn_implementation
    batch_size accumulative_counts dataloader_num_workers max_epochs max_steps optim_type lr betas weight_decay
    max_norm warmup_ratio seed save_steps save_total_limit evaluation_freq evaluation_inputs evaluation_images SYSTEM
    val_interval val_batch_size
    """.split()
)
"""The settings that recipes share."""

_SAME = {
    'pretrained_model_name_or_path': 'model_name_or_path llava_name_or_path model_name base_model model_id model_path',
    'pretrained_pth': 'pretrained_llava_pth',
    'data_path': 'data_files dataset_path train_data_path dataset_dir',
    'val_data_path': 'eval_data_path validation_data_path val_size',
    'image_folder': 'image_dir image_root images_dir media_dir',
    'max_length': 'max_seq_length max_seq_len cutoff_len model_max_length seq_len max_dynamic_length',
    'pack_to_max_length': 'packing use_varlen_attn pack_to_max',
    'prompt_template': 'template chat_template',
    'new_tokens': 'add_tokens additional_tokens',
    'image_processor': 'image_processor_cfg',
    'max_pixels': 'image_max_pixels',
    'tune': 'freeze_llm freeze_visual_encoder llm_lora visual_encoder_lora freeze_vision_tower tune_mm_mlp_adapter '
    'train_type finetuning_type lora lora_target freeze_language_model freeze_multi_modal_projector',
    'lora_r': 'lora_rank rank',
    'quantization': 'load_in_4bit load_in_8bit quantization_config quantization_bit quant_bits',
    'dtype': 'torch_dtype bf16 fp16 precision mixed_precision',
    'gradient_checkpointing': 'activation_checkpointing use_activation_checkpointing',
    'attn_implementation': 'attn_impl flash_attn use_flash_attn',
    'batch_size': 'batch_size_per_device per_device_train_batch_size per_device_batch_size train_batch_size '
    'micro_batch_size mirco_batch_size',
    'accumulative_counts': 'accum gradient_accumulation_steps grad_accum accumulate_grad_batches accumulation_steps',
    'dataloader_num_workers': 'num_workers workers_per_gpu workers dataset_num_proc',
    'max_epochs': 'num_train_epochs num_epochs epochs total_epochs max_epoch',
    'max_steps': 'max_iters max_train_steps total_steps num_steps',
    'optim_type': 'optim optimizer_type optimizer_name',
    'lr': 'learning_rate base_lr max_lr',
    'betas': 'adam_betas adam_beta1 adam_beta2',
    'max_norm': 'max_grad_norm grad_clip clip_grad clip_grad_norm gradient_clipping',
    'warmup_ratio': 'warmup warmup_steps warmup_iters num_warmup_steps',
    'save_steps': 'save_interval checkpoint_interval save_freq',
    'save_total_limit': 'max_keep_ckpts keep_checkpoints',
    'evaluation_freq': 'evaluation_interval evaluation_steps',
    'val_interval': 'eval_steps eval_interval eval_strategy validation_steps',
    'evaluation_inputs': 'eval_inputs evaluation_prompts sample_prompts',
    'evaluation_images': 'evaluation_image eval_images image_path',
    'SYSTEM': 'system_prompt default_system',
    'work_dir': 'output_dir save_dir log_dir',
    'processor': 'tokenizer preprocessor',
    'resume': 'resume_from resume_from_checkpoint auto_resume',
    'optim_wrapper': 'optimizer optimizer_config fp16_cfg',
    'param_scheduler': 'lr_config lr_scheduler scheduler momentum_config',
    'train_cfg': 'runner train_loop total_cfg',
    'train_dataloader': 'data train_loader dataloader',
    'val_evaluator': 'evaluation evaluator',
    'default_hooks': 'checkpoint_config log_config',
    'strategy': 'deepspeed deepspeed_config ddp fsdp',
    'timeouts': 'ddp_timeout timeout nccl_timeout',
    'trackers': 'report_to vis_backends logger_type use_wandb',
    'env_cfg': 'cudnn_benchmark dist_params mp_cfg',
}
OLD_NAMES = {old: ours for ours, others in _SAME.items() for old in others.split()}
"""{name in mmengine, XTuner or a peer: name here}."""

DATALOADER_KEYS = frozenset(
    """
    dataset batch_size num_workers pack_to_max_length max_patches tail shuffle group_by_length prefetch_factor timeout
    pin_memory
    """.split()
)
"""The keys of ``train_dataloader``; the Runner builds sampler and collate function from them."""

QUESTION_LOADER_KEYS = frozenset(('dataset', 'batch_size'))
"""The keys of ``val_dataloader`` and ``test_dataloader``; what learns from held-out rows is as in training."""

EVALUATOR_KEYS = frozenset(('metrics', 'generation', 'reference_key'))
"""The keys of ``val_evaluator`` and ``test_evaluator``."""


_OTHER_WAYS = {
    'max_epochs': 'max_steps',
    'max_steps': 'max_epochs',
    'pretrained_model_name_or_path': 'llm_name_or_path',
    'llm_name_or_path': 'pretrained_model_name_or_path',
}
"""{a setting: the one that a recipe may have instead}."""


def unknown_name(name: str, valid: Collection[str]) -> str:
    """What to say about a name that nothing knows: the same thing's name here, or the nearest valid one."""
    ours = OLD_NAMES.get(name, name)
    called = '' if ours == name else f'{name!r} is called {ours!r} here'
    if ours in SETTINGS and ours not in valid:
        other = _OTHER_WAYS.get(ours)
        missing = f'this recipe has {other!r} instead' if other in valid else 'this recipe has no such setting'
        return f'{called}; {missing}' if called else f'{name!r}: {missing}'
    if called:
        return called
    if name == '_base_':
        return "'_base_' is mmengine's older style; write `with read_base(): from vlmtune.presets... import *`"
    return f'unknown name {name!r}' + did_you_mean(name, valid)
