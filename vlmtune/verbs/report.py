"""``vlmtune report``."""

import argparse
from typing import Any

from vlmtune.verbs.options import add_verb, given, positive


def add_to(verbs: Any) -> None:
    """The verb of this file."""
    verb = add_verb(verbs, 'report', run_report, 'write a page about one or several runs')
    verb.add_argument('work_dirs', nargs='+', metavar='WORK_DIR', help='of a run; several are compared')
    verb.add_argument('--out', metavar='PAGE', help='the HTML page (report.html in the first work dir)')
    verb.add_argument('--png', metavar='FILE', help='a plain plot of the loss; without --out in place of the page')
    verb.add_argument(
        '-n', '--count', type=positive, default=100, metavar='N', help='how many test answers are shown (100)'
    )


def run_report(arguments: argparse.Namespace) -> None:
    from vlmtune.apps.report import report

    report(arguments.work_dirs, **given(arguments, 'work_dirs'))
