"""Writes docs/models.md from the table of families, the recipes, the tests that there are, and their fixtures.

``make models``. Nothing in the tables is typed by hand: what a test is named after, is tested.
"""

import argparse
import ast
import contextlib
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from vlmtune.config import load_config
from vlmtune.families import FAMILIES, Family
from vlmtune.recipes import list_recipes
from vlmtune.utils.imports import import_name

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / 'docs' / 'models.md'
MARKS = ('<!-- {name}: written by tools/models_table.py -->\n', '<!-- end of {name} -->')

CLAIMS = {
    'loss': (
        'loss and gradients of a batch are those that transformers computes itself',
        'models/test_loss_parity.py::test_in_every_family',
        'models/test_supervised_finetune.py::test_the_loss_is_the_models_own',
    ),
    'parts': (
        'every parameter belongs to one part; what trains gets a gradient, with and without images',
        'models/test_gradients.py::test_every_trainable_weight_gets_a_gradient_from_a_batch_with_images',
        'test_families.py::test_every_parameter_belongs_to_a_part_and_no_part_is_empty',
    ),
    'LoRA': (
        'LoRA reaches every linear layer of the parts that ask for it, and no other',
        'models/test_lora.py::test_llm_lora_reaches_every_linear_layer_of_the_llm_and_nothing_else',
        'models/test_lora.py::test_every_part_that_asks_gets_lora',
    ),
    'QLoRA': (
        'quantisation reaches the linear layers of the language model, and no other',
        'models/test_quantization.py::test_only_the_linear_layers_of_the_llm',
    ),
    'packing': (
        'samples of a pack have the logits and gradients that they have alone (a family that does not pack: it is '
        'refused, and would leak)',
        'models/test_packing.py::test_packed_logits_are_those_alone_and_a_running_range_leaks',
        'models/test_packing.py::test_a_family_with_state_is_refused_and_would_leak',
    ),
    'prompt': (
        "tokens of a conversation with images are those of the family's own processor",
        'data/test_processor.py::test_tokens_are_those_of_transformers',
        'data/test_placeholders.py::test_the_expansion_is_that_of_transformers',
    ),
    'answers': (
        'generated answers start with the token that training would make likeliest, alone and in batches',
        'evaluation/test_generation.py::test_the_first_token_is_what_training_would_make_likeliest',
    ),
    'adapter': (
        'an exported adapter has the logits of the run, through PEFT',
        'apps/export/test_convert.py::test_adapter_reloads_equal_through_peft',
    ),
    'merged': (
        'a merged or fully tuned export has the logits of the run, through transformers',
        'apps/export/test_merge.py::test_merged_model_gives_the_logits_of_the_trained_one',
        'apps/export/test_convert.py::test_full_model_reloads_equal_through_auto_classes',
    ),
}
"""What is said of a family, and the tests that show it: one of them must have the family in its name."""
ORIGINAL_CLAIMS = {
    'logits': 'layouts/test_{layout}.py::test_logits',
    'prompts': 'layouts/test_{layout}.py::test_prompts',
    'names at full size': 'layouts/test_{layout}.py::test_every_weight_of',
    'bit by bit': 'layouts/test_{layout}.py::test_the_original_comes_back',
    'trained and exported': 'apps/export/test_original.py::test_every_family_comes_back',
}
"""What is said of an original layout: how the test that shows it begins; the last has the layout in its cases."""

BOXES = {'unit': 'shares of 1', 'thousand': 'thousandths', 'resized_pixel': 'pixels as resized'}


# ---- what there is


class _Collected:
    """A plugin of pytest that keeps the names of what is collected."""

    names: tuple[str, ...] = ()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.names = tuple(item.nodeid for item in session.items)


def collect_tests() -> dict[str, set[str]]:
    """{file::function: the words in the names of its cases}, of all tests that show a claim."""
    tests = [test for _, *tests in CLAIMS.values() for test in tests]
    tests += [test.format(layout=_module(dotted)) for test in ORIGINAL_CLAIMS.values() for _, dotted, _ in layouts()]
    files = sorted({f'{ROOT}/tests/{test.partition("::")[0]}' for test in tests})
    collected, told = _Collected(), io.StringIO()
    options = ['--collect-only', '-q', '-p', 'no:cacheprovider', '-p', 'no:xdist', f'--rootdir={ROOT}']
    with contextlib.redirect_stdout(told):  # here and not in a process of its own, which would import all once more
        code = pytest.main([*options, *filter(os.path.exists, files)], plugins=[collected])
    if code != pytest.ExitCode.OK:
        raise SystemExit(f'the tests cannot be collected:\n{told.getvalue()[-2000:]}')
    found: dict[str, set[str]] = {}
    for name in collected.names:
        test, _, case = name.removeprefix('tests/').partition('[')
        found.setdefault(test, set()).update(re.split(r'[-\]]', case))
    return found


