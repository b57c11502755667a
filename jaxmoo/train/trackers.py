"""Where numbers of a run are sent besides its own files: TensorBoard, W&B, Trackio, MLflow.

Each is a :class:`Tracker`; its library is imported when it is opened. A run that goes on after a
restart goes on in the tracker's own run, whose name is kept in the directory. Credentials are read
by the libraries from where they expect them, and never from here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from jaxmoo.config import Config
from jaxmoo.errors import ConfigError
from jaxmoo.files.buckets import hide_secrets
from jaxmoo.files.scratch import scratch_of

__all__ = ["Tracker", "Trackers", "check_packages", "open_trackers", "trackers_of"]

# What MLflow takes at a time.
_BATCH, _PARAMETERS, _LONGEST = 1000, 100, 500
# What to do where no run can be begun.
_ADVICE = {
    "wandb": "Log in with `wandb login` or WANDB_API_KEY, set WANDB_MODE=offline to send it later",
    "trackio": "Look at what it says",
    "mlflow": "Set MLFLOW_TRACKING_URI to a server that answers, and what it asks for to log in",
}


class Trackers(NamedTuple):
    """Which trackers a run has.

    Attributes:
      tensorboard: write TensorBoard events to the run's directory.
      wandb: project of Weights & Biases.
      trackio: project of Trackio.
      mlflow: experiment of MLflow.
    """

    tensorboard: bool = False
    wandb: str | None = None
    trackio: str | None = None
    mlflow: str | None = None


class Tracker(Protocol):
    """Takes the numbers of steps."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take numbers by name; those that are not known are NaN."""
        ...

    def close(self) -> None:
        """Send what has not been sent yet."""
        ...


def trackers_of(config: Config) -> Trackers:
    """Return the trackers that settings ask for."""
    return Trackers(config.tensorboard, config.wandb, config.trackio, config.mlflow)


def open_trackers(
    directory: Path,
    wanted: Trackers,
    *,
    first_step: int = 0,
    settings: Mapping[str, Any] | None = None,
) -> list[Tracker]:
    """Open the trackers of a run; its first process does.

    Args:
      directory: the run's.
      wanted: which.
      first_step: steps from this one on are logged anew, if they were before.
      settings: what the run's page shows of it.

    Raises:
      ConfigError: a package is missing, or a tracker does not take a run: its server cannot be
        reached, say, or nobody is logged in.
    """
    check_packages(wanted)
    known = {name: _without_login(value) for name, value in (settings or {}).items()}
    opened: list[Tracker] = []
    if wanted.tensorboard:
        opened.append(_TensorBoard(directory, first_step))
    for setting, kind in {"wandb": _Wandb, "trackio": _Trackio, "mlflow": _Mlflow}.items():
        if project := getattr(wanted, setting):
            try:
                opened.append(kind(directory, project, known))
            except Exception as error:  # each library has its own
                for tracker in opened:
                    with contextlib.suppress(Exception):
                        tracker.close()
                why = hide_secrets(str(error) or type(error).__name__)
                raise ConfigError(
                    f"{setting} is {project!r}, but no run can be begun there: {why}\n"
                    f"{_ADVICE[setting]}, or set {setting}=null."
                ) from error
    return opened


def check_packages(wanted: Trackers) -> None:
    """Raise unless the libraries of trackers are installed.

    Raises:
      ConfigError: names the setting, the package and the extra that brings it.
    """
    for setting, package, extra in (
        ("tensorboard", "tensorboardX", "train"),
        ("wandb", "wandb", "wandb"),
        ("trackio", "trackio", "trackio"),
        ("mlflow", "mlflow", "mlflow"),
    ):
        value = getattr(wanted, setting)
        if value and importlib.util.find_spec(package) is None:
            off = "false" if setting == "tensorboard" else "null"
            raise ConfigError(
                f"{setting} is {value!r}, but the package {package} is not installed. Install it "
                f"with pip install 'jaxmoo[{extra}]', or set {setting}={off}."
            )


class _TensorBoard:
    def __init__(self, directory: Path, first_step: int) -> None:
        from tensorboardX import SummaryWriter

        # TensorBoard drops what earlier event files hold from the purge step on. Their names count
        # seconds; the suffix keeps two starts within one second apart.
        self._events = SummaryWriter(
            str(scratch_of(directory) / "tensorboard"),
            purge_step=first_step,
            filename_suffix=f".{time.time_ns()}",
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self._events.add_scalar(tag, value, step)
        self._events.flush()

    def close(self) -> None:
        self._events.close()


class _Hosted:
    """A run of W&B or of a library that has taken over its names."""

    _run: Any

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _Wandb(_Hosted):
    def __init__(self, directory: Path, project: str, settings: Mapping[str, Any]) -> None:
        import wandb

        here = scratch_of(directory)
        here.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=project,
            name=directory.absolute().name,
            id=_kept(directory / "wandb_id", lambda: secrets.token_hex(8)),
            resume="allow",
            dir=here,
            config=dict(settings),
            allow_val_change=True,
        )


class _Trackio(_Hosted):
    def __init__(self, directory: Path, project: str, settings: Mapping[str, Any]) -> None:
        import trackio

        def named() -> str:  # which is all that it knows a run by
            return f"{directory.absolute().name}-{secrets.token_hex(4)}"

        self._run = trackio.init(
            project=project,
            name=_kept(directory / "trackio_name", named),
            resume="allow",
            config=dict(settings),
            embed=False,
        )


class _Mlflow:
    def __init__(self, directory: Path, experiment: str, settings: Mapping[str, Any]) -> None:
        import mlflow
        from mlflow.entities import Metric, Param, RunStatus
        from mlflow.exceptions import MlflowException

        self._metric, self._status = Metric, RunStatus
        self._client: Any = mlflow.MlflowClient()
        found = self._client.get_experiment_by_name(experiment)
        number = (
            self._client.create_experiment(experiment) if found is None else found.experiment_id
        )

        def begun() -> str:
            name = directory.absolute().name
            run = self._client.create_run(number, run_name=name).info.run_id
            known = [Param(key, str(value)[:_LONGEST]) for key, value in settings.items()]
            for i in range(0, len(known), _PARAMETERS):
                self._client.log_batch(run, params=known[i : i + _PARAMETERS])
            return run

        self._run = _kept(directory / "mlflow_id", begun)
        try:
            self._client.update_run(self._run, status="RUNNING")
        except MlflowException:  # it was deleted, or another server is meant now
            (directory / "mlflow_id").unlink()
            self._run = _kept(directory / "mlflow_id", begun)

    def log(self, values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(key, value, now, step) for key, value in values.items()]
        for i in range(0, len(metrics), _BATCH):
            self._client.log_batch(self._run, metrics=metrics[i : i + _BATCH])

    def close(self) -> None:
        self._client.set_terminated(self._run)


def _kept(file: Path, make: Callable[[], str]) -> str:
    """Return what a file holds, made now unless it has been: a resumed run goes on in its own."""
    with contextlib.suppress(FileNotFoundError):
        if text := file.read_text("utf-8").strip():
            return text
    text = make()
    file.write_text(text + "\n", "utf-8")
    return text


def _without_login(value: Any) -> Any:
    """Leave out of addresses who logs in, and how."""
    if isinstance(value, str):
        return re.sub(r"(?<=://)[^/@\s]+@", "", value)
    return value
