"""``vlmtune check-data``: what is wrong with the training data, and what it costs."""

import json
import logging
from collections.abc import Mapping
from typing import Any

from mmengine.config import Config

from vlmtune.apps.data.check_report import CheckReport, as_dict, as_text
from vlmtune.apps.data.file_checks import check_files
from vlmtune.apps.data.held_out import check_held_out
from vlmtune.apps.data.token_checks import add_token_problems, measure_tokens
from vlmtune.apps.data.train_data import (
    DataPart,
    build_dataset,
    build_processor,
    members_of,
    open_parts,
    read_data_config,
)
from vlmtune.utils.errors import UserError

logger = logging.getLogger(__name__)


def check_data(
    config: str, *, overrides: Mapping[str, Any] | None = None, as_json: bool = False, decode: bool = False
) -> int:
    """Check every row and every image of a config's training data, and open its held-out rows; prints a report.

    Files are checked without model or tokenizer. Tokens are counted where those can be loaded. Nothing is written but
    the plan cache that the config names, which a run then finds.

    Args:
        config: path of a config or name of a built-in recipe.
        overrides: ``--cfg-options``.
        as_json: print one JSON document instead of tables.
        decode: decode every pixel, not only where a file looks cut off.

    Returns:
        1 where the data has errors; 0 where it has none, or only warnings.

    Raises:
        UserError: the config is wrong, or a data file or image folder is not there at all.
    """
    cfg = read_data_config(config, overrides=overrides)
    parts = open_parts(cfg)
    data_sets = [
        check_files(
            part.rows,
            part.map_row,
            image_folder=part.image_folder,
            decode=decode,
            workers=part.settings.get('planning_workers'),
        )
        for part in parts
    ]
    report = CheckReport(config, data_sets)
    failed = next((p for data_set in data_sets for p in data_set.by_kind().get('failed_function', [])), None)
    if failed is None:
        _check_tokens(cfg, parts, report)
    else:
        report.stops = (
            f'dataset_map_fn fails at {failed.where} with {failed.reason}; where a row is wrong, raise DataError'
        )
    print(json.dumps(as_dict(report), ensure_ascii=False) if as_json else as_text(report))
    return 1 if report.has_errors else 0


def _check_tokens(cfg: Config, parts: list[DataPart], report: CheckReport) -> None:
    try:
        processor = build_processor(cfg)
    except UserError as error:
        report.tokens_not_run = str(error)
        return
    try:
        dataset = build_dataset(cfg, parts, processor)
        add_token_problems(parts, members_of(dataset), report.data_sets)
        report.tokens = measure_tokens(cfg, parts, dataset, processor=processor)
    except UserError as error:
        report.stops = str(error)
    report.held_out = check_held_out(cfg, processor=processor)
