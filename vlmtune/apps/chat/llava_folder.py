"""XTuner's LLaVA folders: what its ``pth_to_hf`` writes beside a language model and a vision encoder."""

from pathlib import Path
from typing import Any

from vlmtune.utils.errors import CheckpointError, ConfigError, ModelError
from vlmtune.utils.pretrained import find_folder


def llava_parts(
    llm: str, *, llava: str | None, visual_encoder: str | None, visual_select_layer: int = -2
) -> dict[str, Any]:
    """The parts of a LLaVA that XTuner trained, as ``pretrained_model_name_or_path`` takes them.

    XTuner pads images to squares in the mean colour, in training and in its chat.

    Args:
        llm: folder or hub id of the language model.
        llava: folder or hub id with ``projector``, and ``llm_adapter``, ``visual_encoder_adapter`` or
            ``visual_encoder`` where they were trained.
        visual_encoder: folder or hub id of the vision encoder; None where ``llava`` holds a trained one.
        visual_select_layer: the layer whose output the projector reads.

    Raises:
        ConfigError: one of ``llava`` and ``visual_encoder`` is missing, or there are two vision encoders.
        CheckpointError: there is no such folder, or it holds no projector.
    """
    if llava is None:
        raise ConfigError(
            f'--visual-encoder {visual_encoder}: expected --llava DIR beside it, the folder with the projector'
        )
    try:
        folder = find_folder(llava)
    except ModelError as error:
        raise CheckpointError(f'--llava {llava}: neither a folder nor found on the hub') from error
    if not (folder / 'projector').is_dir():
        raise CheckpointError(f'--llava {folder}: expected the folder projector in it, as XTuner writes it')
    trained = folder / 'visual_encoder'
    if trained.is_dir() and visual_encoder is not None:
        raise ConfigError(f'--visual-encoder {visual_encoder}: {folder} holds a trained visual_encoder; leave it out')
    if not trained.is_dir() and visual_encoder is None:
        raise ConfigError(
            f'--llava {folder} holds no visual_encoder; add --visual-encoder with the folder or hub id of the one '
            'it was trained with'
        )
    return dict(
        llm_name_or_path=llm,
        visual_encoder_name_or_path=visual_encoder or str(Path(trained)),
        pretrained_pth=str(folder),
        vision_feature_layer=visual_select_layer,
        pad_image_to_square=True,
    )
