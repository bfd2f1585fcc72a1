"""``vlmtune doctor``: what is installed, what of it works here, and what is known to go wrong."""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil
import torch
from packaging.requirements import Requirement

from vlmtune import __version__
from vlmtune.engine.build_locks import left_locks
from vlmtune.utils.secrets import without_secrets

_GIB = 2**30
_IMPORT_TIMEOUT = 120.0  # seconds


@dataclass(frozen=True)
class Feature:
    """Something that works only where further packages do.

    Attributes:
        name: as a user knows it.
        imports: what must be importable, one after the other.
        install: what to type where it is not.
        needs_gpu: whether it also needs CUDA.
    """

    name: str
    imports: tuple[str, ...]
    install: str
    needs_gpu: bool = False


FEATURES = (
    Feature('LoRA and adapters', ('peft',), 'pip install peft'),
    Feature("quantization='nf4' or 'int8'", ('bitsandbytes',), 'pip install bitsandbytes'),
    Feature('DeepSpeed ZeRO', ('deepspeed',), 'pip install deepspeed, after torch'),
    Feature(
        'torchvision processors, `serve` of Qwen-VL and InternVL', ('torchvision',), 'the torchvision of your torch'
    ),
    Feature("attn_implementation='flash_attention_2'", ('flash_attn',), 'pip install flash-attn', needs_gpu=True),
    Feature('liger_kernel=True', ('liger_kernel',), 'pip install liger-kernel', needs_gpu=True),
    Feature("trackers='tensorboard'", ('tensorboard',), "pip install 'vlmtune[tensorboard]'"),
    Feature("trackers='wandb'", ('wandb',), "pip install 'vlmtune[wandb]'"),
    Feature("trackers='mlflow'", ('mlflow',), "pip install 'vlmtune[mlflow]'"),
    Feature("trackers='swanlab'", ('swanlab',), "pip install 'vlmtune[swanlab]'"),
    Feature('metrics of text', ('jiwer', 'sacrebleu', 'rouge_score'), "pip install 'vlmtune[metrics]'"),
    Feature('vlmtune demo', ('gradio',), "pip install 'vlmtune[demo]'"),
    Feature('vlmtune serve', ('fastapi', 'uvicorn'), "pip install 'vlmtune[serve]'"),
    Feature('vlmtune serve --engine vllm', ('vllm',), 'pip install vllm, in an environment of its own', needs_gpu=True),
    Feature('vlmtune convert quantize', ('auto_round',), "pip install 'vlmtune[quantize]'"),
    Feature('AWQ and GPTQ models', ('gptqmodel',), 'pip install gptqmodel optimum, in an environment of its own'),
    Feature('models and data from ModelScope', ('modelscope_hub',), "pip install 'vlmtune[modelscope]'"),
)


@dataclass(frozen=True)
class FeatureState:
    """Whether a feature can be used: 'usable', 'missing', 'broken' (installed, but its import fails), or 'no gpu'."""

    name: str
    state: Literal['usable', 'missing', 'broken', 'no gpu']
    detail: str = ''


@dataclass(frozen=True)
class Diagnosis:
    """All that was found; ``problems`` are those that stop or slow a run."""

    versions: dict[str, str]
    devices: list[str]
    machine: dict[str, str]
    features: list[FeatureState]
    problems: list[str] = field(default_factory=list)

    def text(self) -> str:
        """As it is printed."""
        lines = ['versions', *_columns(self.versions), 'devices', *(f'  {device}' for device in self.devices)]
        lines += ['machine', *_columns(self.machine), 'optional parts']
        lines += _columns({f.name: f.state + (f': {f.detail}' if f.detail else '') for f in self.features})
        lines += ['problems', *(f'  {problem}' for problem in self.problems)] if self.problems else ['no known problem']
        return '\n'.join(lines)


def doctor(*, as_json: bool = False) -> int:
    """Print what is here; 1 if something is known to go wrong, else 0."""
    found = diagnose()
    print(json.dumps(asdict(found), indent=2) if as_json else found.text())
    return 1 if found.problems else 0


