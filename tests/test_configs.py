"""Every recipe: its shape, and two training steps on a tiny model of its family through the command line."""

import ast
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from vlmtune.cli import main
from vlmtune.config import config_mistakes, dump_config, load_config
from vlmtune.engine.checkpoint import WEIGHTS_FILE, verify
from vlmtune.families import FAMILIES, Family
from vlmtune.recipes import list_recipes
from vlmtune.testing import TinyData
from vlmtune.testing.tiny_originals import TINY_ORIGINALS
from vlmtune.testing.tiny_towers import write_tiny_tower
from vlmtune.utils.adapter_folder import adapter_settings, is_adapter

ROOT = Path(__file__).resolve().parents[1]
RECIPES = {path.stem: path for path in (ROOT / 'configs').rglob('*.py')}
LEAST = 20
MAX_LINES = 130
STEPS = 2

BAR = '#' * 71
TITLES = ('Settings', 'Model & processor', 'Dataset & dataloader', 'Scheduler & optimizer', 'Runtime')
BANNERS = [f'{BAR}\n#{f"PART {number}  {title}":^69}#\n{BAR}\n' for number, title in enumerate(TITLES, start=1)]

IMAGE_LIMITS = ('max_pixels', 'max_patches', 'longest_edge', 'max_slice_nums')
ORDER = f"""
    pretrained_model_name_or_path llm_name_or_path visual_encoder_name_or_path pretrained_pth pad_image_to_square
    prompt_template new_tokens
    data_root data_path val_data_path image_folder max_length pack_to_max_length {' '.join(IMAGE_LIMITS)}
    tune lora_r lora_alpha lora_dropout quantization dtype gradient_checkpointing attn_implementation
    batch_size accumulative_counts dataloader_num_workers max_epochs max_steps
    optim_type lr betas weight_decay max_norm warmup_ratio seed
    save_steps save_total_limit evaluation_freq evaluation_inputs evaluation_images SYSTEM
    val_interval val_batch_size
""".split()
"""All settings of Part 1, in their order. A recipe leaves out those that would do nothing in it."""

OF_IMAGES = {'image_folder', 'evaluation_images'}
OF_LORA = {'lora_r', 'lora_alpha', 'lora_dropout'}
OF_VALIDATION = {'val_data_path', 'val_interval', 'val_batch_size'}
OF_PARTS = {'llm_name_or_path', 'visual_encoder_name_or_path', 'pretrained_pth', 'pad_image_to_square'}
SOME_LEAVE_OUT = {
    *'prompt_template new_tokens data_root max_epochs max_steps'.split(),
    *IMAGE_LIMITS,
    *OF_IMAGES,
    *OF_LORA,
    *OF_VALIDATION,
}

MODEL_TYPES = {
    'llava-hf/llava-1.5': 'llava',
    'llava-hf/llava-v1.6': 'llava_next',
    'llava-hf/llava-onevision': 'llava_onevision',
    'google/gemma-3': 'gemma3',
    'google/paligemma': 'paligemma',
    'quickstart/': 'llava',
    'Qwen/Qwen2-VL': 'qwen2_vl',
    'Qwen/Qwen2.5-VL': 'qwen2_5_vl',
    'Qwen/Qwen3-VL': 'qwen3_vl',
    'OpenGVLab/InternVL2-': 'internvl',
    'OpenGVLab/InternVL3': 'internvl',
    'openbmb/MiniCPM-V-2': 'minicpmv2',
    'tencent/POINTS-Reader': 'points',
    'HuggingFaceTB/SmolVLM-': 'idefics3',  # only the second version has a model type of its own
    'HuggingFaceTB/SmolVLM2': 'smolvlm',
    'internlm/internlm2': 'internlm2',
    'meta-llama/Meta-Llama-3': 'llama',
    'Qwen/Qwen2.5-': 'qwen2',
    'Qwen/Qwen3-': 'qwen3',
}
"""{how the name of the pretrained model starts: model type}; the first that fits."""


