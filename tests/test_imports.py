"""What a user does not use is not imported: it costs seconds, prints warnings, probes devices."""

import subprocess
import sys

OPTIONAL = ['deepspeed', 'bitsandbytes', 'torchvision', 'peft', 'datasets']
OPTIONAL += ['tensorboard', 'wandb', 'mlflow', 'swanlab']  # trackers
OPTIONAL += ['sacrebleu', 'jiwer', 'rapidfuzz', 'rouge_score']  # metrics
CODE = """
import sys
import vlmtune.apps.train, vlmtune.apps.test, vlmtune.models, vlmtune.data, vlmtune.engine
print('imported', [name for name in {optional} if name in sys.modules])
vlmtune.models.SupervisedFinetune({model!r}, tune=dict(projector='full'), dtype='float32')
print('built', [name for name in {optional} if name in sys.modules])
import logging
print('bitsandbytes warns', logging.getLogger('bitsandbytes.backends.cpu.ops').isEnabledFor(logging.WARNING))
"""


def test_optional_libraries_stay_out(tiny_model):
    """Neither importing the rooms nor a model without LoRA and quantisation loads one."""
    code = CODE.format(optional=OPTIONAL, model=str(tiny_model('llava')))
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=600, check=True)
    assert done.stdout.splitlines() == ['imported []', 'built []', 'bitsandbytes warns False']