def diagnose(features: Sequence[Feature] = FEATURES) -> Diagnosis:
    """Look at packages, devices and the machine; every optional package is imported in a process of its own."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        states = list(pool.map(_state_of, features))
    problems = [*_wrong_versions(), *_device_problems(), *_machine_problems()]
    problems += [f'{state.name}: {state.detail}' for state in states if state.state == 'broken']
    return Diagnosis(_versions(), _devices(), _machine(), states, problems)


def _columns(rows: Mapping[str, str]) -> list[str]:
    width = max(map(len, rows), default=0)
    return [f'  {name:<{width}}  {value}' for name, value in rows.items()]


# ---- packages


def _versions() -> dict[str, str]:
    own = {requirement.name for requirement in _requirements()}
    found = {name: _version(name) or 'not installed' for name in sorted(own, key=str.lower)}
    return {'vlmtune': __version__, 'python': platform.python_version(), **found}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _requirements() -> list[Requirement]:
    """What the installed package asks for, on this platform, extras left out."""
    try:
        lines = metadata.requires('vlmtune') or []
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        lines = []
    found = [Requirement(line) for line in lines]
    return [r for r in found if r.marker is None or r.marker.evaluate({'extra': ''})]


def _wrong_versions() -> list[str]:
    problems = []
    for requirement in _requirements():
        version = _version(requirement.name)
        if version is None:
            problems.append(f"{requirement.name} is not installed; pip install '{requirement}'")
        elif not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"{requirement.name} is {version}; pip install '{requirement.name}{requirement.specifier}'")
    return problems


def _state_of(feature: Feature) -> FeatureState:
    if feature.needs_gpu and not torch.cuda.is_available():
        return FeatureState(feature.name, 'no gpu')
    for module in feature.imports:
        command = [sys.executable, '-P', '-c', f'import {module}']  # -P: not from the folder where we are
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_IMPORT_TIMEOUT, check=False)
        except subprocess.TimeoutExpired:
            return FeatureState(feature.name, 'broken', f'import {module} took more than {_IMPORT_TIMEOUT:.0f} s')
        if done.returncode == 0:
            continue
        last = (done.stderr.strip().splitlines() or [f'exit code {done.returncode}'])[-1]
        if last.startswith('ModuleNotFoundError') and f"'{module}'" in last:
            return FeatureState(feature.name, 'missing', feature.install)
        return FeatureState(feature.name, 'broken', f'import {module} fails: {without_secrets(last)}')
    return FeatureState(feature.name, 'usable')


# ---- devices


def _devices() -> list[str]:
    if not torch.cuda.is_available():
        return [f'cpu: {torch.get_num_threads()} threads, torch built for {torch.version.cuda or "the CPU"}']
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            f'cuda:{index}: {properties.name}, {properties.total_memory / _GIB:.0f} GiB, '
            f'compute capability {properties.major}.{properties.minor}, CUDA {torch.version.cuda}'
        )
    return found


def _device_problems() -> list[str]:
    if torch.version.cuda is not None and not torch.cuda.is_available():
        return [
            f'torch is built for CUDA {torch.version.cuda}, but sees no GPU: the driver is missing or too old '
            '(nvidia-smi shows it), or CUDA_VISIBLE_DEVICES hides the GPUs'
        ]
    if not torch.cuda.is_available():
        return []
    problems = []
    if min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())) < (8, 0):
        problems.append("a GPU before Ampere computes bfloat16 slowly or not at all; set dtype='float16'")
    if _version('deepspeed') and shutil.which('nvcc') is None:
        problems.append('nvcc is not found: DeepSpeed cannot build what its offloading needs; install the CUDA toolkit')
    return problems


# ---- the machine


def _machine() -> dict[str, str]:
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(Path.cwd())
    shared = Path('/dev/shm')
    rows = {
        'system': f'{platform.system()} {platform.release()}, {platform.machine()}',
        'cpu': f'{os.cpu_count()} cores',
        'memory': f'{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB free',
        'disk here': f'{disk.free / _GIB:.1f} GiB free',
    }
    if shared.is_dir():
        rows['/dev/shm'] = f'{shutil.disk_usage(shared).free / _GIB:.1f} GiB free'
    variables = ('HF_HOME', 'HF_ENDPOINT', 'HF_HUB_OFFLINE', 'CUDA_VISIBLE_DEVICES', 'NPROC_PER_NODE')
    return rows | {name: without_secrets(os.environ[name]) for name in variables if name in os.environ}


def _machine_problems() -> list[str]:
    problems = [f'{lock}: a killed run has left it, and DeepSpeed waits for it; remove it' for lock in left_locks()]
    if shutil.disk_usage(Path.cwd()).free < 5 * _GIB:
        problems.append('less than 5 GiB of disk are free here; a checkpoint may not fit')
    if os.path.isdir('/dev/shm') and shutil.disk_usage('/dev/shm').total < _GIB / 2:
        problems.append(
            '/dev/shm is smaller than 512 MiB, and loader workers pass batches through it; '
            'start the container with --shm-size 8g, or set dataloader_num_workers=0'
        )
    return problems
