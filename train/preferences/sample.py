"""`sample`: draw responses in both modes, one JSONL line per prompt, resumable.

A line holds the prompt (id, messages, task) and, per mode, the prompt's ids and the responses: ids
as generated, end-of-sequence id included; whether they ended by it; their text without it. The
sidecar `responses.meta.json` holds what the samples depend on.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel

from train.config import RunConfig, SampleConfig
from train.model.models import load_model, tokenizer_fingerprint
from train.preferences.judges import check_judge
from train.preferences.modes import KIND_OF_MODE, THINKING, build_prompts, render_prompts
from train.preferences.pairs import meta_path, provenance, write_json
from train.preferences.prompts import Prompt, load_prompts, parse_object
from train.preferences.responses import drop_unfinished_line, finished_prompts, responses_path
from train.runtime.settings import differences


def settings(cfg: RunConfig, tokenizer: Any) -> dict[str, Any]:
    """What the samples of a prompt depend on, dotted name -> value.

    `prompts.size` is left out: more prompts only append.
    """
    model = asdict(cfg.model)
    del model["param_dtype"]  # sampling runs in compute_dtype
    prompts = asdict(cfg.prompts)
    del prompts["size"]
    sections = {"model": model, "prompts": prompts, "sample": asdict(cfg.sample)}
    flat = {
        f"{name}.{key}": value for name, part in sections.items() for key, value in part.items()
    }
    return {"seed": cfg.seed, "tokenizer": tokenizer_fingerprint(tokenizer), **flat}


def check_settings(current: Mapping[str, Any], path: Path) -> None:
    """Refuse to append to samples of other settings.

    Raises:
        ValueError: naming each setting that differs, or a sidecar that is missing.
    """
    sidecar = meta_path(path)
    if not sidecar.is_file():
        raise ValueError(f"{path}: expected its sidecar {sidecar.name} beside it, got none")
    stored = parse_object(sidecar.read_bytes(), str(sidecar)).get("settings", {})
    plain = json.loads(json.dumps(current))
    differing = differences(stored, plain, "the samples", "this command")
    if differing:
        raise ValueError(
            f"{path}: was sampled with other settings (use another run_dir or the same settings): "
            + "; ".join(differing)
        )


def end_ids(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """Ids that end a response: the model's own and the tokenizer's."""
    own = model.generation_config.eos_token_id if model.generation_config else None
    ids = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
    if not ids:
        raise ValueError("model.name: expected a model or tokenizer with an end-of-sequence id")
    return sorted(ids)


@dataclass(frozen=True)
class Sampler:
    """Draws responses; temperature and nucleus are the configuration's, nothing else applies.

    Temperature 0 takes the likeliest token.
    """

    model: Any
    tokenizer: Any
    cfg: SampleConfig

    def __post_init__(self) -> None:
        # generate() fills what a call leaves out from the checkpoint's own sampling defaults
        # (top_k, penalties): here they must not leak into the samples.
        ends = end_ids(self.model, self.tokenizer)
        pad = self.tokenizer.pad_token_id
        options: dict[str, Any] = {"do_sample": False}
        if self.cfg.temperature > 0:
            options = {
                "do_sample": True,
                "temperature": self.cfg.temperature,
                "top_p": self.cfg.top_p,
                "top_k": 0,
            }
        self.model.generation_config = GenerationConfig(
            **options,
            num_return_sequences=self.cfg.num_responses,
            eos_token_id=ends,
            pad_token_id=ends[0] if pad is None else pad,
        )

    @torch.inference_mode()
    def draw(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, seed: int
    ) -> list[list[list[int]]]:
        """[prompt][response] -> ids as generated, up to and including the end id."""
        width = max(map(len, prompts))
        pad = self.model.generation_config.pad_token_id
        rows = [[pad] * (width - len(ids)) + list(ids) for ids in prompts]
        mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
        device = self.model.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            output = self.model.generate(
                input_ids=torch.tensor(rows, device=device),
                attention_mask=torch.tensor(mask, device=device),
                max_new_tokens=max_new_tokens,
            )
        flat = [self._until_end(ids) for ids in output[:, width:].tolist()]
        n = self.cfg.num_responses
        return [flat[start : start + n] for start in range(0, len(flat), n)]

    @property
    def ends(self) -> Sequence[int]:
        return self.model.generation_config.eos_token_id

    def _until_end(self, ids: list[int]) -> list[int]:
        stop = next((i + 1 for i, token in enumerate(ids) if token in self.ends), len(ids))
        return ids[:stop]


class Engine(Protocol):
    """What draws responses: `Sampler`, or another library behind the same calls."""

    @property
    def tokenizer(self) -> Any:
        """That of the model."""

    @property
    def ends(self) -> Sequence[int]:
        """Ids that end a response."""

    def draw(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, seed: int
    ) -> list[list[list[int]]]:
        """[prompt][response] -> ids as generated, up to and including the end id."""


def describe(engine: Engine, ids: list[int]) -> dict[str, Any]:
    """A response as it is stored."""
    finished = bool(ids) and ids[-1] in engine.ends
    # Markers may be special tokens of the tokenizer: only the end id is taken out of the text.
    text = engine.tokenizer.decode(ids[:-1] if finished else ids, skip_special_tokens=False)
    return {"ids": ids, "finished": finished, "text": text}


def batch_seed(seed: int, mode: str, batch: int) -> int:
    """A batch's own seed, so that its samples do not depend on what ran before."""
    digest = hashlib.sha256(f"{seed}\0{mode}\0{batch}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _record(prompt: Prompt) -> dict[str, Any]:
    record = asdict(prompt)
    return record if prompt.tools else {k: v for k, v in record.items() if k != "tools"}


def sample_batch(
    sampler: Engine,
    prompts: Sequence[Prompt],
    batch: int,
    cfg: RunConfig,
    modes: Sequence[str] = tuple(KIND_OF_MODE),
) -> list[dict[str, Any]]:
    """The records of a batch of prompts in some modes."""
    inputs = [build_prompts(sampler.tokenizer, prompt, cfg.model, cfg.sample) for prompt in prompts]
    records = [{**_record(prompt), "modes": {}} for prompt in prompts]
    for mode in modes:
        limit = cfg.sample.max_new_tokens if mode == THINKING else cfg.sample.max_new_tokens_empty
        drawn = sampler.draw(
            [ids[mode] for ids in inputs], limit, batch_seed(cfg.seed, mode, batch)
        )
        for record, ids, responses in zip(records, inputs, drawn, strict=True):
            described = [describe(sampler, response) for response in responses]
            record["modes"][mode] = {"prompt_ids": ids[mode], "responses": described}
    return records


def check_config(cfg: SampleConfig) -> None:
    """ValueError naming the option that is out of range."""
    least = {
        "num_responses": 2,
        "max_new_tokens": 1,
        "max_new_tokens_empty": 1,
        "prompts_per_batch": 1,
    }
    for name, low in least.items():
        if getattr(cfg, name) < low:
            raise ValueError(f"sample.{name}: expected at least {low}, got {getattr(cfg, name)}")
    if not cfg.temperature > 0:
        raise ValueError(f"sample.temperature: expected a positive number, got {cfg.temperature}")
    if not 0 < cfg.top_p <= 1:
        raise ValueError(f"sample.top_p: expected a number in (0, 1], got {cfg.top_p}")


def run(cfg: RunConfig) -> None:
    """`sample`: responses of the configured prompts into `run_dir`; finished prompts are kept."""
    check_config(cfg.sample)
    prompts = load_prompts(cfg.prompts)
    check_judge(cfg.rank, prompts)  # hours before `rank` needs it
    path = fill(cfg, prompts, load_sampler)
    print(f"responses of {len(prompts)} prompts: {path}")


def load_sampler(cfg: RunConfig) -> Sampler:
    """The configured model behind transformers' generate."""
    settings: Any = cfg.model  # sampling has no master weights
    model, tokenizer = load_model(replace(settings, param_dtype=settings.compute_dtype))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Sampler(model.to(device), tokenizer, cfg.sample)  # type: ignore[arg-type]


def check_prompts(tokenizer: Any, prompts: Sequence[Prompt], cfg: RunConfig) -> None:
    """Render every prompt before the first is sampled, and print how the first one ends.

    Raises:
        ValueError: as `render_prompts`.
    """
    for number, prompt in enumerate(prompts):
        texts = render_prompts(tokenizer, prompt, cfg.model, cfg.sample)
        if number == 0:
            for mode, text in texts.items():
                print(f"{mode}: a prompt ends in {text[-40:]!r}")


def fill(
    cfg: RunConfig,
    prompts: Sequence[Prompt],
    load: Callable[[RunConfig], Engine],
    modes: Sequence[str] = tuple(KIND_OF_MODE),
) -> Path:
    """The file of responses in `run_dir`, with those of `prompts` that it lacks appended.

    Raises:
        ValueError: if it was sampled with other settings, or with other messages under an id.
    """
    sampler = load(cfg)
    path, current = responses_path(cfg), settings(cfg, sampler.tokenizer)
    if tuple(modes) != tuple(KIND_OF_MODE):
        current["modes"] = list(modes)
    done: set[str] = set()
    if path.exists():
        check_settings(current, path)
        drop_unfinished_line(path)
        done = finished_prompts(path, prompts)
    check_prompts(sampler.tokenizer, prompts, cfg)
    write_json(meta_path(path), {"settings": current, **provenance()})
    _sample_all(sampler, prompts, done, cfg, path, modes)
    return path


def _sample_all(
    sampler: Engine,
    prompts: Sequence[Prompt],
    done: set[str],
    cfg: RunConfig,
    path: Path,
    modes: Sequence[str],
) -> None:
    """Sample the batches that lack a prompt, and append the prompts that are not there."""
    size = cfg.sample.prompts_per_batch
    tokens, start = 0, time.monotonic()
    with (
        path.open("a", encoding="utf-8") as file,
        tqdm(total=len(prompts), unit="prompt", desc="sample") as bar,
    ):
        for batch in range(0, -(-len(prompts) // size)):
            members = prompts[batch * size : (batch + 1) * size]
            if any(prompt.prompt_id not in done for prompt in members):
                # The whole batch again, so that its samples are those of an uninterrupted run.
                for record in sample_batch(sampler, members, batch, cfg, modes):
                    tokens += _count_tokens(record)
                    if record["prompt_id"] not in done:
                        file.write(json.dumps(record) + "\n")
                file.flush()
                bar.set_postfix_str(f"{tokens / (time.monotonic() - start):.0f} tokens/s")
            bar.update(len(members))


def _count_tokens(record: Mapping[str, Any]) -> int:
    return sum(
        len(response["ids"]) for mode in record["modes"].values() for response in mode["responses"]
    )
