"""Imports transformers and mmengine without the optional packages that they would pull in.

Installed next to them, deepspeed and (through peft) bitsandbytes are imported by transformers and mmengine at import
time, used or not: seconds, warnings on the terminal, and a device probe. Packages of vlmtune that need these libraries
import this module first. A run that uses LoRA imports peft, and one that uses deepspeed imports that.
"""

import logging

from vlmtune.utils.imports import imports_refused

# Every LoRA run imports it, and it warns of kernels that only 4-bit weights on a CPU would use.
logging.getLogger('bitsandbytes').setLevel(logging.ERROR)

with imports_refused('deepspeed'):
    import transformers.modeling_utils
    import transformers.processing_utils  # noqa: F401

with imports_refused('deepspeed', 'bitsandbytes', 'peft'):
    import mmengine.runner  # noqa: F401
