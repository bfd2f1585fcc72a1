"""Checkpoints of a few bytes, sealed as the engine seals one."""

import json
from pathlib import Path

from vlmtune.engine import checkpoint
from vlmtune.utils.disk import Written, hash_file

FILES = {'model.safetensors': b'weights' * 100, 'trainer.json': b'{}', 'processor/tokenizer.json': b'{"a": 1}'}
META = dict(iteration=1, world_size=1, resumable=True)


def seal(folder: Path, iteration: int, *, at: float | None = None, content: bytes = b'') -> Path:
    """``seal(folder, 3)``: iter_3.pth in it; ``at`` is when."""
    target = folder / checkpoint.checkpoint_name(iteration)
    staging = stage(target, content=content)
    checkpoint.seal(staging, target, files=announced(staging), meta={**META, 'iteration': iteration})
    if at is not None:
        edit(target, saved_at=at)
    return target


def stage(target: Path, *, content: bytes = b'') -> Path:
    staging = checkpoint.start(target)
    for name, data in FILES.items():
        (staging / name).parent.mkdir(exist_ok=True)
        (staging / name).write_bytes(data + content)
    return staging


def announced(staging: Path) -> dict[str, Written]:
    return {name: Written((staging / name).stat().st_size, hash_file(staging / name)) for name in FILES}


def edit(target: Path, **changes: object) -> None:
    path = target / checkpoint.MANIFEST
    manifest = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in manifest.items() if v is not ...}))


def names(paths):
    return sorted(path.name for path in paths)