@pytest.fixture(params=sorted(RECIPES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def settings_of(name: str) -> dict[str, ast.expr]:
    """{name: right side} of everything between the first and the second banner, as it is written."""
    part = RECIPES[name].read_text(encoding='utf-8').partition(BANNERS[0])[2].partition(BANNERS[1])[0]
    statements = ast.parse(part).body
    assert all(isinstance(statement, ast.Assign) and len(statement.targets) == 1 for statement in statements)
    return {ast.unparse(statement.targets[0]): statement.value for statement in statements}  # type: ignore[attr-defined]


def model_type_of(name: str) -> str:
    source = load_config(RECIPES[name]).model.pretrained_model_name_or_path
    if not isinstance(source, str):
        return 'llava'
    return tiny_model_for(source)


def tiny_model_for(source: str) -> str:
    return next(model_type for start, model_type in MODEL_TYPES.items() if source.startswith(start))


def family_of(name: str) -> Family:
    model_type = model_type_of(name)  # of config.json, which in a layout of its own is not that of the family
    return FAMILIES[TINY_ORIGINALS[model_type].model_type if model_type in TINY_ORIGINALS else model_type]


# ---- what they look like


def test_there_are_as_many_as_the_command_lists():
    assert len(RECIPES) >= LEAST
    assert sorted(RECIPES) == [path.stem for path in list_recipes()]
    assert set(MODEL_TYPES.values()) == {model_type_of(name) for name in RECIPES}


def test_the_guide_says_what_each_is_for(name: str):
    assert f'`{name}`' in (ROOT / 'docs' / 'config.md').read_text(encoding='utf-8')


def test_it_is_short_and_has_five_parts(name: str):
    text = RECIPES[name].read_text(encoding='utf-8')
    assert len(text.splitlines()) <= MAX_LINES
    assert text.count('PART') == len(BANNERS)
    assert [text.index(banner) for banner in BANNERS] == sorted(text.index(banner) for banner in BANNERS)


def test_it_begins_with_its_command_its_hardware_and_its_reason(name: str):
    first, second, *_ = RECIPES[name].read_text(encoding='utf-8').splitlines()
    launch = re.fullmatch(rf'# vlmtune train {name}((?: --\w+ \w+)*) +\((.*(?:GB|cores).*)\)', first)
    assert launch, first
    assert re.match(r'# \w.{20,}', second), second
    gpus = re.match(r'(\d+) GPUs', launch[2])
    assert ('--nproc ' + gpus[1] in launch[1]) if gpus else not launch[1]


def test_its_settings_have_the_shared_names_and_order(name: str):
    found = list(settings_of(name))
    assert found == [setting for setting in ORDER if setting in found]
    assert set(ORDER) - set(found) - OF_PARTS - {'pretrained_model_name_or_path'} <= SOME_LEAVE_OUT
    assert OF_PARTS & set(found) == (set() if 'pretrained_model_name_or_path' in found else OF_PARTS)
    assert ('max_epochs' in found) != ('max_steps' in found)
    assert OF_IMAGES & set(found) == (OF_IMAGES if family_of(name).has_vision else set())
    assert OF_VALIDATION & set(found) in (set(), OF_VALIDATION)
    assert OF_LORA & set(found) == (OF_LORA if 'lora' in ast.unparse(settings_of(name)['tune']) else set())


def test_it_loads_without_mistakes_and_its_dump_reloads_equal(name: str, tmp_path: Path):
    cfg = load_config(name, check=config_mistakes)
    dump_config(cfg, tmp_path / 'dump.py')
    assert load_config(tmp_path / 'dump.py', check=config_mistakes).to_dict() == cfg.to_dict()


def test_no_two_tune_the_same_model_in_the_same_way():
    seen: dict[tuple[str, ...], str] = {}
    for name in sorted(RECIPES):
        cfg = load_config(RECIPES[name])
        what = (str(cfg.model.pretrained_model_name_or_path), str(cfg.tune), str(cfg.quantization))
        assert what not in seen, f'{name} and {seen[what]}'
        seen[what] = name


# ---- that they train


@pytest.fixture(scope='session')
def alpaca_with_images(tiny_data: Callable, tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """The first turns of the LLaVA rows as alpaca rows."""
    data: TinyData = tiny_data('llava', rows=4)
    rows = []
    for row in json.loads(data.data_path.read_text(encoding='utf-8')):
        instruction, output = (turn['value'] for turn in row['conversations'][:2])
        images = {} if '<image>' not in instruction else {'images': row['image']}
        rows.append({'instruction': instruction, 'output': output, **images})
    path = tmp_path_factory.mktemp('alpaca') / 'data.json'
    path.write_text(json.dumps(rows), encoding='utf-8')
    return TinyData(path, data.image_folder)


@pytest.fixture(scope='session')
def plain_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp('text') / 'data.jsonl'
    path.write_text('\n'.join(json.dumps({'text': f'The square of {n} is {n * n}.'}) for n in range(4)))
    return path


@pytest.fixture
def data(name: str, tiny_data: Callable, plain_text: Path, alpaca_with_images: TinyData) -> TinyData:
    """Four rows in the format that the recipe reads."""
    map_fn = load_config(RECIPES[name]).train_dataloader.dataset.dataset_map_fn.type
    data_format, has_vision = map_fn.__name__.removesuffix('_map_fn'), family_of(name).has_vision
    if data_format == 'text':
        return TinyData(plain_text, plain_text.parent)
    if data_format == 'alpaca' and has_vision:
        return alpaca_with_images
    return tiny_data(data_format, rows=4, images=has_vision)


def tiny_source(source: str | Mapping, tiny_model: Callable, tmp_path: Path) -> dict[str, Path | None]:
    """The settings that say where the model is, for one of the same kind that is tiny."""
    if isinstance(source, str):
        return dict(pretrained_model_name_or_path=tiny_model(tiny_model_for(source)))
    return dict(
        llm_name_or_path=tiny_model(tiny_model_for(source['llm_name_or_path'])),
        visual_encoder_name_or_path=write_tiny_tower('clip', tmp_path / 'tower'),
        pretrained_pth=None,
    )


@pytest.fixture
def tiny_options(name: str, data: TinyData, tiny_model: Callable, tmp_path: Path) -> list[str]:
    """What must differ for a tiny run: where model and data lie, and the number of steps."""
    cfg = load_config(RECIPES[name])
    options = {
        **tiny_source(cfg.model.pretrained_model_name_or_path, tiny_model, tmp_path),
        'data_path': data.data_path,
    }
    if family_of(name).has_vision:
        image = str(sorted(data.image_folder.iterdir())[0])
        options |= dict(image_folder=data.image_folder, evaluation_images=_replace_paths(cfg.evaluation_images, image))
    if 'longest_edge' in cfg:
        options |= dict(longest_edge=112)  # a tiny model's tile is 56 pixels: no hundreds of them
    if name.startswith('quickstart'):
        options |= dict(prompt_template='vicuna')  # the tiny LLaVA's own does not end an answer, the quickstart's does
    options |= dict(plan_cache_dir=tmp_path / 'plans')
    if 'val_data_path' in cfg:
        held_out = tmp_path / 'held_out.json'
        held_out.write_text(json.dumps(_rows_with_images(data.data_path)), encoding='utf-8')
        options |= {'val_data_path': held_out, 'val_evaluator.generation.max_new_tokens': 3}
    options |= {'max_steps' if 'max_steps' in cfg else 'max_epochs': STEPS}  # the tiny data makes one step an epoch
    return [f'{key}={value}' for key, value in options.items()]


def _rows_with_images(path: Path) -> list:
    """The rows that every metric can score: boxes lie on images."""
    text = path.read_text(encoding='utf-8')
    rows = [json.loads(line) for line in text.splitlines()] if path.suffix == '.jsonl' else json.loads(text)
    return [row for row in rows if {'image', 'images'} & row.keys()]


def _replace_paths(value: list | str | None, path: str) -> list | str | None:
    if isinstance(value, list):
        return [_replace_paths(item, path) for item in value]
    return None if value is None else path


def test_it_trains_two_steps_on_a_tiny_model(name: str, tiny_options: list[str], tmp_path: Path, capfd):
    code = main(['train', name, '--work-dir', str(tmp_path), '--cfg-options', *tiny_options])
    assert code == 0, capfd.readouterr().err

    verify(tmp_path / f'iter_{STEPS}.pth')
    trainer = json.loads((tmp_path / f'iter_{STEPS}.pth' / 'trainer.json').read_text(encoding='utf-8'))
    losses = trainer['messages']['train/loss']['values']
    assert len(losses) == STEPS
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)

    answers = [json.loads(line) for line in (tmp_path / 'evaluate_chat.jsonl').read_text(encoding='utf-8').splitlines()]
    questions = load_config(name).evaluation_inputs
    assert [row['input'] for row in answers if row['iteration'] == STEPS] == questions
    assert {row['iteration'] for row in answers} == {0, STEPS}
    if any(option.startswith('val_data_path=') for option in tiny_options):
        (row,) = map(json.loads, (tmp_path / 'validation.jsonl').read_text(encoding='utf-8').splitlines())
        assert row['iteration'] == STEPS
        assert {metric.type.__name__ for metric in load_config(name).val_evaluator.metrics} <= row.keys()


@pytest.mark.slow
def test_it_goes_all_the_way(name: str, tiny_options: list[str], tmp_path: Path, capfd):
    """Trained, resumed, converted, merged, chatted with."""

    def run(*command: str) -> None:
        assert main(list(command)) == 0, capfd.readouterr().err

    options = ['--cfg-options', *tiny_options, 'save_steps=1', 'save_total_limit=-1']
    work_dir, exported, merged = (str(tmp_path / word) for word in ('run', 'exported', 'merged'))
    run('train', name, '--work-dir', work_dir, *options)
    last = Path(work_dir, f'iter_{STEPS}.pth')
    weights = (last / WEIGHTS_FILE).read_bytes()
    shutil.rmtree(last)
    run('train', name, '--work-dir', work_dir, '--resume', *options)
    assert (last / WEIGHTS_FILE).read_bytes() == weights

    run('convert', 'pth_to_hf', name, str(last), exported)
    models = [exported]
    if is_adapter(Path(exported)):  # a LLaVA from parts is written whole
        config = adapter_settings(Path(exported))
        run('convert', 'merge', config['base_model_name_or_path'], exported, merged)
        models.append(merged)
    for model in models:
        run('chat', model, '--prompt', 'What is this?', '--max-new-tokens', '3')