def _module(dotted: str) -> str:
    """'vlmtune.layouts.points.POINTS' -> 'points'"""
    return dotted.split('.')[-2]


def recipes() -> dict[str, list[tuple[str, str]]]:
    """{family: (recipe, its pretrained model), ...}, by the table with which the recipes are tested."""
    tree = ast.parse((ROOT / 'tests' / 'test_configs.py').read_text(encoding='utf-8'))
    assigned = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    model_types = ast.literal_eval(assigned['MODEL_TYPES'])
    family_of = {model_type: family.model_type for family in FAMILIES.values() for model_type, _ in family.layouts}
    found: dict[str, list[tuple[str, str]]] = {}
    for path in list_recipes():
        source = load_config(path).model.pretrained_model_name_or_path
        source = source if isinstance(source, str) else ''  # put together from parts: the folder names the family
        model_type = next((value for start, value in model_types.items() if source.startswith(start)), path.parent.name)
        found.setdefault(family_of.get(model_type, model_type), []).append((path.stem, source.rpartition('/')[2]))
    if lost := sorted(set(found) - set(FAMILIES)):
        raise SystemExit(f'{found[lost[0]][0][0]}: no family {lost[0]!r}; mend MODEL_TYPES in tests/test_configs.py')
    return found


def read_notes(folder: Path) -> Iterator[tuple[str, dict]]:
    """(name, content) of the json files of a folder, those of a checkpoint that has a config."""
    for path in sorted(folder.glob('*.json')):
        content = json.loads(path.read_text(encoding='utf-8'))
        if isinstance(content.get('config'), dict):
            yield path.stem, content


def layouts_of(family: Family) -> dict[str, list[str]]:
    """{dotted name of a layout: the words in config.json that lead to it}."""
    found: dict[str, list[str]] = {}
    for model_type, dotted in family.layouts:
        found.setdefault(dotted, []).append(model_type)
    return found


def layouts() -> Iterator[tuple[Family, str, list[str]]]:
    """(family, dotted name of a layout of its, words in config.json) of all families."""
    return ((family, *found) for family in FAMILIES.values() for found in layouts_of(family).items())


def is_written(dotted: str) -> bool:
    """Whether an export can be written in a layout: not where its weights are gathered from several folders."""
    return import_name(dotted).open_weights is None


# ---- the tables


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [head, ['---'] * len(head), *rows]
    return ''.join(f'| {" | ".join(cells)} |\n' for cells in lines)


def abilities() -> str:
    """What each family can, from its row."""
    head = ['family', 'for example', 'loads from', 'learns', 'packs', 'image limit', 'boxes', 'exports to', 'recipes']
    found = recipes()
    return table(head, [_ability(family, found.get(family.model_type, [])) for family in FAMILIES.values()])


def _ability(family: Family, recipes: list[tuple[str, str]]) -> list[str]:
    mine = {dotted: f'`{names[0]}`' for dotted, names in layouts_of(family).items()}
    native = ['`hf`'] if family.model is None else []
    exports = [*native, *(['`original`'] if any(map(is_written, mine)) else [])]
    learns = 'all parts' if family.has_vision else 'llm, embeddings, lm_head'
    cells = [
        f'`{family.model_type}`',
        next((source for _, source in recipes if source), ''),
        ', '.join([*native, *mine.values()]) or '`hf`',
        learns,
        'yes' if family.packing else f'no: {family.no_packing_reason}',
    ]
    if family.has_vision:
        cells += [f'`{family.image_limit}`' if family.image_limit else 'fixed', BOXES[family.boxes]]
    else:
        cells += ['text only', '']
    return [*cells, ', '.join(exports) or '`hf`', ', '.join(f'`{name}`' for name, _ in recipes)]


