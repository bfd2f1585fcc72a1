"""The whole job, as a user does it: data, training, a kill, a resume, conversion, merge, a chat, and the numbers.

    python quickstart/run.py [--work-dir DIR]

Every step is a command that this script prints before running it. Takes about a minute on 2 quiet CPU cores.
"""

import argparse
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from evaluate import accuracy

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RECIPE = 'quickstart_lora'
BASE = 'quickstart/base'
HELD_OUT = 'quickstart/data/describe_held_out.jsonl'
KILL_AFTER = 'iter_100.pth'
STEPS = 300
PICTURE = 'quickstart/data/images/test/2.png'


class QuickstartError(Exception):
    """A step did not do what it should."""


def say(text: str) -> None:
    """A line of the story, set apart from the output of the commands."""
    print(f'\n=== {text}', flush=True)


def shown(command: list[str]) -> list[str]:
    """Print a command as a user would type it, and return it as this interpreter runs it."""
    print(f'$ {shlex.join(command)}', flush=True)
    prefix = {'vlmtune': [sys.executable, '-m', 'vlmtune'], 'python': [sys.executable]}
    return [*prefix[command[0]], *command[1:]]


def run(*command: str) -> None:
    """Run a command to its end.

    Raises:
        QuickstartError: it failed.
    """
    code = subprocess.run(shown(list(command)), cwd=ROOT, check=False).returncode
    if code:
        raise QuickstartError(f'{shlex.join(command)} ended with code {code}')


def run_and_kill(*command: str, when: Path, timeout: float = 600) -> None:
    """Run a command and kill it, hard, as soon as ``when`` exists.

    Raises:
        QuickstartError: it ended by itself, or ``when`` did not appear in ``timeout`` seconds.
    """
    process = subprocess.Popen(shown(list(command)), cwd=ROOT)
    deadline = time.monotonic() + timeout
    while not when.exists():
        if process.poll() is not None:
            raise QuickstartError(f'{shlex.join(command)} ended with code {process.returncode} before {when.name}')
        if time.monotonic() > deadline:
            process.kill()
            raise QuickstartError(f'{when} did not appear in {timeout:.0f} s')
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    print(f'(killed with SIGKILL after {when.name})', flush=True)


def main() -> None:
    """Run all steps; the last two lines are the accuracies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--work-dir', type=Path, default=ROOT / 'work_dirs' / RECIPE, help='emptied first')
    work_dir: Path = parser.parse_args().work_dir.resolve()
    adapter, merged = str(work_dir / 'adapter'), str(work_dir / 'merged')
    started = time.monotonic()
    shutil.rmtree(work_dir, ignore_errors=True)

    say('data: real pictures and questions from the package easy-vqa')
    run('python', 'quickstart/prepare_data.py')
    say('check the data before training')
    run('vlmtune', 'train', RECIPE, '--work-dir', str(work_dir), '--dry-run')
    say('fine-tune with LoRA; pull the plug on the way')
    run_and_kill('vlmtune', 'train', RECIPE, '--work-dir', str(work_dir), when=work_dir / KILL_AFTER)
    say('resume where it stopped')
    run('vlmtune', 'train', RECIPE, '--work-dir', str(work_dir), '--resume')
    say('checkpoint -> PEFT adapter')
    run('vlmtune', 'convert', 'pth_to_hf', RECIPE, str(work_dir / f'iter_{STEPS}.pth'), adapter)
    say('base + adapter -> one model that plain transformers loads')
    run('vlmtune', 'convert', 'merge', BASE, adapter, merged)
    say('chat about a picture it has never seen')
    run('vlmtune', 'chat', merged, '--image', PICTURE, '--prompt', 'Describe the picture.')
    say(f'held-out pictures: exact match of the sentences in {HELD_OUT}')
    before, after = accuracy(str(HERE / 'base'), str(ROOT / HELD_OUT)), accuracy(merged, str(ROOT / HELD_OUT))
    shuffled = accuracy(merged, str(ROOT / HELD_OUT), shuffled=True)
    print(f'{time.monotonic() - started:.0f} s in all')
    print(f'held-out accuracy after, images shuffled among the questions: {shuffled:.3f}')
    print(f'held-out accuracy before: {before:.3f}')
    print(f'held-out accuracy after: {after:.3f}')


if __name__ == '__main__':
    try:
        main()
    except QuickstartError as error:
        sys.exit(f'error: {error}')
