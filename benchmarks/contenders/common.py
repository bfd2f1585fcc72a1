"""What the contenders share: settings that are equal for all, memory, and the line of JSON they answer with."""

import json
import resource
from pathlib import Path

THREADS = 2
LEARNING_RATE = 1e-4  # constant
MAX_NORM = 1.0


def resident_mib() -> float:
    """Resident memory of this process now."""
    status = Path('/proc/self/status').read_text()
    return int(next(line for line in status.splitlines() if line.startswith('VmRSS')).split()[1]) / 1024


def answer(
    *, baseline_mib: float, step_seconds: float, total_seconds: float, steps: int, samples: int, **facts: int
) -> None:
    """Print the result: seconds in steps alone, seconds end to end, peak memory above the imports; and other facts."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - baseline_mib
    print(
        json.dumps(dict(step=step_seconds, total=total_seconds, steps=steps, samples=samples, peak_mib=peak, **facts))
    )
