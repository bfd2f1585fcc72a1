"""POINTS-1.5 and POINTS-Reader: the vision encoder of Qwen2-VL, a projector of its own, and a Qwen2.

Every image goes through the encoder at its own size (NaViT, https://arxiv.org/abs/2307.06304); the projector joins four
neighbouring patches. Positions of the language model count tokens, they are not those of Qwen2-VL. The report is
https://arxiv.org/abs/2412.08443, the code whose results these classes repeat github.com/WePOINTS/WePOINTS.

Letters: P patches of all images, D values of a patch, I images, F = P / 4 image features, H hidden size.
"""

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedConfig, Qwen2Config
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger, Qwen2VisionTransformerPretrainedModel

from vlmtune.models.image_text import ImageTextForGeneration, ImageTextModel


class PointsConfig(PreTrainedConfig):
    """Sizes of a POINTS-1.5.

    Attributes:
        text_config: of the Qwen2.
        vision_config: of the encoder; its ``hidden_size``, the width of Qwen2-VL's own merger, means nothing here.
        image_token_id: the token whose places the features take.
    """

    model_type = 'points'
    sub_configs_defaults: ClassVar[dict[str, Any]] = {'text_config': Qwen2Config, 'vision_config': Qwen2VLVisionConfig}

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    image_token_id: int | None = None
    tie_word_embeddings: bool = False


class PointsModel(ImageTextModel):
    """Without the head."""

    config_class = PointsConfig
    image_inputs = ('pixel_values', 'image_grid_thw')

    def __init__(self, config: PointsConfig) -> None:
        super().__init__(config)
        vision: Any = config.vision_config
        self.vision_tower = Qwen2VisionTransformerPretrainedModel._from_config(vision)
        self.vision_tower.merger = nn.Identity()  # Qwen2-VL's projector; that of POINTS stands outside
        self.multi_modal_projector = PatchMerger(
            dim=config.get_text_config().hidden_size,
            context_dim=vision.embed_dim,
            spatial_merge_size=vision.spatial_merge_size,
        )
        self.post_init()

    def get_image_features(self, *, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:  # type: ignore[override]
        """What the language model reads in place of image tokens.

        Args:
            pixel_values: float[P, D], those of an image side by side.
            image_grid_thw: long[I, 3], frames (1), rows and columns of patches.

        Returns:
            float[F, H].
        """
        pixel_values = pixel_values.to(self.vision_tower.get_dtype())
        patches = self.vision_tower(pixel_values, grid_thw=image_grid_thw).last_hidden_state
        return self.multi_modal_projector(patches)


class PointsForGeneration(ImageTextForGeneration):
    """With the head."""

    config_class = PointsConfig
    model_class = PointsModel

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As that of the base class, with ``image_grid_thw``."""
        images: dict[str, Any] = dict(pixel_values=pixel_values, image_grid_thw=image_grid_thw)
        return super().forward(input_ids, attention_mask=attention_mask, position_ids=position_ids, **images, **kwargs)
