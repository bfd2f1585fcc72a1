"""What a run leaves in its work dir: names of files, and what stands in them beside metrics."""

import time
from pathlib import Path

from mmengine.dist import get_rank
from mmengine.logging import MessageHub

METRICS_FILE, PARTS_FILE = 'metrics.jsonl', 'parts.json'  # in each log folder, beside the resolved config
VALIDATION_FILE, CHAT_FILE = 'validation.jsonl', 'evaluate_chat.jsonl'  # in the work dir
VALIDATION_FOLDER, TEST_FOLDER = 'validation', 'test'  # in it, too; of folders iter_N
PREDICTIONS_FILE, RESULT_FILE = 'predictions.jsonl', 'metrics.json'  # in those; the second of tests only

BAD_SAMPLES_FILE = 'bad_samples.jsonl'  # in the work dir, and in VALIDATION_FOLDER

NOT_METRICS = frozenset({'iteration', 'epoch', 'seconds', 'samples', 'rules'})  # of a line of VALIDATION_FILE


def lies_in(checkpoint: str, work_dir: Path) -> bool:
    """Whether a checkpoint, or the link to one that was moved, lies in a work dir, however both are spelled."""
    return Path(checkpoint).absolute().parent.resolve() == work_dir.resolve()


def wait_for_own_second(work_dir: Path, experiment: str) -> None:
    """Before a run is built: mmengine names its log folder, log file and scalars by the second in which it starts.

    Two starts in one second, as of a short run that is resumed by a script, would write into one folder. The first
    rank's clock is the one that counts.

    Args:
        work_dir: of the run.
        experiment: the name of the run before the time; in one process, runs of other work dirs can have the same.
    """

    def taken(second: str) -> bool:
        return (work_dir / second).exists() or MessageHub.check_instance_created(f'{experiment}_{second}')

    while get_rank() == 0 and taken(time.strftime('%Y%m%d_%H%M%S')):
        time.sleep(0.02)