def evidence(collected: dict[str, set[str]]) -> str:
    """Which claim is shown on a tiny model of which family."""
    rows = [
        [f'`{name}`', *('yes' if is_shown(tests, name, collected) else 'shared' for _, *tests in CLAIMS.values())]
        for name in FAMILIES
    ]
    return table(['family', *CLAIMS], rows)


def is_shown(tests: list[str], model_type: str, collected: dict[str, set[str]]) -> bool:
    """Whether one of the tests of a claim has a case named after the family; SystemExit if one does not exist."""
    if gone := [test for test in tests if test not in collected]:
        raise SystemExit(f'{gone[0]} does not exist; mend CLAIMS in {Path(__file__).name}')
    return any(model_type in collected[test] for test in tests)


def claims() -> str:
    """What the words at the head of the evidence mean."""
    rows = [[name, shown, ', '.join(f'`{test}`' for test in tests)] for name, (shown, *tests) in CLAIMS.items()]
    return table(['claim', 'what the test shows', 'in tests/'], rows)


def originals(collected: dict[str, set[str]]) -> str:
    """What is shown of the original layouts."""
    rows = [
        [f'`{names[0]}`', *('yes' if is_original_shown(start, dotted, known, collected) else '' for start in tests)]
        for family, dotted, names in layouts()
        for known in [[*names, family.model_type] if family.model else names]
        for tests in [ORIGINAL_CLAIMS.values()]
    ]
    return table(['layout', *ORIGINAL_CLAIMS], rows)


def is_original_shown(start: str, dotted: str, names: list[str], collected: dict[str, set[str]]) -> bool:
    """Whether a test begins so that belongs to the layout, by its file or its cases."""
    begins = start.format(layout=_module(dotted))
    return any(
        test.startswith(begins) and (begins != start or bool(words & set(names))) for test, words in collected.items()
    )


def sources() -> str:
    """The real checkpoints whose names are written down, and the code that logits are equal to."""
    sizes, parities = (list(read_notes(ROOT / 'tests' / folder)) for folder in ('fixtures/layouts', 'goldens'))
    rows = []
    for family, dotted, names in layouts():
        of_sizes = [name for name, note in sizes if note['config'].get('model_type') in names]
        of_sizes = of_sizes if is_written(dotted) else ['those of its parts']
        parity = [note for _, note in parities if note['config'].get('model_type') in names]
        of_parity = list(dict.fromkeys(code for note in parity for code in _code(note)))
        rows.append([f'`{names[0]}`', f'`{family.model_type}`', ', '.join(of_sizes), ', '.join(of_parity)])
    return table(['layout', 'family', 'names and shapes of', 'logits of'], rows)


def _code(note: dict) -> list[str]:
    """Repositories and commits, shortened."""
    told = note.get('code') or f'{note.get("repository")}@{note.get("commit")}'
    text = ' '.join(told) if isinstance(told, list) else str(told)
    return [f'{name}@{commit[:7]}' for name, commit in re.findall(r'([\w.-]+/[\w.-]+)@([0-9a-f]{7,40})', text)]


# ---- the page


def page(text: str) -> str:
    """The page with its tables as they ought to be."""
    collected = collect_tests()
    tables = dict(
        abilities=abilities(),
        evidence=evidence(collected),
        claims=claims(),
        originals=originals(collected),
        sources=sources(),
    )
    for name, content in tables.items():
        start, end = (mark.format(name=name) for mark in MARKS)
        before, found, rest = text.partition(start)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise SystemExit(f'{PAGE.name} has no place for {name}: {start.strip()} ... {end}')
        text = f'{before}{start}{content}{end}{after}'
    return text


def main(arguments: list[str] | None = None) -> None:
    """Write the page, or with ``--check`` compare it."""
    parser = argparse.ArgumentParser(description='Writes the tables of docs/models.md.')
    parser.add_argument(
        '--check', action='store_true', help='write nothing; fail if the page is not what it ought to be'
    )
    check, text = parser.parse_args(arguments).check, PAGE.read_text(encoding='utf-8')
    if (found := page(text)) != text and check:
        raise SystemExit(f'{PAGE.name} is not what the families, the recipes and the tests say; run `make models`')
    if not check:
        PAGE.write_text(found, encoding='utf-8')


if __name__ == '__main__':
    main()
