"""`python -m train study`: all seeds and arms, each into its own file, then the report."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from train.preferences.pairs import provenance, write_json
from train.runtime.files import replace_file
from train.runtime.settings import differences
from train.study import report, task
from train.study.arms import World, evaluate, run_arm
from train.study.config import Arm, StudyConfig, chosen_arms, sized
from train.study.marginal import score_posterior
from train.study.measure import measure_checkpoint
from train.study.model import build, train_sft
from train.study.preferences import load_or_sample

# The arm whose checkpoints are measured by brute force: the paper's.
MEASURED_ARM = "a=.5"
PROMPT_SHARES = (0.8, 0.1)  # of the 10^5 prompts: for the supervised training, for preferences
# What may change between a run and its continuation.
_FREE = ("out", "report", "seeds", "arms", "threads")


def slug(name: str) -> str:
    return name.replace(" ", "_").replace("*", "star").replace("=", "")


def check_settings(cfg: StudyConfig, path: Path) -> None:
    """Write the settings that the results depend on, or refuse results of other ones."""
    settings = {k: v for k, v in asdict(cfg).items() if k not in _FREE}
    settings = json.loads(json.dumps(settings))
    if not path.is_file():
        made = {"commit": report.commit(), "machine": report.machine()}
        write_json(path, {"settings": settings, **made, **provenance()})
        return
    stored = json.loads(path.read_text(encoding="utf-8"))["settings"]
    wrong = differences(stored, settings, "the results", "this command")
    if wrong:
        raise ValueError(f"out: {path.parent} holds results of other settings: {'; '.join(wrong)}")


def save_weights(model: PreTrainedModel, path: Path) -> None:
    # The tied head is the embedding: safetensors stores shared memory once.
    state = {n: t.contiguous() for n, t in model.state_dict().items() if n != "lm_head.weight"}
    replace_file(path, lambda name: save_file(state, name))


def load_weights(model: PreTrainedModel, path: Path) -> PreTrainedModel:
    model.load_state_dict(load_file(path), strict=False)
    model.tie_weights()
    return model.eval()


def prepare(cfg: StudyConfig, seed: int) -> tuple[World, Path]:
    """The seed's base model, its data and its evaluation, made or read."""
    folder = Path(cfg.out) / f"seed{seed}"
    sizes = [round(share * 10**task.DIGITS) for share in PROMPT_SHARES]
    sft, prompts, test = task.split_prompts(seed, [*sizes, cfg.eval_prompts])
    torch.manual_seed(seed)
    base = build(cfg)
    weights = folder / "base.safetensors"
    if not weights.is_file():
        info = train_sft(base, sft, cfg, seed)
        write_json(folder / "sft.json", info)
        save_weights(base, weights)
    load_weights(base, weights)
    preferences = load_or_sample(base, prompts, cfg, seed, folder / "pairs.json")
    every = [*preferences.units, *preferences.probe]
    posterior = score_posterior(base, every, cfg.temperature)
    return World(cfg, seed, base, preferences, posterior, test), folder


def cached(path: Path, make: Any) -> Any:
    """The JSON of `path`, made and stored if it is not there."""
    if not path.is_file():
        write_json(path, make())
    return json.loads(path.read_text(encoding="utf-8"))


def run_seed(cfg: StudyConfig, seed: int) -> None:
    """All that is missing of one seed."""
    world, folder = prepare(cfg, seed)
    parameters = sum(p.numel() for p in world.base.parameters())
    cached(folder / "base.json", lambda: {
        "parameters": parameters, "evaluation": evaluate(world.base, world),
        "counts": world.preferences.counts,
        **json.loads((folder / "sft.json").read_text(encoding="utf-8")),
    })  # fmt: skip
    cached(folder / "curve-0.json", lambda: measure_checkpoint(world.base, world, 0))
    for arm in chosen_arms(cfg):
        run_one(world, arm, folder)


def run_one(world: World, arm: Arm, folder: Path) -> None:
    """One arm; of the measured arm, its checkpoints too."""
    path = folder / f"arm-{slug(arm.name)}.json"
    weights = {step: folder / f"step-{step}.safetensors" for step in world.cfg.checkpoints if step}
    if not path.is_file():
        keep = None
        if arm.name == MEASURED_ARM:
            keep = lambda step, model: save_weights(model, weights[step])  # noqa: E731
        write_json(path, run_arm(world, arm, keep))
    if arm.name == MEASURED_ARM:
        for step, file in weights.items():
            cached(
                folder / f"curve-{step}.json",
                lambda step=step, file=file: measure_checkpoint(
                    load_weights(build(world.cfg), file), world, step
                ),
            )


def run(cfg: StudyConfig) -> None:
    """`study`: what is missing of every seed, then the report."""
    cfg = sized(cfg)
    chosen_arms(cfg)
    torch.set_num_threads(cfg.threads)
    out, start = Path(cfg.out), time.perf_counter()
    check_settings(cfg, out / "study.json")
    for seed in cfg.seeds:
        run_seed(cfg, seed)
    path = report.write(cfg)
    print(f"study: {path} ({time.perf_counter() - start:.0f} s)")
