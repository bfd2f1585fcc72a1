"""The house: imports run down its floors, no circles, no file too long, nothing that runs code from a file."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / 'vlmtune'
MAX_LINES = 400

FLOORS = {
    '__main__': 7,
    'cli': 6.5,  # what the line may say; what the verbs do is half a floor below
    'verbs': 6,
    'chat': 5.5,  # the Python form of the verb
    'apps': 5,
    'engine': 4,
    'evaluation': 3,
    'data': 2,
    'models': 2,
    'layouts': 1.5,  # they read the table of families; data and models read them
    'families': 1,
    'ops': 1,
    # The ground floor has three steps: what knows nothing, what needs an error class, and what needs a recipe's place.
    'config': 0,
    'recipes': -1,
    'registry': -1,
    'structures': -1,
    'utils': -2,
}
LOADERS = {'torch.load', 'pickle.load', 'pickle.loads'}
NO_FLOOR = {'presets', 'testing', ''}  # '' is vlmtune/__init__.py, which has the version and nothing else


def read_package():
    """{dotted name: source} of every file of the package."""
    found = {}
    for path in sorted(PACKAGE.rglob('*.py')):
        if 'configs' in path.relative_to(PACKAGE).parts[:1]:
            continue
        parts = path.relative_to(ROOT).with_suffix('').parts
        found['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = path.read_text(encoding='utf-8')
    return found


def imports_of(source, modules, *, for_types=True):
    """The modules of the package that a file imports, anywhere in it; with or without those for type hints only."""
    tree = ast.parse(source)
    hints = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == 'TYPE_CHECKING']
    skipped = set() if for_types else {id(inner) for node in hints for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f'line {node.lineno}: relative import'
            for alias in node.names:
                inner = f'{node.module}.{alias.name}'
                if inner in modules or node.module in modules:
                    yield inner if inner in modules else node.module


def room_of(module):
    return (module.split('.') + [''])[1]


def climbs(modules):
    """Imports that do not run down."""
    for module, source in modules.items():
        room = room_of(module)
        for imported in imports_of(source, modules):
            other = room_of(imported)
            if other == room or imported == 'vlmtune' or room == 'presets':
                continue  # presets hold lazy imports: data for the config reader
            if other in NO_FLOOR:
                yield f'{module} imports {imported}, which is for tests or the config reader only'
            elif room != 'testing' and FLOORS[other] >= FLOORS[room]:
                yield f'{module} (floor {FLOORS[room]}) imports {imported} (floor {FLOORS[other]})'


def circles(modules):
    """Modules that import themselves by way of others."""
    graph = {module: set(imports_of(source, modules, for_types=False)) - {module} for module, source in modules.items()}
    while True:
        needed = set().union(*graph.values())
        ends = {module for module, needs in graph.items() if not needs or module not in needed}
        if not ends:
            return sorted(graph)
        graph = {module: needs - ends for module, needs in graph.items() if module not in ends}


def dangers(modules):
    """Code that hides failures or can run what a file contains."""
    for module, source in modules.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ExceptHandler) and node.type is None:
                yield f'{module}:{node.lineno}: bare except'
            if isinstance(node, ast.keyword) and node.arg == 'weights_only' and ast.unparse(node.value) != 'True':
                yield f'{module}:{node.value.lineno}: weights_only is not True'
            if isinstance(node, ast.Call) and ast.unparse(node.func) in LOADERS:
                given = {keyword.arg for keyword in node.keywords}
                if 'weights_only' not in given:
                    yield f'{module}:{node.lineno}: {ast.unparse(node.func)} without weights_only=True'


@pytest.fixture(scope='module')
def modules():
    return read_package()


def test_every_file_was_found_and_every_room_has_a_floor(modules):
    assert len(modules) >= 60
    rooms = {room_of(module) for module in modules}
    assert rooms - NO_FLOOR <= set(FLOORS)
    assert {'cli', 'apps', 'engine', 'data', 'models', 'families', 'ops', 'config', 'utils', 'structures'} <= rooms


def test_imports_run_down(modules):
    assert list(climbs(modules)) == []


def test_no_circles(modules):
    assert circles(modules) == []


def test_nothing_dangerous(modules):
    assert list(dangers(modules)) == []


def test_files_are_short(modules):
    assert {name: lines for name, text in modules.items() if (lines := text.count('\n')) >= MAX_LINES} == {}


def test_the_checks_see_what_they_are_for():
    house = {
        'vlmtune': '',
        'vlmtune.data': 'from vlmtune.data.a import x',
        'vlmtune.data.a': 'from vlmtune.data import b\nfrom vlmtune import data',
        'vlmtune.data.b': 'import vlmtune.models\ndef f():\n    from vlmtune.testing import y',
        'vlmtune.models': 'from vlmtune.utils.errors import UserError',
        'vlmtune.utils.errors': 'import vlmtune.data.b',
        'vlmtune.testing': 'import vlmtune.data',
    }
    assert list(climbs(house)) == [
        'vlmtune.data.b (floor 2) imports vlmtune.models (floor 2)',
        'vlmtune.data.b imports vlmtune.testing, which is for tests or the config reader only',
        'vlmtune.utils.errors (floor -2) imports vlmtune.data.b (floor 2)',
    ]
    assert circles(house) == [
        'vlmtune.data',
        'vlmtune.data.a',
        'vlmtune.data.b',
        'vlmtune.models',
        'vlmtune.testing',
        'vlmtune.utils.errors',
    ]
    bad = 'try:\n    torch.load(f)\nexcept:\n    torch.load(f, weights_only=False)\ntorch.load(f, weights_only=True)'
    assert sorted(dangers({'x': bad})) == [
        'x:2: torch.load without weights_only=True',
        'x:3: bare except',
        'x:4: weights_only is not True',
    ]
