"""``vlmtune serve``: checks an export and starts a server of others on it, with an OpenAI-compatible API."""

import json
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlmtune.apps.data.train_data import build_dataset, build_processor, members_of, open_parts, read_data_config
from vlmtune.apps.export.adapters import refuse_checkpoint
from vlmtune.apps.export.check import check_export
from vlmtune.apps.export.check_inputs import joint_processor
from vlmtune.data.processor_files import IMAGE_FILE
from vlmtune.families import Family, find_family
from vlmtune.layouts import find_layout, read_config
from vlmtune.models.quantization import stored_quantization
from vlmtune.utils.adapter_folder import base_of, is_adapter
from vlmtune.utils.errors import CheckpointError, ConfigError
from vlmtune.utils.extras import need
from vlmtune.utils.ports import listen
from vlmtune.utils.pretrained import check_source, read_source_json

logger = logging.getLogger(__name__)

Engine = Literal['transformers', 'vllm']
_LOCAL = ('127.0.0.1', 'localhost', '::1')
_RUN_CODE = '--trust-remote-code'
_STEP = 64  # tokens; a length of the plan is rounded up to it


@dataclass(frozen=True)
class RequestLimits:
    """What requests may take.

    Attributes:
        tokens: of the longest prompt and its answer.
        images: of one request.
    """

    tokens: int
    images: int


def serve(
    directory: str,
    *,
    engine: Engine = 'transformers',
    host: str = '127.0.0.1',
    port: int = 8000,
    config: str | None = None,
    max_new_tokens: int = 512,
    check: bool = True,
    show: bool = False,
    options: Sequence[str] = (),
) -> int:
    """Check an export, then become the server; this returns only where nothing is started.

    Args:
        directory: a model in the layout of transformers (vLLM: or in that of its authors); no adapter.
        engine: 'transformers' (``transformers serve``) or 'vllm' (``vllm serve``).
        host: to listen on.
        port: to listen on.
        config: of the run; vLLM gets the length and the number of pictures of its longest sample.
        max_new_tokens: of an answer; added to the longest sample.
        check: look at the export first, as ``vlmtune export --check`` does.
        show: print the command and stop.
        options: further ones of the server, as they are.

    Returns:
        0 after ``show``, 1 where the export is not what it should be.

    Raises:
        UserError: it cannot be served so, a package is missing, or the port is in use.
    """
    if not 1 <= port <= 65535:
        raise ConfigError(f'--port {port}: expected 1 to 65535')
    folder = _servable(directory)
    make = _vllm_command if engine == 'vllm' else _transformers_command
    command = make(folder, host=host, port=port, config=config, new_tokens=max_new_tokens, options=options)
    if show:
        print(shlex.join(command))
        return 0
    _check_engine(engine, folder)
    listen(host, port).close()
    if host not in _LOCAL:
        logger.warning(
            'whoever reaches %s can make the server read pictures from files and addresses it can reach', host
        )
    if check and check_export(str(folder)):
        return 1
    listen(host, port).close()  # loading takes its time
    logger.info('%s', shlex.join(command))
    logger.info('it answers on http://%s:%d/v1 as the model %s', host, port, folder)
    sys.stdout.flush()
    os.execvp(command[0], command)


def _servable(directory: str) -> Path:
    folder = Path(directory).expanduser().absolute()
    if not folder.is_dir():
        raise CheckpointError(f'{folder} is no folder; expected a model that vlmtune convert wrote')
    refuse_checkpoint(folder)
    if is_adapter(folder):
        base = base_of(folder) or 'BASE'
        raise CheckpointError(
            f'{folder} is an adapter, and a server loads models; merge it: vlmtune convert merge {base} {folder} OUT'
        )
    check_source(str(folder))
    if '@' in str(folder):
        raise CheckpointError(f'{folder}: servers take what stands behind an @ for a revision; rename the folder')
    return folder


