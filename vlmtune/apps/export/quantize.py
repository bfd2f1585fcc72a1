"""``vlmtune convert quantize``: a model whose language model has 4-bit weights, in the files of AWQ or GPTQ."""

import logging
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from vlmtune.apps.export.options import base_dtype
from vlmtune.apps.export.output_folder import check_output, new_folder
from vlmtune.apps.export.processor_files import overlay_processor_files
from vlmtune.config import load_config
from vlmtune.data import Processor
from vlmtune.evaluation.questions import open_questions
from vlmtune.families import find_family
from vlmtune.layouts import find_layout, read_config
from vlmtune.models import load_model
from vlmtune.utils.errors import ConfigError, ModelError, one_line
from vlmtune.utils.extras import need
from vlmtune.utils.guarded_copy import copy_present
from vlmtune.utils.json_files import read_object
from vlmtune.utils.pretrained import FAILURES

logger = logging.getLogger(__name__)

Method: TypeAlias = Literal['awq', 'gptq']
_FORMATS = {'awq': 'auto_awq', 'gptq': 'auto_gptq'}
_LEAST = 64  # tokens of text, for tuning to make sense
_STEPS = 200  # per layer, where there are rows to tune the rounding on
_CARD = """

## Quantised

The linear layers of the language model have {bits} bits, in groups of {group_size}, in the format of {method}; vision
encoder, projector, embeddings and head are those of the model above. {how}
"""


def quantize(
    model: str,
    output: str,
    *,
    method: Method,
    data: str | None = None,
    samples: int = 128,
    max_length: int = 2048,
    group_size: int = 128,
) -> None:
    """Write a model with 4-bit weights for serving.

    AutoRound rounds the weights: tuned on texts of the training data (https://arxiv.org/abs/2309.05516), or to the
    nearest value where no data are named.

    Args:
        model: folder of a merged or full model in the layout of transformers.
        output: a folder that does not exist or is empty.
        method: whose files to write. AWQ's have a zero point per group, GPTQ's are symmetric.
        data: config with a ``train_dataloader`` whose rows tune the rounding; their images are left out.
        samples: rows of those.
        max_length: tokens of a block; rows are joined.
        group_size: weights that share a scale; has to divide the width of every layer.

    Raises:
        UserError: anything that the user can mend; nothing is written then.
    """
    target = check_output(output)
    config = read_config(model)
    family = find_family(config.model_type)
    if family.model is not None or find_layout(model) is not None:
        raise ModelError(
            f'--method {method}: {model} is a {family.model_type} in a layout that transformers does not read; write '
            'it by --format hf first, where its family has that'
        )
    if getattr(config, 'quantization_config', None):
        raise ModelError(f'--method {method}: {model} is quantised already; name the model that it was made from')
    rounding = need('auto_round', extra='quantize', what='convert quantize')
    processor = Processor(model)
    loaded, _ = load_model(model, dtype=base_dtype(config))
    _check_groups(loaded, family.llm, group_size=group_size)
    texts = _texts(data, processor, samples=samples, max_length=max_length)
    settings: dict[str, Any] = dict(
        scheme='W4A16', group_size=group_size, sym=method == 'gptq', iters=_STEPS if texts else 0,
        dataset=texts or [torch.arange(32)[None] % config.get_text_config().vocab_size], nsamples=max(1, len(texts)),
        seqlen=texts[0].shape[1] if texts else 32, batch_size=1,
        device_map='cuda' if torch.cuda.is_available() else 'cpu', enable_torch_compile=False,
    )  # fmt: skip
    if family.has_vision:  # it asks for something to save beside the weights; the files of the model replace that
        settings |= dict(processor=processor.tokenizer)
    with new_folder(target) as staging, tempfile.TemporaryDirectory(dir=staging) as inner:
        try:
            rounding.AutoRound(loaded, processor.tokenizer, **settings).quantize_and_save(
                inner, format=_FORMATS[method]
            )
        except FAILURES as error:
            raise ModelError(f'--method {method}: {model} cannot be quantised: {one_line(str(error))}') from error
        (config_file,) = Path(inner).rglob('config.json')
        for file in config_file.parent.iterdir():
            shutil.move(file, staging / file.name)
        _add_files(Path(model).expanduser(), staging, method=method, group_size=group_size, texts=texts)
    logger.info('wrote the quantised model to %s', target)


def _check_groups(model: Any, paths: tuple[str, ...], *, group_size: int) -> None:
    for name, module in model.get_submodule(paths[0]).named_modules():
        width = getattr(module, 'in_features', group_size)
        if width % group_size:
            raise ConfigError(f'--group-size {group_size} does not divide {width}, the width of {paths[0]}.{name}')


def _texts(data: str | None, processor: Processor, *, samples: int, max_length: int) -> list[Tensor]:
    """Questions and answers of a data set as blocks, without the tokens of images.

    Raises:
        ConfigError: they are hardly any text.
    """
    if data is None:
        return []
    cfg = load_config(data)
    texts = []
    stored = cfg.get('plan_cache_dir')
    for question in open_questions(cfg.train_dataloader.dataset, processor, limit=samples, cache_dir=stored):
        answer = processor.tokenizer(question.references[0] if question.references else '', add_special_tokens=False)
        ids = torch.cat(
            [torch.as_tensor(question.prompt.input_ids), torch.tensor(answer['input_ids'], dtype=torch.long)]
        )
        texts.append(ids[ids != processor.image_token_id] if processor.family.has_vision else ids)
    if (count := sum(map(len, texts))) < min(_LEAST, max_length):
        raise ConfigError(f'--data {data}: {len(texts)} rows have {count} tokens of text, expected {_LEAST} at least')
    return blocks(texts, length=max_length)


def blocks(texts: Sequence[Tensor], *, length: int) -> list[Tensor]:
    """Texts one after another, cut into parts of one length: AutoRound cuts all to the shortest, and that may be short.

    Args:
        texts: each long[L].
        length: of a block; where all texts together are shorter, there is one block of that.

    Returns:
        Each long[1, length]; what is over is left out.
    """
    joined = torch.cat(list(texts))
    length = min(length, len(joined))
    return list(joined[: len(joined) // length * length].view(-1, 1, length))


def _add_files(source: Path, folder: Path, *, method: str, group_size: int, texts: Sequence[Tensor]) -> None:
    """Processor files, generation config and card of the model, the last with a word on its bits."""
    overlay_processor_files(source, folder)
    copy_present(('generation_config.json', 'README.md'), source=source, target=folder)
    how = (
        f'AutoRound tuned the rounding on {len(texts)} blocks of {texts[0].shape[1]} tokens of the training data.'
        if texts
        else 'Rounded to the nearest value.'
    )
    bits = read_object(folder / 'config.json')['quantization_config']['bits']
    with (folder / 'README.md').open('a', encoding='utf-8') as file:
        file.write(_CARD.format(bits=bits, group_size=group_size, method=method.upper(), how=how))
