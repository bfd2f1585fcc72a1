"""Features of a frozen vision encoder, computed once for every image and read from a file while training.

The cache is a folder of stores, each named by a digest of everything its features depend on: the image files (path,
size, time of the last change), the settings of the image processor, the encoder's weights and how they are run. Whoever
comes first builds the store, the other processes wait at a lock on a file; no collective is open meanwhile.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlmtune.data import SupervisedDataset
from vlmtune.data.feature_store import Entry, FeatureStore, image_name, write_features
from vlmtune.data.images import load_image, resolve_image_path
from vlmtune.data.mixture import MixedDataset
from vlmtune.models import SupervisedFinetune
from vlmtune.models.modes import in_evaluation
from vlmtune.models.vision_features import check_cacheable, encode_images
from vlmtune.structures import ImageRef, ImageSize
from vlmtune.utils.device import find_device
from vlmtune.utils.errors import ConfigError, DataError
from vlmtune.utils.progress import Progress

logger = logging.getLogger(__name__)

_FORMAT = 1  # of the store and of what its key holds
_BATCH = 16  # images that are read together; images or tiles that are encoded together


def use_vision_cache(model: SupervisedFinetune, dataset: Dataset, *, folder: str | Path, workers: int = 0) -> None:
    """Give a data set the features of its images, computed now by ``workers`` processes where ``folder`` lacks them.

    Raises:
        ConfigError: the vision encoder trains, the family is not supported, or the disk is too small.
        DataError: a broken image, where the data set says ``on_bad_sample='error'``.
    """
    check_cacheable(model.family, plans=model.plans)
    datasets = dataset.members if isinstance(dataset, MixedDataset) else [cast(SupervisedDataset, dataset)]
    builder = _Builder(model, datasets)
    root = Path(folder).expanduser().absolute()
    root.mkdir(parents=True, exist_ok=True)
    store = root / builder.key()
    with FileLock(store.with_suffix('.lock')):
        if FeatureStore.is_complete(store):
            logger.info('vision cache: %d images from %s', len(builder.images), store)
        else:
            shutil.rmtree(store, ignore_errors=True)
            write_features(store, builder.entries(root, workers=workers))
    for member in datasets:
        member.features = FeatureStore(store, root=member.image_folder)


class _Images(Dataset):
    """The unique images of some data sets; an item is the pixels of one and why they are blank, if they are."""

    def __init__(self, datasets: Sequence[SupervisedDataset]) -> None:
        self.processor = datasets[0].processor
        self.owners: dict[str, tuple[ImageRef, ImageSize, SupervisedDataset]] = {}
        for dataset in datasets:
            for sample in dataset.samples:
                for ref, size in zip(sample.images, sample.image_sizes, strict=True):
                    self.owners.setdefault(image_name(ref, root=dataset.image_folder), (ref, size, dataset))
        self.names = list(self.owners)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, str | None]:
        ref, size, dataset = self.owners[self.names[index]]
        reason = None
        try:
            image = load_image(ref, root=dataset.image_folder)
            if (image.height, image.width) != size:
                raise DataError(f'image {ref} was changed since the run started', kind='broken_image')
        except DataError as error:
            if dataset.on_bad_sample == 'error':
                raise
            image, reason = Image.new('RGB', (size.width, size.height)), str(error)
        return self.processor.image_inputs([image])['pixel_values'], reason


class _Builder:
    """The features of all images, and what they depend on."""

    def __init__(self, model: SupervisedFinetune, datasets: Sequence[SupervisedDataset]) -> None:
        self.model, self.images = model, _Images(datasets)

    def key(self) -> str:
        """A digest of everything the features depend on."""
        digest = hashlib.sha256()
        for name, (ref, _, dataset) in sorted(self.images.owners.items()):
            status = None if ref.path is None else resolve_image_path(ref, dataset.image_folder).stat()
            digest.update(f'{name} {status and (status.st_size, status.st_mtime_ns)}\n'.encode('utf-8', 'replace'))
        digest.update(json.dumps(self._settings(), default=str).encode())
        for path in self.model.family.vision_encoder:
            for name, tensor in sorted(self.model.model.get_submodule(path).state_dict().items()):
                digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}'.encode())
                digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:32]

    def _settings(self) -> list[Any]:
        config = self.model.model.config
        names = ('vision_feature_layer', 'vision_feature_select_strategy', 'downsample_ratio')
        read = {name: getattr(config, name, None) for name in names}
        pixels = self.images.processor.image_processor.to_json_string()
        return [_FORMAT, read, self.model.dtype, config.vision_config._attn_implementation, pixels]

    def entries(self, root: Path, *, workers: int) -> Iterator[Entry]:
        """The features of every image, in batches; what the disk has to hold is said before the first is written."""
        device = find_device()
        for path in (*self.model.family.vision_encoder, *self.model.family.projector):
            self.model.model.get_submodule(path).to(device)
        progress = Progress('vision cache: images encoded', total=len(self.images))
        batches = DataLoader(
            self.images,
            batch_size=_BATCH,
            collate_fn=list,
            num_workers=workers,
            generator=torch.Generator(),  # its own: iterating must not draw from the global one
        )
        for batch in batches:
            with in_evaluation(self.model):
                names = self.images.names[progress.done : progress.done + len(batch)]
                made = list(self._encode(names, batch, device))
            if not progress.done:
                self._announce(made, root)
            yield from made
            progress.add(len(batch))

    def _encode(
        self, names: Sequence[str], batch: Sequence[tuple[Tensor, str | None]], device: torch.device
    ) -> Iterator[Entry]:
        pixels = torch.cat([tensor for tensor, _ in batch])
        with torch.autocast(device.type, dtype=self.model.dtype, enabled=self.model.dtype != torch.float32):
            features = torch.cat(
                [
                    encode_images(self.model.model, {'pixel_values': some.to(device)}, family=self.model.family).cpu()
                    for some in pixels.split(_BATCH)
                ]
            )
        parts = features.split([len(tensor) for tensor, _ in batch])
        for name, part, (_, reason) in zip(names, parts, batch, strict=True):
            yield Entry(name, part, reason)

    def _announce(self, made: Sequence[Entry], root: Path) -> None:
        measured = sum(entry.features.nbytes for entry in made)
        need, free = measured * len(self.images) / len(made), shutil.disk_usage(root).free
        text = f'{need / 2**30:.2f} GiB for {len(self.images)} images in {root}, where {free / 2**30:.2f} GiB are free'
        if need > free:
            raise ConfigError(f'vision_cache: needs {text}; name another folder, or remove vision_cache')
        logger.info('vision cache: building; it takes about %s', text)