def _check_engine(engine: Engine, folder: Path) -> None:
    if engine == 'vllm':
        if shutil.which('vllm') is None:
            raise ConfigError(
                '--engine vllm needs vLLM, which is not installed here; install it into an environment of its own '
                '(pip install vllm), and start there what --print shows'
            )
        return
    for package in ('fastapi', 'uvicorn', 'openai'):
        need(package, extra='serve', what='vlmtune serve')
    model = read_config(str(folder))
    stored_quantization(model)  # raises where what computes with such weights is missing
    if find_family(model.model_type).has_vision and joint_processor(folder) is None:
        raise ConfigError(
            f'{folder}: `transformers serve` needs torchvision for the processor of this family; install the one that '
            'fits your torch (pip install torchvision), or serve it with --engine vllm'
        )


# ---- commands


def _transformers_command(
    folder: Path, *, host: str, port: int, config: str | None, new_tokens: int, options: Sequence[str]
) -> list[str]:
    family = find_family(read_config(str(folder)).model_type)
    if find_layout(str(folder)) is not None or family.model is not None:
        raise CheckpointError(
            f'{folder} is not in the layout of transformers, so `transformers serve` cannot load it; write it with '
            '--format hf where that is possible, or use --engine vllm'
        )
    if config is not None:
        logger.info('`transformers serve` has no limits to set; the processor files of the export carry them')
    server = [sys.executable, '-P', '-m', 'transformers.cli.transformers', 'serve', str(folder)]
    return [*server, '--host', host, '--port', str(port), *options]


def _vllm_command(
    folder: Path, *, host: str, port: int, config: str | None, new_tokens: int, options: Sequence[str]
) -> list[str]:
    model = read_config(str(folder))
    family = find_family(model.model_type)
    is_original = find_layout(str(folder)) is not None or family.model is not None
    if is_original and _RUN_CODE not in options:
        raise CheckpointError(
            f'vLLM loads {folder} only by running the *.py files in it; read them, and if you trust them: '
            f'vlmtune serve {folder} --engine vllm --engine-options {_RUN_CODE}'
        )
    command = ['vllm', 'serve', str(folder), '--host', host, '--port', str(port)]
    if config is not None:
        most = request_limits(config, new_tokens=new_tokens)
        longest = getattr(model.get_text_config(), 'max_position_embeddings', None)
        command += ['--max-model-len', str(min(most.tokens, longest or most.tokens))]
        if family.has_vision:
            command += ['--limit-mm-per-prompt', json.dumps(dict(image=max(1, most.images)))]
    if limits := _pixel_limits(folder, family):
        command += ['--mm-processor-kwargs', json.dumps(limits)]
    return [*command, *options]


def request_limits(config: str, *, new_tokens: int) -> RequestLimits:
    """What the longest sample of a run takes, and an answer.

    Args:
        config: of the run; its data is planned, or read from the plan cache.
        new_tokens: of an answer.

    Raises:
        UserError: the config is wrong, or its data is not there.
    """
    cfg = read_data_config(config)
    dataset = build_dataset(cfg, open_parts(cfg), build_processor(cfg))
    longest = int(dataset.lengths.max()) + new_tokens
    images = max((len(sample.images) for member in members_of(dataset) for sample in member.samples), default=0)
    return RequestLimits(tokens=-(-longest // _STEP) * _STEP, images=images)


def _pixel_limits(folder: Path, family: Family) -> dict[str, int]:
    """Of Qwen's image processors, whose size in the files vLLM could be told to overrule elsewhere."""
    if family.image_limit != 'max_pixels':
        return {}
    files = read_source_json(str(folder), IMAGE_FILE) or {}
    size = files.get('size') or {}
    found = dict(
        min_pixels=files.get('min_pixels') or size.get('shortest_edge'),
        max_pixels=files.get('max_pixels') or size.get('longest_edge'),
    )
    return {name: int(value) for name, value in found.items() if value}
