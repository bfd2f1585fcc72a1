"""How long the light commands take, as whole processes.

python benchmarks/cli_startup.py [--runs 7]
"""

import argparse
import statistics
import subprocess
import sys
import time

from machine import describe_machine

COMMANDS = (['--help'], ['train', '--help'], ['list-cfg'], ['print-cfg', 'llava_1_5_7b_lora_mix665k'])


def seconds(arguments: list[str]) -> float:
    """Wall time of one command, from start to exit."""
    started = time.perf_counter()
    subprocess.run([sys.executable, '-m', 'vlmtune', *arguments], check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--runs', type=int, default=7)
    runs = parser.parse_args().runs
    print(f'machine: {describe_machine()}; {runs} runs each after one that does not count\n')
    print('| command | fastest | median |\n|---|---|---|')
    for arguments in COMMANDS:
        seconds(arguments)
        times = [seconds(arguments) for _ in range(runs)]
        print(f'| vlmtune {" ".join(arguments)} | {min(times):.2f} s | {statistics.median(times):.2f} s |')


if __name__ == '__main__':
    main()
