"""What every run has and hardly anyone edits; a recipe changes a leaf through its owner:

``default_hooks.checkpoint.interval = save_steps``. Steps are optimizer steps.
"""

from mmengine.hooks import LoggerHook, ParamSchedulerHook, RuntimeInfoHook

from vlmtune.engine import CheckpointHook, LogLine, MetricsFileHook, ProgressBarHook, ThroughputHook

default_hooks = dict(
    runtime_info=dict(type=RuntimeInfoHook),
    throughput=dict(type=ThroughputHook),
    metrics=dict(type=MetricsFileHook, interval=1),
    logger=dict(type=LoggerHook, interval=10, log_metric_by_epoch=False),
    progress=dict(type=ProgressBarHook),
    param_scheduler=dict(type=ParamSchedulerHook),
    checkpoint=dict(type=CheckpointHook, interval=500, max_keep_ckpts=2, save_optimizer=True),
)
env_cfg = dict(cudnn_benchmark=False)
log_level = 'INFO'
log_processor = dict(type=LogLine, window_size=10)
trackers = None  # 'tensorboard', 'wandb', 'mlflow', 'swanlab', a list of them, or dict(wandb=dict(project='pages'))
visualizer = None  # in place of trackers, one of mmengine's: dict(type=Visualizer, vis_backends=[...])
load_from = None
resume = False
reset_optimizer = False  # True: a resumed run takes weights, schedules and data position, not the optimizer's state
timeouts = dict(step=600, other=7200)  # seconds that ranks wait for each other: in steps, and in all else
requeue_exit_code = None  # of a run that SIGUSR1 ended, for slurm's --requeue; None: 143
plan_cache_dir = '~/.cache/vlmtune/plans'  # tokenised data sets; None: every run makes its own
randomness = dict(seed=None)
