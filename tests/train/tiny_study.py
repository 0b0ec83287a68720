"""A study in miniature: a random model, and pairs that the teacher wrote instead of the model."""

from pathlib import Path

import numpy as np
import torch

from bvpo_kernels.mixing import MARGINAL
from bvpo_kernels.types import EMPTY, TRACE
from train.preferences.pairs import write_json
from train.study import task
from train.study.arms import World
from train.study.config import StudyConfig
from train.study.marginal import score_posterior
from train.study.model import build
from train.study.preferences import load_or_sample, unit_record


def tiny_cfg(out: Path, **options) -> StudyConfig:
    sizes = {
        "hidden": 32,
        "intermediate": 32,
        "layers": 1,
        "heads": 1,
        "kv_heads": 1,
        "units": 12,
        "steps": 4,
        "units_per_step": 4,
        "measure_every": 2,
        "pool": 8,
        "pool_traces": 4,
        "checkpoints": (0, 4),
        "eval_prompts": 40,
        "probe_units": 3,
        "probe_every": 2,
        "seeds": (0,),
        "lr": 1e-4,
        "warmup": 2,
        "sft_steps": 5,
        "sft_batch": 8,
        "sft_direct": 4,
    }
    return StudyConfig(out=str(out), **{**sizes, **options})


def traces_of(digits: np.ndarray, total: int, count: int, rng) -> list[list[int]]:
    """Teacher's traces whose answer is `total`, right or wrong."""
    found: list[list[int]] = []
    while len(found) < count:
        drawn = task.teach(np.repeat(digits[None], 64, 0), True, task.Teacher(slip=0.3), rng)
        found += [r for r in drawn if task.answer(r, True) == total]
    return found[:count]


def make_pairs(cfg: StudyConfig, seed: int, path: Path) -> None:
    """The file that `load_or_sample` would have written."""
    rng = np.random.default_rng(seed)
    units, extra = [], []
    for number in range(cfg.units + cfg.probe_units):
        digits = rng.integers(0, 10, task.DIGITS)
        right = int(digits.sum())
        good, bad = (traces_of(digits, y, 5, rng) for y in (right, right + 1))
        pairs = list(zip(good, bad, strict=True))
        direct = [[task.NUMBER + y, task.EOS] for y in (right, right + 2)]
        kinds = {TRACE: pairs[:1], EMPTY: [direct], MARGINAL: pairs[1:]}
        units.append(unit_record(f"p{number}", digits, kinds))
        extra.append(unit_record(f"x{number}", digits, {TRACE: pairs[:1]}))
    counts = {"prompts": 100, "trace_pair": 50, "empty_pair": 60, "both": 30}
    write_json(path, {"units": units, "extra": extra[: cfg.units], "counts": counts})


def tiny_world(cfg: StudyConfig, seed: int = 0) -> World:
    torch.manual_seed(seed)
    base = build(cfg).eval()
    _, prompts, test = task.split_prompts(seed, [100, 100, cfg.eval_prompts])
    path = Path(cfg.out) / f"seed{seed}" / "pairs.json"
    if not path.is_file():
        make_pairs(cfg, seed, path)
    preferences = load_or_sample(base, prompts, cfg, seed, path)
    units = [*preferences.units, *preferences.probe]
    return World(cfg, seed, base, preferences, score_posterior(base, units, cfg.temperature), test)
