"""The study's report: Markdown, CSV tables and figures, from the files of the seeds and arms."""

from __future__ import annotations

import json
import platform
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import torch

from train.runtime.files import replace_file
from train.study import figures, tables
from train.study.config import StudyConfig
from train.study.results import Results, load


def commit() -> str:
    """The checkout's commit, "+" after it where files differ from it."""
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run.stdout.strip()


def machine() -> str:
    """Processor, threads and versions."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    return f"{name}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"


def write(cfg: StudyConfig) -> Path:
    """Read what is there, draw it, and write `report.md`; returns its path."""
    results = load(Path(cfg.out), cfg)
    folder = Path(cfg.report or cfg.out)
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        f"{name}.csv": tables.to_csv(rows) for name, rows in tables.all_tables(results).items()
    }
    texts["report.md"] = "\n".join(_lines(results, cfg))
    for name, text in texts.items():
        replace_file(folder / name, partial(Path.write_text, data=text, encoding="utf-8"))
    for name, figure in figures.all_figures(results).items():
        replace_file(folder / f"{name}.png", partial(figure.savefig, format="png"))
    return folder / "report.md"


def _lines(results: Results, cfg: StudyConfig) -> list[str]:
    base = next(iter(results.base.values()))
    origin = json.loads((Path(cfg.out) / "study.json").read_text(encoding="utf-8"))
    done = sum(len(by_seed) for by_seed in results.arms.values())
    lines = [
        "# Does a* help, and does it minimise what it says?",
        "",
        "Made by `python -m train study" + (" --quick" if cfg.quick else "") + "`: seeds "
        f"{', '.join(map(str, results.seeds))}; commit {origin['commit']}; {origin['machine']}. "
        f"{done} runs of {cfg.steps} steps, {_seconds(results):.0f} s of wall clock in all.",
        "",
        "## Set-up",
        "",
        *_setup(results, cfg, base),
        "",
        "## Does a* minimise what it says?",
        "",
        "![error of the mixed gradient](error.png)",
        "",
        "The truth is the mean marginal gradient over half of the units; random batches of "
        f"{cfg.units_per_step} of the other half give the error, then the halves change places. "
        "Every gradient comes from plain autograd on padded logits. The dots and lines below zero "
        "are the minimum of each curve and the package's a*, with 95 % intervals "
        "(minimum: delete-a-group jackknife). The package sees half a batch per step, some ten "
        "steps. The checkpoints of one seed share their units, so that they are not independent.",
        "",
        tables.to_markdown(tables.markdown_optimum(results)),
        "",
        "![variances over training](variances.png)",
        "",
        "![weights used](weights.png)",
        "",
        "## Does it help?",
        "",
        "![accuracy](accuracy.png)",
        "",
        f"Intervals of 95 % are over the {cfg.eval_prompts} test prompts of each seed, the seeds "
        "held fixed; ticks in the figure are the seeds. Differences are paired by prompt; nothing "
        "is corrected for the number of comparisons. "
        "The fixed loss is, per seed, half-way from ln 2 to the least held-out (L_trace + "
        "L_empty) / 2 of a = .5, interpolated between probes; the mean over seeds, where all "
        "reach it.",
        "",
        tables.to_markdown(tables.markdown_accuracy(results)),
        "",
        "![held-out losses](losses.png)",
        "",
        "Data: `accuracy.csv`, `optimum.csv`, `curves.csv`, `training.csv`, `probes.csv`.",
        "",
    ]
    return lines


def _seconds(results: Results) -> float:
    runs = [run["seconds"]["all"] for by_seed in results.arms.values() for run in by_seed.values()]
    curves = [curve["seconds"] for curve in results.curves.values()]
    return sum(runs) + sum(curves) + sum(base["seconds"] for base in results.base.values())


def _setup(results: Results, cfg: StudyConfig, base: dict[str, Any]) -> list[str]:
    scores = base["evaluation"]
    counts = base["counts"]
    return [
        f"- Model: Qwen3 configuration, {base['parameters'] / 1e6:.2f} M parameters, fp32, trained "
        f"from scratch in {cfg.sft_steps} steps on a teacher's answers in both modes.",
        "- Task: the sum of five digits. A trace writes the running sums in a random order, at "
        "times twice; a written sum is off by one now and then. Right or wrong is decided by the "
        "number after `</think>`.",
        f"- Pairs: first right and first wrong of {cfg.samples} samples at temperature "
        f"{cfg.temperature:g}, per prompt and mode; {cfg.units} units per seed. Seed "
        f"{results.seeds[0]}: of {counts['prompts']} prompts {counts['trace_pair']} gave a trace "
        f"pair, {counts['empty_pair']} an empty pair; {counts['both']} gave both, and of those the "
        "ones with at least four further traces of each answer were kept.",
        f"- Before preference training (seed {results.seeds[0]}): Thinking "
        f"{100 * scores['thinking']['accuracy']:.1f} %, NoThinking "
        f"{100 * scores['no_thinking']['accuracy']:.1f} % at temperature {cfg.temperature:g}.",
        f"- Arms: DPO with beta {cfg.beta:g}, AdamW, learning rate {cfg.lr:g}, warm-up and cosine, "
        f"{cfg.units_per_step} units a step, the same for all. The 2x arms see trace pairs of "
        "twice as many prompts per step, as many pairs as the arms with both kinds; SimPO (beta 2, "
        "gamma .5) and KTO use the same learning rate. K=4 averages four traces of the "
        "same answers. a* is lagged: it depends on earlier steps only.",
    ]
