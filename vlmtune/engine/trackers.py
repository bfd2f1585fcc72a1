"""Where a run's numbers, texts and pictures can be followed: TensorBoard, W&B, MLflow, SwanLab.

None is imported unless ``trackers`` names it. They get the config without its secrets, and neither console output nor
code nor the command line. Keys are theirs to find, in the environment or where their own login put them.
"""

import importlib
import inspect
import textwrap
import time
from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from mmengine.config import Config
from mmengine.dist import master_only

from vlmtune.config import config_text
from vlmtune.config.lazy import config_items
from vlmtune.utils.errors import ConfigError, first_line
from vlmtune.utils.extras import need
from vlmtune.utils.secrets import without_secrets
from vlmtune.utils.suggest import did_you_mean

_PROJECT = 'vlmtune'


class Tracker(Protocol):
    """One of them, open. ``image`` gets uint8[H, W, 3]."""

    def config(self, text: str, settings: dict[str, str]) -> None:
        """The config as a file, and its plain settings."""

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Numbers of a step."""

    def text(self, name: str, text: str, step: int) -> None:
        """A text of a step."""

    def image(self, name: str, pixels: np.ndarray, step: int, caption: str) -> None:
        """A picture of a step."""

    def close(self, *, failed: bool) -> None:
        """Nothing follows."""


class _TensorBoard:
    def __init__(self, folder: Path, name: str, **options: Any) -> None:
        writers = need('torch.utils.tensorboard', extra='tensorboard', what="trackers='tensorboard'")
        self.writer = writers.SummaryWriter(str(folder / 'tensorboard'), **options)

    def config(self, text: str, settings: dict[str, str]) -> None:
        self.text('config', text, 0)

    def scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # a run that is killed keeps what it wrote

    def text(self, name: str, text: str, step: int) -> None:
        self.writer.add_text(name, textwrap.indent(text, '    '), step)  # indented Markdown is shown as it is
        self.writer.flush()

    def image(self, name: str, pixels: np.ndarray, step: int, caption: str) -> None:
        self.writer.add_image(name, pixels, step, dataformats='HWC')
        self.writer.flush()

    def close(self, *, failed: bool) -> None:
        self.writer.close()


class _Wandb:
    def __init__(self, folder: Path, name: str, **options: Any) -> None:
        self.wandb = need('wandb', extra='wandb', what="trackers='wandb'")
        quiet = dict(console='off', disable_git=True, disable_code=True, x_disable_meta=True, silent=True)
        chosen = dict(project=_PROJECT, name=name) | options
        try:
            self.run = self.wandb.init(dir=str(folder), settings=self.wandb.Settings(**quiet), **chosen)
        except self.wandb.errors.Error as error:
            raise ConfigError(
                f'trackers: wandb cannot start: {error}; log in with `wandb login`, or set WANDB_MODE=offline'
            ) from error
        self.run.define_metric('*', step_metric='iteration')  # its own steps may never go back

    def config(self, text: str, settings: dict[str, str]) -> None:
        self.run.config.update(dict(settings, config=text), allow_val_change=True)

    def scalars(self, values: dict[str, float], step: int) -> None:
        self.run.log({**values, 'iteration': step})

    def text(self, name: str, text: str, step: int) -> None:
        table = self.wandb.Table(columns=['iteration', 'text'], data=[[step, text]])
        self.run.log({f'{name}/text': table, 'iteration': step})

    def image(self, name: str, pixels: np.ndarray, step: int, caption: str) -> None:
        self.run.log({name: self.wandb.Image(pixels, caption=caption), 'iteration': step})

    def close(self, *, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class _MLflow:
    def __init__(
        self,
        folder: Path,
        name: str,
        /,
        *,
        experiment: str = _PROJECT,
        tracking_uri: str | None = None,
        tags: Mapping[str, Any] | None = None,
    ) -> None:
        self.mlflow = need('mlflow', extra='mlflow', what="trackers='mlflow'")
        own = folder.absolute().parent  # the work dir: one place for the run and those that resume it
        asked = self.mlflow.get_tracking_uri() if self.mlflow.is_tracking_uri_set() else None
        uri = tracking_uri or asked or f'sqlite:///{own / "mlflow.db"}'
        artifacts = (own / 'mlflow').as_uri() if uri.startswith('sqlite:') else None
        try:
            self.client = self.mlflow.MlflowClient(tracking_uri=uri)
            found = self.client.get_experiment_by_name(experiment)
            number = found.experiment_id if found else self.client.create_experiment(experiment, artifacts)
            self.run = self.client.create_run(number, run_name=name, tags=tags).info.run_id
        except self.mlflow.exceptions.MlflowException as error:
            raise ConfigError(f'trackers: mlflow cannot start at {uri}: {first_line(error)}') from error

    def config(self, text: str, settings: dict[str, str]) -> None:
        params = [self.mlflow.entities.Param(name, value[:500]) for name, value in settings.items()]
        for start in range(0, len(params), 100):  # as many as a request may hold
            self.client.log_batch(self.run, params=params[start : start + 100])
        self.client.log_text(self.run, text, 'config.py')

    def scalars(self, values: dict[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        metric = self.mlflow.entities.Metric
        self.client.log_batch(self.run, metrics=[metric(name, value, now, step) for name, value in values.items()])

    def text(self, name: str, text: str, step: int) -> None:
        self.client.log_text(self.run, text, f'{name}/iter_{step}.txt')

    def image(self, name: str, pixels: np.ndarray, step: int, caption: str) -> None:
        self.client.log_image(self.run, pixels, f'{name}/iter_{step}.png')

    def close(self, *, failed: bool) -> None:
        self.client.set_terminated(self.run, 'FAILED' if failed else 'FINISHED')


class _SwanLab:
    def __init__(self, folder: Path, name: str, **options: Any) -> None:
        self.swanlab = need('swanlab', extra='swanlab', what="trackers='swanlab'")
        quiet = self.swanlab.Settings(
            terminal=dict(proxy_type='none'), probe=dict(runtime=False, requirements=False, git=False)
        )
        chosen = dict(project=_PROJECT, name=name) | options
        self.run = self.swanlab.init(log_dir=str(folder / 'swanlab'), settings=quiet, **chosen)

    def config(self, text: str, settings: dict[str, str]) -> None:
        self.swanlab.config.update(settings)
        self.text('config', text, 0)

    def scalars(self, values: dict[str, float], step: int) -> None:
        self.swanlab.log(values, step=step)

    def text(self, name: str, text: str, step: int) -> None:
        self.swanlab.log({f'{name}/text': self.swanlab.Text(text)}, step=step)

    def image(self, name: str, pixels: np.ndarray, step: int, caption: str) -> None:
        self.swanlab.log({name: self.swanlab.Image(pixels, caption=caption)}, step=step)

    def close(self, *, failed: bool) -> None:
        self.swanlab.finish(**(dict(state='crashed', error='the run has failed') if failed else {}))


TRACKERS: dict[str, Callable[..., Tracker]] = dict(
    tensorboard=_TensorBoard, wandb=_Wandb, mlflow=_MLflow, swanlab=_SwanLab
)
_STARTS = dict(
    tensorboard=('torch.utils.tensorboard', 'SummaryWriter'),
    wandb=('wandb', 'init'),
    mlflow=(__name__, '_MLflow'),
    swanlab=('swanlab', 'init'),
)
"""What takes the options of each."""
_OURS = ('dir', 'log_dir', 'settings')  # arguments that no config sets: folders of the run, no console output


class Trackers:
    """All trackers of a run behind mmengine's names, as hooks call ``runner.visualizer``; only the first rank writes.

    Args:
        chosen: {name: options} of ``read_trackers``.
        folder: the log folder, for what they keep on this disk.
        name: of the run.
    """

    def __init__(self, chosen: Mapping[str, Mapping[str, Any]], *, folder: Path, name: str) -> None:
        self.open: list[Tracker] = []
        self._start(chosen, folder, name)

    @master_only
    def _start(self, chosen: Mapping[str, Mapping[str, Any]], folder: Path, name: str) -> None:
        for tracker, options in chosen.items():
            self.open.append(TRACKERS[tracker](folder, name, **options))

    @master_only
    def add_config(self, config: Config) -> None:
        """The resolved config, and its plain settings by name."""
        if not self.open:
            return
        plain = {
            name: without_secrets(str(value))
            for name, value in config_items(config).items()
            if isinstance(value, str | int | float | bool)
        }
        for tracker in self.open:
            tracker.config(without_secrets(config_text(config)), plain)

    @master_only
    def add_scalars(self, scalar_dict: Mapping[str, Any], step: int = 0, file_path: str | None = None) -> None:
        """Numbers of a step; what is no number is left out."""
        values = {name: float(value) for name, value in scalar_dict.items() if isinstance(value, Real)}
        for tracker in self.open:
            tracker.scalars(values, step)

    @master_only
    def add_text(self, name: str, text: str, step: int = 0) -> None:
        """A text of a step."""
        for tracker in self.open:
            tracker.text(name, without_secrets(text), step)

    @master_only
    def add_image(self, name: str, image: np.ndarray, step: int = 0, caption: str = '') -> None:
        """A picture of a step.

        Args:
            name: of the picture; the same name at another step is the next of a row.
            image: uint8[H, W, 3].
            step: optimizer step.
            caption: shown below it, where a tracker has captions.
        """
        for tracker in self.open:
            tracker.image(name, image, step, without_secrets(caption))

    @master_only
    def close(self, *, failed: bool = False) -> None:
        """Nothing follows; a second call does nothing."""
        while self.open:
            self.open.pop().close(failed=failed)


def read_trackers(given: Any) -> dict[str, dict[str, Any]]:
    """What ``trackers`` of a config says, as {name: options}.

    Args:
        given: None, a name, several of them (a list, or between commas), or ``dict(wandb=dict(project='pages'))`` with
            arguments of the tracker.

    Raises:
        ConfigError: an unknown name, an option that holds a secret, or a package that is not installed.
    """
    if given is None:
        return {}
    if isinstance(given, str):
        given = [name.strip() for name in given.split(',')]
    if not isinstance(given, Mapping | list | tuple):
        raise ConfigError(f'trackers={given!r}: expected one or several of {", ".join(TRACKERS)}')
    chosen = {name: dict(given[name] or {}) for name in given} if isinstance(given, Mapping) else {n: {} for n in given}
    for name, options in chosen.items():
        if name not in TRACKERS:
            raise ConfigError(
                f'trackers: {name!r} is none{did_you_mean(str(name), TRACKERS)}; expected {", ".join(TRACKERS)}'
            )
        for key, value in options.items():
            if any(word in key.lower() for word in ('key', 'token', 'password')) or without_secrets(str(value)) != str(
                value
            ):
                raise ConfigError(
                    f'trackers.{name}.{key}: secrets are not read from configs; '
                    f'remove it, and use the login or the environment variables of {name}'
                )
        need(name, extra=name, what=f'trackers={name!r}')
        if options:
            _check_options(name, options)
    return chosen


def _check_options(tracker: str, options: Mapping[str, Any]) -> None:
    module, function = _STARTS[tracker]
    parameters = inspect.signature(getattr(importlib.import_module(module), function)).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return  # it takes whatever comes, and does not tell what it knows
    known = [name for name, one in parameters.items() if one.kind is not one.POSITIONAL_ONLY and name not in _OURS]
    for name in options:
        if name not in known:
            raise ConfigError(
                f'trackers.{tracker}.{name}: unknown argument{did_you_mean(name, known)}; there are {", ".join(known)}'
            )
