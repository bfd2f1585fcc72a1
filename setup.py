"""Packaging. The recipes of the top-level ``configs`` are shipped as data of the package, in ``vlmtune/configs``."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
VERSION = next(
    line.split("'")[1] for line in (HERE / 'vlmtune' / '__init__.py').read_text().splitlines() if '__version__' in line
)
REQUIREMENTS = [line for line in (HERE / 'requirements.txt').read_text().splitlines() if line and line[0] != '#']
EXTRAS = {
    'tensorboard': ['tensorboard>=2.20'],
    'metrics': ['jiwer>=4.0', 'rouge-score>=0.1.2', 'sacrebleu>=2.6'],
    'demo': ['gradio>=6.31'],
    'serve': ['transformers[serving]>=5.23'],
    'wandb': ['wandb>=0.31'],
    'mlflow': ['mlflow>=3.17.2'],
    'swanlab': ['swanlab>=0.10.3'],
    'modelscope': ['modelscope-hub>=0.5.1'],
    'quantize': ['auto-round>=0.16.1'],
    'quickstart': ['easy-vqa>=1.0'],
    'bench': ['trl>=1.16'],
    'dev': [
        'anls>=0.0.2',
        'mypy>=2.4',
        'openai>=3.54',
        'playwright>=1.65',
        'pytest>=9',
        'pytest-xdist>=3.8',
        'ruff>=0.17',
        'setuptools>=77',
        'wheel',
    ],
}


class BuildWithRecipes(build_py):
    """Copies the recipes into the built package; an editable install reads them where they are."""

    def run(self) -> None:
        super().run()
        if getattr(self, 'editable_mode', False):
            return
        target = Path(self.build_lib) / 'vlmtune' / 'configs'
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(HERE / 'configs', target, ignore=shutil.ignore_patterns('__pycache__', '*.pyc'))


setup(
    name='vlmtune',
    version=VERSION,
    description='Fine-tune vision-language models from one Python config file',
    long_description=(HERE / 'README.md').read_text(encoding='utf-8') if (HERE / 'README.md').is_file() else '',
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    license_files=['LICENSE'],
    packages=find_packages(include=['vlmtune', 'vlmtune.*']),
    package_data={'vlmtune': ['presets/**/*.json', 'py.typed']},
    python_requires='>=3.11',
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    entry_points={'console_scripts': ['vlmtune = vlmtune.cli:main']},
    cmdclass={'build_py': BuildWithRecipes},
    classifiers=['Programming Language :: Python :: 3', 'Operating System :: OS Independent'],
)
