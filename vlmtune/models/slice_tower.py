"""MiniCPM-V 2.0's vision encoder: a SigLIP that reads images of any shape, without the last of its layers.

Letters: N views, P patches of all of them, M the most patches of a view, C = 3 channels, D pixels of a patch, E hidden
size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import SiglipVisionConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.siglip.modeling_siglip import SiglipEncoder, SiglipPreTrainedModel


class SliceEmbeddings(nn.Module):
    """Patches and where in their view they are."""

    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__()
        self.patch = int(config.patch_size)  # type: ignore[arg-type]  # one number, as image_size
        self.side = int(config.image_size) // self.patch  # type: ignore[arg-type]
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, self.patch, stride=self.patch)
        self.position_embedding = nn.Parameter(torch.zeros(1, self.side**2, config.hidden_size))

    def forward(self, pixel_values: Tensor, grids: list[tuple[int, int]]) -> Tensor:
        """Float[P, E] of float[P, C * D] and the rows and columns of every view."""
        pixels = pixel_values.to(self.patch_embedding.weight.dtype).unflatten(1, (3, self.patch, self.patch))
        positions = {grid: self._positions(*grid) for grid in dict.fromkeys(grids)}
        return self.patch_embedding(pixels).flatten(1) + torch.cat([positions[grid] for grid in grids])

    def _positions(self, rows: int, columns: int) -> Tensor:
        """float[rows * columns, E]: the learned square, scaled to a grid."""
        learned = self.position_embedding[0]
        if (rows, columns) == (self.side, self.side):
            return learned
        square = learned.float().unflatten(0, (self.side, self.side)).movedim(-1, 0)[None]
        scaled = nn.functional.interpolate(square, size=(rows, columns), mode='bicubic', antialias=True)
        return scaled[0].flatten(1).T.to(learned.dtype)


class SliceTower(SiglipPreTrainedModel):
    """Encodes all views at once: with weights in pieces, every rank has to run a layer equally often."""

    config: SiglipVisionConfig  # type: ignore[assignment]
    config_class = SiglipVisionConfig
    main_input_name = 'pixel_values'
    input_modalities = ('image',)  # type: ignore[assignment]
    _no_split_modules = ['SliceEmbeddings', 'SiglipEncoderLayer']  # noqa: RUF012  # as the base class has it

    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__(config)
        self.embeddings = SliceEmbeddings(config)
        self.encoder = SiglipEncoder(config)  # type: ignore[arg-type]
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """What reads the pixels."""
        return self.embeddings.patch_embedding

    def forward(self, pixel_values: Tensor, grids: list[tuple[int, int]], **kwargs: Any) -> BaseModelOutput:
        """Features of patches; those of smaller views are filled up at their ends.

        Args:
            pixel_values: float[P, C * D].
            grids: rows and columns of patches, of every view.
            kwargs: of transformers' attention.

        Returns:
            last_hidden_state float[N, M, E].
        """
        lengths = [rows * columns for rows, columns in grids]
        patches = self.embeddings(pixel_values, grids)
        views = nn.utils.rnn.pad_sequence(list(patches.split(lengths)), batch_first=True)
        mask = None
        if len(set(lengths)) > 1:
            mask = create_bidirectional_mask(
                config=self.config, inputs_embeds=views, attention_mask=filled(lengths, device=views.device).long()
            )
        encoded = self.encoder(inputs_embeds=views, attention_mask=mask, **kwargs)
        return BaseModelOutput(last_hidden_state=self.post_layernorm(encoded.last_hidden_state))


def filled(lengths: list[int], *, device: torch.device) -> Tensor:
    """bool[N, M]: where a view has a patch."""
    return torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]
