"""MiniCPM-V 2.0: a vision encoder for images of any shape, a resampler, and MiniCPM-2B, which is a Granite.

The Granite of the config multiplies no embeddings: MiniCPM does that to text alone, before image features take their
places. Sources: github.com/OpenBMB/MiniCPM-V, https://arxiv.org/abs/2408.01800.

Letters: B rows, L tokens, H hidden size, N views, P patches of all of them, C = 3 channels, D pixels of a patch,
F image features.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GraniteConfig, PreTrainedConfig, SiglipVisionConfig
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast

from vlmtune.models.image_text import ImageTextForGeneration, ImageTextModel
from vlmtune.models.resampler import Resampler, grid_positions
from vlmtune.models.slice_tower import SliceTower, filled


class MiniCPMVConfig(PreTrainedConfig):
    """Sizes of all parts.

    Attributes:
        query_num: features of a view.
        scale_emb: what embeddings of text are multiplied by.
        max_slice_nums, scale_resolution, patch_size: how images are cut, see ``SliceImageProcessor``.
    """

    model_type = 'minicpmv2'
    sub_configs_defaults: ClassVar[dict[str, Any]] = {'text_config': GraniteConfig, 'vision_config': SiglipVisionConfig}

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    image_token_id: int = 0
    query_num: int = 64
    scale_emb: float | int = 12
    max_slice_nums: int = 9
    scale_resolution: int = 448
    patch_size: int = 14
    tie_word_embeddings: bool = False


class MiniCPMVModel(ImageTextModel):
    """Everything but the head."""

    config_class = MiniCPMVConfig
    config: MiniCPMVConfig
    image_inputs = ('pixel_values', 'patch_grids')
    _no_split_modules = ['GraniteDecoderLayer', 'SiglipEncoderLayer']  # noqa: RUF012  # as the base class has it

    def __init__(self, config: MiniCPMVConfig) -> None:
        super().__init__(config)
        text: Any = config.text_config
        vision: Any = config.vision_config
        self.vision_tower = SliceTower(vision)
        self.multi_modal_projector = Resampler(
            queries=config.query_num, features=vision.hidden_size, size=text.hidden_size
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Resampler):
            queries, size = module.query.shape
            side = math.isqrt(queries)
            init.trunc_normal_(module.query, std=0.02)
            init.normal_(module.proj, std=size**-0.5)
            init.copy_(module.pos_embed, grid_positions(side, side, size=size, like=module.pos_embed))

    def embed_text(self, input_ids: Tensor) -> Tensor:
        """float[B, L, H] of long[B, L]."""
        return super().embed_text(input_ids) * self.config.scale_emb

    def get_image_features(self, pixel_values: Tensor, patch_grids: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """What the language model reads in place of image tokens.

        Args:
            pixel_values: float[P, C * D].
            patch_grids: long[N, 2], rows and columns of patches.
            kwargs: nothing that is used here.

        Returns:
            float[F, H], as many for every view as there are queries.
        """
        grids = [(int(rows), int(columns)) for rows, columns in patch_grids.tolist()]
        patches = self.vision_tower(pixel_values, grids).last_hidden_state
        lengths = [rows * columns for rows, columns in grids]
        mask = filled(lengths, device=patches.device) if len(set(lengths)) > 1 else None
        return self.multi_modal_projector(patches, grids, mask).flatten(0, 1)


class MiniCPMVForGeneration(ImageTextForGeneration):
    """MiniCPM-V 2.0."""

    config_class = MiniCPMVConfig
    model_class = MiniCPMVModel
    _no_split_modules = ['GraniteDecoderLayer', 'SiglipEncoderLayer']  # noqa: RUF012  # as the base class has it

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        patch_grids: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As that of the base class, with ``patch_grids``."""
        kwargs |= dict(attention_mask=attention_mask, position_ids=position_ids)
        return super().forward(input_ids, pixel_values=pixel_values, patch_grids=patch_grids, **kwargs)
