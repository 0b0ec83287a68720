"""Tiny random models, hand-made units, and the naive computation that they are compared with."""

import json
import random
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, LlamaConfig

from bvpo_kernels.types import KINDS, TokenPair, Unit
from train.config import ModelConfig, RunConfig, TrainConfig
from train.inputs import Inputs
from train.model.adapters import base_model, base_name, is_adapter, merged
from train.model.head import FusedHeadLM
from train.preferences.pairs import PairSet
from train.trainer import Trainer

VOCAB = 97
# A large initializer range, so that attention and head are far from uniform.
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tiny_model(config_class=LlamaConfig, dtype=torch.float32, attention="sdpa", **options):
    torch.manual_seed(1)
    config = config_class(**{**SIZES, **options})
    config._attn_implementation = attention
    return AutoModelForCausalLM.from_config(config).to(dtype)


def make_units(count: int, seed: int = 0, kinds=KINDS) -> list[Unit]:
    """Units of random ids; lengths differ, one token and unequal responses included."""
    rng = random.Random(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, VOCAB) for _ in range(rng.randint(low, high)))

    def pair(length: int) -> TokenPair:
        return TokenPair(ids(1, 6), ids(1, length), ids(1, length))

    lengths = {"trace": 20, "empty": 8}
    return [
        Unit(f"unit-{number}", {kind: (pair(lengths[kind]),) for kind in kinds})
        for number in range(count)
    ]


def lacking(unit: Unit, kind: str) -> Unit:
    """The unit without its pairs of a kind."""
    return Unit(unit.unit_id, {k: pairs for k, pairs in unit.pairs.items() if k != kind})


def make_cfg(run_dir: Path, **train) -> RunConfig:
    cfg = RunConfig(run_dir=str(run_dir))
    cfg.model = ModelConfig(name="tiny", compute_dtype="float32")
    options = {"units_per_step": 4, "tokens_per_micro_batch": 160, "max_steps": 3}
    cfg.train = TrainConfig(**{**options, **train})
    cfg.optim.lr = 1e-3
    return cfg


def record_of(unit: Unit) -> dict:
    """A unit as a line of a file of pairs."""
    fields = ("prompt", "chosen", "rejected")
    pairs = {
        kind: [{f"{name}_ids": list(getattr(pair, name)) for name in fields} for pair in of_kind]
        for kind, of_kind in unit.pairs.items()
    }
    return {"unit_id": unit.unit_id, "pairs": pairs}


def inputs_of(training, held_out=()) -> Inputs:
    """What `load_inputs` makes of a file of these units."""
    units = (*training, *held_out)
    lines = {unit.unit_id: f"pairs.jsonl:{n}" for n, unit in enumerate(units, 1)}
    return Inputs(PairSet(units, {}, Path("pairs.jsonl"), lines), [*training], [*held_out])


def make_trainer(cfg: RunConfig, units, held_out=(), model=None) -> Trainer:
    policy = FusedHeadLM(
        tiny_model() if model is None else model,
        compute_dtype=getattr(torch, cfg.model.compute_dtype),
        tail_tolerance=cfg.train.tail_tolerance,
    )
    return Trainer(cfg, policy, None, units, list(held_out))


def merged_weights(model) -> dict[str, Tensor]:
    """What `export` saves of a model with adapters, by name; every rank calls."""
    base = base_model(model)
    return {
        base_name(name): merged(base, name, tensor)
        for name, tensor in base.state_dict().items()
        if not is_adapter(name)
    }


def read_lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


def naive_score(model, prompt, response) -> Tensor:
    """sum_t log softmax(logits_t)[y_t] over the response, the segment alone, all logits."""
    tokens = torch.tensor([[*prompt, *response]])
    logits = model(input_ids=tokens, use_cache=False).logits[0]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logp = logits[len(prompt) - 1 : -1].to(dtype).log_softmax(-1)
    return logp.gather(1, tokens[0, len(prompt) :, None]).sum()


def naive_padded_scores(model, pair: TokenPair) -> tuple[Tensor, Tensor]:
    """Scores of chosen and rejected as one padded batch with an attention mask."""
    rows = [[*pair.prompt, *pair.chosen], [*pair.prompt, *pair.rejected]]
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    logp = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits.log_softmax(-1)
    picked = logp[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    first = len(pair.prompt) - 1
    return tuple(picked[i, first : len(rows[i]) - 1].sum() for i in range(2))  # type: ignore


def naive_kind_loss(model, reference, units, kind: str, beta: float) -> Tensor:
    """Mean DPO loss of a kind, pair by pair."""
    losses = []
    for unit in units:
        for pair in unit.pairs[kind]:
            chosen, rejected = naive_padded_scores(model, pair)
            with torch.no_grad():
                ref_chosen, ref_rejected = naive_padded_scores(reference, pair)
            losses.append(-logsigmoid(beta * (chosen - ref_chosen - rejected + ref_rejected)))
    return torch.stack(losses).mean()
