"""The one table of model knowledge: where the parts of a family live and what it needs.

Pure data and dotted names: importing this file imports neither torch nor transformers. Data and models both read it.
Adding a model that transformers already has means one row here, one recipe, one test. Module paths are the names of
transformers 5 (they are not the names on disk; ``save_pretrained`` maps those back).
"""

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from vlmtune.utils.errors import ModelError
from vlmtune.utils.suggest import did_you_mean

PartName: TypeAlias = Literal['vision_encoder', 'projector', 'llm', 'embeddings', 'lm_head']
PARTS: tuple[PartName, ...] = ('vision_encoder', 'projector', 'llm', 'embeddings', 'lm_head')


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        model_type: ``config.model_type`` of the checkpoint.
        auto_class: which ``AutoModelFor...`` of transformers loads it.
        vision_encoder, projector, llm, embeddings, lm_head: paths of the part's modules, and of parameters that lie
            outside of those, seen from the whole model; the first is a module. A path inside another part's path
            belongs to the inner one (Qwen's merger lies inside ``model.visual``).
        placeholder: dotted name of the function that says what one image becomes in the token sequence.
        image_text: what the chat template writes for an image, and what the family's processor makes of that before it
            tokenises, with one image token in it. None where the template writes the image token itself.
        token_types: which tokens ``token_type_ids`` marks with 1, in families that attend by them.
        prompt_template: of ``vlmtune.data.templates``, for families whose tokenizer brings no chat template.
        words: a regular expression of added tokens that texts may use; all others are control tokens.
        closes_answers: whether the chat template ends every answer with a token, or only the last one of a talk.
        positions: 'rope' (one axis) or 'mrope' (time, height, width).
        packing: whether samples that share a row are kept apart by restarting ``position_ids``.
        no_packing_reason: why not, for the error message.
        image_inputs: the tensors that the image processor makes for this family.
        image_dim: the axis along which the images of several samples are joined.
        casts_images: image features are cast to the dtype of the model's first weight, so text embeddings must be, too.
        image_settings: what the family's processor sets on its image processor, over what its files say.
        ready_features: the form in which the base model takes what its projector made of images
            (``mm_encoder_outputs``): a list or one tensor; None where it does not, or its projector reads several.
        image_limit: the setting of the image processor that limits the tokens of an image; None: they are fixed.
        pixels: dotted name of the function that makes the image inputs faster than the image processor, equal to it.
        masks: dotted name of the function that builds attention masks where restarting positions are not enough.
        model: dotted name of the model's class, in families that transformers lacks; its ``config_class`` reads
            config.json.
        image_processor: dotted name of the image processor's class, where transformers has none.
        layouts: other ways in which checkpoints of the family lie on disk: (model type in their config.json, dotted
            name of a ``vlmtune.layouts.Layout``); where it may lack the model type, also the class that it names.
        boxes: how the family writes the coordinates of a box: as shares of 1, as shares of 1000, or as pixels of the
            image in the size in which the model sees it.
        box_text: how the four numbers are set, left, top, right, bottom (``data/boxes.py`` names the sources).
    """

    model_type: str
    auto_class: Literal['image_text_to_text', 'causal_lm']
    llm: tuple[str, ...]
    embeddings: tuple[str, ...]
    lm_head: tuple[str, ...] = ('lm_head',)
    vision_encoder: tuple[str, ...] = ()
    projector: tuple[str, ...] = ()
    placeholder: str | None = None
    image_text: tuple[str, str] | None = None
    token_types: Literal['image', 'answer'] | None = None
    prompt_template: str | None = None
    words: str | None = None
    closes_answers: bool = True
    positions: Literal['rope', 'mrope'] = 'rope'
    packing: bool = True
    no_packing_reason: str = ''
    image_inputs: tuple[str, ...] = ()
    image_dim: int = 0
    casts_images: bool = False
    image_settings: tuple[tuple[str, Any], ...] = ()
    ready_features: Literal['list', 'tensor'] | None = None
    image_limit: Literal['max_pixels', 'max_patches', 'longest_edge', 'max_slice_nums'] | None = None
    pixels: str | None = None
    masks: str | None = None
    model: str | None = None
    image_processor: str | None = None
    layouts: tuple[tuple[str, str], ...] = ()
    boxes: Literal['unit', 'thousand', 'resized_pixel'] = 'thousand'
    box_text: str = '[{}, {}, {}, {}]'

    @property
    def has_vision(self) -> bool:
        """Whether the family takes images."""
        return bool(self.vision_encoder)

    def part_paths(self, part: PartName) -> tuple[str, ...]:
        """Module paths of one part; empty where the family lacks it."""
        return getattr(self, part)


def _text(model_type: str, **kwargs: Any) -> Family:
    return Family(model_type, 'causal_lm', llm=('model',), embeddings=('model.embed_tokens',), **kwargs)


def _vlm(
    model_type: str,
    *,
    vision: str,
    projector: tuple[str, ...],
    llm: tuple[str, ...] = ('model.language_model',),
    **kwargs: Any,
) -> Family:
    return Family(
        model_type,
        'image_text_to_text',
        llm=llm,
        embeddings=(f'{llm[0]}.embed_tokens',),
        vision_encoder=(vision,),
        projector=projector,
        **kwargs,
    )


def _qwen_vl(model_type: str, *, projector: tuple[str, ...] = ('model.visual.merger',), **kwargs: Any) -> Family:
    return _vlm(
        model_type,
        vision='model.visual',
        projector=projector,
        placeholder='vlmtune.data.placeholders.patch_grid',
        positions='mrope',
        image_inputs=('pixel_values', 'image_grid_thw'),
        image_limit='max_pixels',
        pixels='vlmtune.data.pixels.merged_patches',
        **kwargs,
    )


_DEEPSTACK = ('model.visual.merger', 'model.visual.deepstack_merger_list')


def _tower(model_type: str, **kwargs: Any) -> Family:
    return _vlm(model_type, vision='model.vision_tower', projector=('model.multi_modal_projector',), **kwargs)


def _tiled_tower(model_type: str, **kwargs: Any) -> Family:
    """LLaVA's successors; the vector that ends a row of patches stands among those of the text."""
    return _tower(model_type, llm=('model.language_model', 'model.image_newline'), boxes='unit', **kwargs)


def _idefics(model_type: str) -> Family:
    return _vlm(
        model_type,
        vision='model.vision_model',
        projector=('model.connector',),
        llm=('model.text_model',),
        placeholder='vlmtune.data.placeholders.rows_and_columns',
        image_inputs=('pixel_values', 'pixel_attention_mask'),
        image_dim=1,
        image_limit='longest_edge',
        casts_images=True,
    )


_ROWS = (
    # text only: full causal attention, so restarting positions isolate
    _text('llama', layouts=(('internlm2', 'vlmtune.layouts.internlm2.INTERNLM2'),)),
    *(_text(name) for name in 'qwen2 qwen3 mistral gemma gemma3_text granite olmo2 phi3 smollm3'.split()),
    # what looks like attention is a state that goes on from token to token: no positions restart it
    *(
        _text(name, packing=False, no_packing_reason=f'its {layers} carry state from sample to sample')
        for name, layers in (
            ('qwen3_5_text', 'linear-attention layers'),
            ('qwen3_next', 'linear-attention layers'),
            ('granitemoehybrid', 'Mamba layers'),
            ('lfm2', 'convolutions'),
        )
    ),
    _qwen_vl(
        'qwen3_5',
        packing=False,
        no_packing_reason='its linear-attention layers carry state from sample to sample',
    ),
    _qwen_vl('qwen2_vl', box_text='({},{}),({},{})'),
    _qwen_vl('qwen2_5_vl', boxes='resized_pixel'),
    _qwen_vl('qwen3_vl', projector=_DEEPSTACK),
    _qwen_vl('qwen3_vl_moe', projector=_DEEPSTACK),
    _tower(
        'llava',
        placeholder='vlmtune.data.placeholders.fixed_grid',
        image_inputs=('pixel_values',),
        pixels='vlmtune.data.pixels.one_crop',
        ready_features='list',
        boxes='unit',
        layouts=(('llava_parts', 'vlmtune.layouts.llava_parts.LLAVA_PARTS'),),
    ),
    _tower(
        'internvl',
        placeholder='vlmtune.data.placeholders.tiles',
        image_inputs=('pixel_values',),
        image_settings=(('crop_to_patches', True),),
        image_limit='max_patches',
        pixels='vlmtune.data.pixels.tiles_and_thumbnail',
        ready_features='tensor',
        box_text='[[{}, {}, {}, {}]]',
        layouts=(('internvl_chat', 'vlmtune.layouts.internvl_chat.INTERNVL_CHAT'),),
    ),
    _tower(
        'points',
        placeholder='vlmtune.data.placeholders.patch_grid',
        prompt_template='points',
        image_inputs=('pixel_values', 'image_grid_thw'),
        image_limit='max_pixels',
        pixels='vlmtune.data.pixels.merged_patches',
        model='vlmtune.models.points.PointsForGeneration',
        layouts=(
            ('pointsv1.5_chat', 'vlmtune.layouts.points.POINTS'),
            ('POINTSV15ChatModel', 'vlmtune.layouts.points.POINTS'),
        ),
    ),
    _tower(
        'minicpmv2',
        placeholder='vlmtune.data.slices.slice_marks',
        closes_answers=False,
        image_inputs=('pixel_values', 'patch_grids'),
        image_limit='max_slice_nums',
        pixels='vlmtune.data.slices.sliced_patches',
        model='vlmtune.models.minicpmv.MiniCPMVForGeneration',
        image_processor='vlmtune.data.slices.SliceImageProcessor',
        layouts=(('minicpmv', 'vlmtune.layouts.minicpmv.MINICPMV'),),
    ),
    _idefics('smolvlm'),
    _idefics('idefics3'),
    _tiled_tower(
        'llava_next',
        placeholder='vlmtune.data.placeholders.tiles_and_newlines',
        image_inputs=('pixel_values', 'image_sizes'),
    ),
    _tiled_tower(
        'llava_onevision',
        placeholder='vlmtune.data.placeholders.tiles_of_one_image',
        image_inputs=('pixel_values', 'image_sizes', 'batch_num_images'),
    ),
    _tower(
        'gemma3',
        placeholder='vlmtune.data.placeholders.fixed_length',
        image_text=('<start_of_image>', '\n\n<start_of_image><image_soft_token><end_of_image>\n\n'),
        token_types='image',
        image_inputs=('pixel_values',),
        image_settings=(('do_convert_rgb', True), ('do_pan_and_scan', False)),
        masks='vlmtune.ops.masks.two_way_images',
    ),
    _tower(
        'paligemma',
        placeholder='vlmtune.data.placeholders.fixed_length',
        token_types='answer',
        prompt_template='paligemma',
        words=r'<loc\d{4}>|<seg\d{3}>',
        image_inputs=('pixel_values',),
        image_settings=(('do_convert_rgb', True),),
        masks='vlmtune.ops.masks.two_way_prompts',
    ),
)

FAMILIES: dict[str, Family] = {row.model_type: row for row in _ROWS}

LAYOUTS: dict[str, str] = dict(layout for row in _ROWS for layout in row.layouts)
"""{model type in config.json: dotted name of the layout}, of checkpoints that do not lie as their family does."""


def find_family(model_type: str) -> Family:
    """The row of ``model_type``.

    Raises:
        ModelError: there is no such row; the nearest one is named.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    known = sorted({*FAMILIES, *LAYOUTS}, key=str.lower)
    raise ModelError(
        f'model type {model_type!r} is not supported{did_you_mean(model_type, known)}; supported are '
        f'{", ".join(known)} (CONTRIBUTING.md says how to add a family)'
    )
