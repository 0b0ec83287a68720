"""`evaluate`: generate what is missing, then write the benchmark's files or judge the answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from train.config import PromptsConfig, RunConfig, SampleConfig
from train.evaluation.config import EvaluateConfig
from train.evaluation.engines import loader
from train.evaluation.intervals import Estimate, summarize
from train.evaluation.questions import ANSWER_FILES, load_questions
from train.evaluation.scores import build_judge, score_responses
from train.evaluation.writers import Answer, check_names, write_answers
from train.model.models import load_tokenizer
from train.preferences.judges import Judge
from train.preferences.modes import KIND_OF_MODE
from train.preferences.pairs import provenance, write_json
from train.preferences.prompts import Prompt
from train.preferences.rank import format_table, never_closed
from train.preferences.responses import read_responses
from train.preferences.sample import fill


def run_config(cfg: EvaluateConfig) -> RunConfig:
    """The configuration of the sampler: what its responses depend on."""
    return RunConfig(
        run_dir=cfg.run_dir, seed=cfg.seed, model=cfg.model,
        prompts=PromptsConfig(
            source="reasoning_gym" if cfg.benchmark == "reasoning_gym" else "jsonl",
            path=f"{cfg.benchmark}: {cfg.data or 'its own dataset'}", split=cfg.split or "",
            tasks=cfg.tasks if cfg.benchmark == "reasoning_gym" else {}, seed=cfg.seed,
        ),
        sample=SampleConfig(
            num_responses=cfg.samples, temperature=cfg.temperature, top_p=cfg.top_p,
            max_new_tokens=cfg.max_new_tokens, max_new_tokens_empty=cfg.max_new_tokens,
            prompts_per_batch=cfg.batch,
        ),
    )  # fmt: skip


def check(cfg: EvaluateConfig) -> None:
    """ValueError naming the option that is out of range."""
    for name in ("samples", "max_new_tokens", "batch"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"{name}: expected at least 1, got {getattr(cfg, name)}")
    if cfg.limit is not None and cfg.limit < 1:
        raise ValueError(f"limit: expected at least 1, got {cfg.limit}")
    if cfg.temperature < 0 or not 0 < cfg.top_p <= 1:
        raise ValueError(
            f"temperature, top_p: expected >= 0 and (0, 1], got {cfg.temperature}, {cfg.top_p}"
        )
    if cfg.temperature == 0 and cfg.samples > 1:
        raise ValueError(f"samples: expected 1 at temperature 0, got {cfg.samples}")
    if not cfg.modes or len(set(cfg.modes)) != len(cfg.modes):
        raise ValueError(f"modes: expected one or both of {list(KIND_OF_MODE)}, got {cfg.modes}")


def generator_name(cfg: EvaluateConfig, mode: str) -> str:
    """The name under which a mode's answers appear: a file name, too."""
    name = cfg.generator or Path(cfg.model.name.rstrip("/")).name
    return f"{name}-{mode}"


def write_files(
    records: Sequence[Mapping[str, Any]], cfg: EvaluateConfig, mode: str
) -> dict[str, Any]:
    """The benchmark's answer file: the first sample of each question, empty where it never ended
    its trace."""
    tokenizer, answers = load_tokenizer(cfg.model), []
    counts = {"answers": len(records), "empty": 0, "missing_close": 0, "unfinished": 0}
    for record in records:
        response = record["modes"][mode]["responses"][0]
        unclosed = never_closed(response, mode, cfg.model.trace_close)
        answer = response["text"].rpartition(cfg.model.trace_close)[2].strip()
        answer = "" if unclosed else answer
        counts["empty"] += not answer
        counts["missing_close"] += unclosed
        counts["unfinished"] += not response["finished"]
        tokens = len(tokenizer(answer, add_special_tokens=False).input_ids)
        answers.append(Answer(record["task"]["entry"]["metadata"], answer, tokens))
    folder = Path(cfg.run_dir) / cfg.benchmark
    path = write_answers(cfg.benchmark, answers, generator_name(cfg, mode), folder)
    print(
        f"{mode}: {len(answers)} answers, {counts['empty']} of them empty; "
        f"{counts['missing_close']} never closed their trace, {counts['unfinished']} were cut at "
        f"max_new_tokens: {path}"
    )
    return {"file": str(path), **counts}


def judge_answers(
    records: Sequence[Mapping[str, Any]], cfg: EvaluateConfig, mode: str, judge: Judge
) -> dict[str, Any]:
    """Scores, avg@k and pass@k of one mode."""
    scores, counts = score_responses(records, mode, judge, cfg)
    lengths = [
        len(response["ids"])
        for record in records
        for response in record["modes"][mode]["responses"]
    ]
    by_id = dict(zip([record["prompt_id"] for record in records], scores, strict=True))
    return {
        "summary": {n: asdict(e) for n, e in summarize(scores).items()},
        "mean_tokens": sum(lengths) / len(lengths),
        "counts": counts,
        "scores": by_id,
    }


def records_of(prompts: Sequence[Prompt], path: Path) -> list[dict[str, Any]]:
    """Responses in the order of the questions; others in the file are left out."""
    stored = {record["prompt_id"]: record for _, record in read_responses(path)}
    return [stored[prompt.prompt_id] for prompt in prompts]


def run(cfg: EvaluateConfig) -> None:
    """`evaluate`: from the configuration to `run_dir`/results.json and the benchmark's files."""
    check(cfg)
    prompts = load_questions(cfg)
    modes = [mode for mode in KIND_OF_MODE if mode in cfg.modes]
    # What the answers will need, before hours of sampling.
    step: Callable[..., dict[str, Any]] = write_files
    if cfg.benchmark in ANSWER_FILES:
        check_names(cfg.benchmark, [prompt.task["entry"]["metadata"] for prompt in prompts])
    else:
        step = partial(judge_answers, judge=build_judge(cfg.benchmark))
    records = records_of(prompts, fill(run_config(cfg), prompts, loader(cfg), modes))
    results: dict[str, dict[str, Any]] = {mode: step(records, cfg, mode) for mode in modes}
    path = Path(cfg.run_dir) / "results.json"
    write_json(path, {"benchmark": cfg.benchmark, "questions": len(prompts),
                      "settings": asdict(cfg), "results": results, **provenance()})  # fmt: skip
    if step is not write_files:
        print(table(results))
    print(f"results: {path}")


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Percentages with their intervals, then counts; one column per mode."""
    rows: dict[str, dict[str, float]] = {}
    for mode, result in results.items():
        for name, values in result["summary"].items():
            estimate = Estimate(**values)
            column = rows.setdefault(mode, {})
            column[f"{name}, %"] = round(100 * estimate.mean, 2)
            column[f"{name}, from"] = round(100 * estimate.low, 2)
            column[f"{name}, to"] = round(100 * estimate.high, 2)
        rows.setdefault(mode, {}).update(result["counts"])
    return format_table(rows)
