"""The folder of a run: what an earlier run left in it steps aside, so that nothing is replaced."""

from __future__ import annotations

import itertools
import os
from dataclasses import asdict
from pathlib import Path

import yaml

from train.config import RunConfig
from train.runtime.files import replace_file

CONFIG = "config.yaml"
# What says that a run has trained here, and what goes with it. Pairs, reference scores and
# checkpoints stay: they are checked by what they hold.
_RESULTS = ("log.jsonl", "report.png", "model", "adapter")
_BESIDE = (CONFIG, "tensorboard", "profile")


def check_run_dir(cfg: RunConfig) -> None:
    """Refuse to train a model that lies where the run would write its own.

    Raises:
        ValueError: naming run_dir and model.name.
    """
    name, run_dir = Path(cfg.model.name).resolve(), Path(cfg.run_dir).resolve()
    for output in (run_dir / "model", run_dir / "adapter"):
        if name == output or output in name.parents:
            raise ValueError(
                f"run_dir: expected another folder than that of model.name {cfg.model.name!r}, "
                f"which this run would move, got {cfg.run_dir!r}; choose another run_dir"
            )


def set_aside(run_dir: Path) -> Path | None:
    """Move what an earlier run left to the first free run_dir/previous-N; None if there is nothing.

    Each name moves at once: a run that is killed here leaves all of it, in two folders.
    """
    if not any((run_dir / name).exists() for name in _RESULTS):
        return None
    folders = (run_dir / f"previous-{number}" for number in itertools.count(1))
    folder = next(path for path in folders if not path.exists())
    folder.mkdir()
    for name in (*_BESIDE, *_RESULTS):
        if (run_dir / name).exists():
            os.replace(run_dir / name, folder / name)
    return folder


def write_config(cfg: RunConfig) -> None:
    """The configuration as it was used, for `--config`."""
    fields = {name: value for name, value in asdict(cfg).items() if name != "dry_run"}
    text = yaml.safe_dump(fields, sort_keys=False)
    replace_file(Path(cfg.run_dir) / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))
