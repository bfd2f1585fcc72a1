"""Loaded samples -> one batch of tensors.

Letters: B rows, L tokens, P as the family's image processor makes it.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlmtune.families import Family
from vlmtune.structures import IGNORE_INDEX
from vlmtune.utils.errors import ConfigError

LoadedSample = dict[str, Tensor]
Batch = dict[str, Tensor]


class Collator:
    """Joins samples into one row that keeps them apart, or pads them to rows of one length.

    Args:
        family: says how positions look and whether joined samples stay apart.
        pad_token_id: fills the ends of padded rows.
        pack: join (True) or pad (False).
        filler: put behind the samples of a batch without images (``filler.image_filler``); None: nothing is.

    Raises:
        ConfigError: ``pack`` is asked for, but the family cannot keep samples apart.
    """

    def __init__(self, family: Family, *, pad_token_id: int, pack: bool, filler: LoadedSample | None = None) -> None:
        if pack and not family.packing:
            raise ConfigError(
                f'pack_to_max_length: {family.model_type} cannot keep packed samples apart '
                f'({family.no_packing_reason}); set pack_to_max_length=False'
            )
        self.family, self.pad_token_id, self.pack, self.filler = family, pad_token_id, pack, filler

    def __call__(self, samples: Sequence[LoadedSample]) -> Batch:
        """One batch.

        Returns:
            input_ids long[B, L], labels long[B, L], position_ids long[B, L] or long[4, B, L], attention_mask long[B, L]
            only where rows are padded, token_type_ids long[B, L] for families that attend by them, and the family's
            image inputs. Packed: B is 1 and there is no attention_mask, because transformers finds the borders of
            samples in the positions only when there is none. Where the filler was added (packed at the end of the row,
            padded as the last row), filler_tokens, a long scalar.
        """
        added: Batch = {}
        if self.filler is not None and not any(self._has_images(sample) for sample in samples):
            samples = [*samples, self.filler]
            added = dict(filler_tokens=torch.tensor(len(self.filler['input_ids'])))
        batch = self._join(samples) if self.pack else self._pad(samples)
        return {**batch, **join_images(samples, family=self.family), **added}

    def _has_images(self, sample: LoadedSample) -> bool:
        return any(name in sample for name in _image_names(self.family))

    @staticmethod
    def _join(samples: Sequence[LoadedSample]) -> Batch:
        labels = []
        for sample in samples:
            own = sample['labels'].clone()
            own[0] = IGNORE_INDEX  # or the last token of the sample before would have to predict it
            labels.append(own)
        positions = torch.cat([sample['position_ids'] for sample in samples], dim=-1)
        types = [sample['token_type_ids'] for sample in samples if 'token_type_ids' in sample]
        return dict(
            input_ids=torch.cat([sample['input_ids'] for sample in samples])[None],
            labels=torch.cat(labels)[None],
            position_ids=positions.unsqueeze(-2),
            **({'token_type_ids': torch.cat(types)[None]} if types else {}),
        )

    def _pad(self, samples: Sequence[LoadedSample]) -> Batch:
        ids = [sample['input_ids'] for sample in samples]
        longest = max(len(i) for i in ids)
        positions = [_pad_right(sample['position_ids'], longest) for sample in samples]
        types = [_pad_right(sample['token_type_ids'], longest) for sample in samples if 'token_type_ids' in sample]
        return dict(
            input_ids=pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            labels=pad_sequence([s['labels'] for s in samples], batch_first=True, padding_value=IGNORE_INDEX),
            attention_mask=pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
            position_ids=torch.stack(positions, dim=-2),
            **({'token_type_ids': torch.stack(types)} if types else {}),
        )


def join_images(samples: Sequence[Mapping[str, Tensor]], *, family: Family) -> Batch:
    """The image inputs of several samples, one after the other; tiles of an image are filled up to the most of any."""
    joined = {}
    for name in _image_names(family):
        tensors = [sample[name] for sample in samples if name in sample]
        if tensors and name == 'pixel_values' and tensors[0].ndim == 5 and family.image_dim == 0:
            most = max(tensor.shape[1] for tensor in tensors)  # float[I, tiles, 3, H, W]
            tensors = [torch.nn.functional.pad(t, (0, 0) * 3 + (0, most - t.shape[1])) for t in tensors]
        if tensors:
            joined[name] = torch.cat(tensors, dim=family.image_dim)
    if 'pixel_bytes' in joined:  # one of them speaks for all
        joined['pixel_affine'] = next(sample['pixel_affine'] for sample in samples if 'pixel_affine' in sample)
    return joined


def _image_names(family: Family) -> tuple[str, ...]:
    """Of the image inputs; in place of pixels there may be bytes of pixels, or features from a vision cache."""
    return (*family.image_inputs, 'pixel_bytes', 'image_features')


def _pad_right(positions: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(positions, (0, length - positions.shape[-1]))
