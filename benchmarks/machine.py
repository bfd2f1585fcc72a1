"""Names the machine that a benchmark ran on."""

import os
import platform
from pathlib import Path


def describe_machine() -> str:
    """Processor, cores that this process may use, operating system and Python, on one line."""
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    name = names[0] if names else platform.processor()
    return f'{name}, {cores} cores, {platform.system()}, Python {platform.python_version()}'
