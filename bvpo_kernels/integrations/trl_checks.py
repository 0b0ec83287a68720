"""What `BVPOConfig` and `BVPOTrainer` find out before the first step."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

import torch
from torch import Tensor, nn

from bvpo_kernels import checks
from bvpo_kernels.grad_stats.collect import Cross, Mode
from bvpo_kernels.grad_stats.modules import in_mode
from bvpo_kernels.integrations.dropout import dropout_fields
from bvpo_kernels.integrations.scoring import require_separate_segments
from bvpo_kernels.mixing.moments import MIN_UNITS

# Sizes of accelerate's ParallelismConfig whose ranks share the units of a batch.
_SHARED = ("tp_size", "cp_size", "sp_size")


def check_estimate(args: Any) -> None:
    """Raise ValueError or TypeError, naming the option with which a* could not be measured."""
    for name in ("alpha", "alpha_low", "alpha_high"):
        expected = "a number in (0, 1) with estimate_alpha: both kinds need a gradient to measure"
        checks.number(name, getattr(args, name), lambda a: 0 < a < 1, expected)
    if args.alpha_low > args.alpha_high:
        raise ValueError(
            f"alpha_low: expected at most alpha_high = {args.alpha_high}, got {args.alpha_low}"
        )
    checks.number("alpha_halflife", args.alpha_halflife, lambda h: h > 0, "a number of steps > 0")
    for name, least in (("alpha_warmup", 0), ("sketch_size", 1)):
        value = getattr(args, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: expected an int >= {least}, got {value!r}")
    for name, allowed in (("stats_mode", get_args(Mode)), ("stats_cross", get_args(Cross))):
        if getattr(args, name) not in allowed:
            raise ValueError(f"{name}: expected one of {allowed}, got {getattr(args, name)!r}")
    parallel = getattr(args, "parallelism_config", None)
    sizes = {name: getattr(parallel, name, 1) for name in _SHARED}
    if max(sizes.values()) > 1:
        raise ValueError(
            f"parallelism_config: expected sizes of 1 with estimate_alpha, whose ranks have units "
            f"of their own, got {sizes}"
        )
    check_units(args, args.per_device_train_batch_size)


def check_units(args: Any, batch_size: int, rows: int | None = None) -> None:
    """Raise ValueError unless the steps of a run have the units from which a* is measured.

    Args:
        batch_size: rows in a micro-batch on one rank.
        rows: those of the dataset, where it is known.
    """
    ranks, parts = args.world_size, args.gradient_accumulation_steps
    if batch_size * parts * ranks < MIN_UNITS:
        raise ValueError(
            f"per_device_train_batch_size: expected at least {MIN_UNITS} units in a step with "
            f"estimate_alpha, got {batch_size} x {parts} gradient_accumulation_steps on {ranks} "
            f"process(es)"
        )
    if args.stats_mode == "exact" and args.stats_cross == "none" and parts * ranks > 1:
        raise ValueError(
            f"stats_cross: 'none' measures one micro-batch on one process in a step, got {parts} "
            f"gradient_accumulation_steps on {ranks} process(es); expected 'sketch' or 'exact'"
        )
    if rows is not None and rows < MIN_UNITS:
        raise ValueError(
            f"train_dataset: expected at least {MIN_UNITS} rows with estimate_alpha, got {rows}"
        )
    whole = batch_size * ranks
    filled = ranks > 1 and not args.dataloader_drop_last
    if rows is not None and filled and rows % whole and rows < whole * parts:
        raise ValueError(
            f"train_dataset: expected a multiple of {whole} rows, or more than {whole * parts}, "
            f"with estimate_alpha, got {rows}: rows are repeated in every step, to serve {ranks} "
            f"processes"
        )


def align_reference(policy: Any, reference: Any, given: bool) -> None:
    """Policy and reference compute alike: the same dtype of the weights, the same attention.

    A reference that TRL made follows the policy; one that was given is left as it is, with a
    warning that rewards then start off 0 by rounding.
    """
    want, got = policy.config._attn_implementation, reference.config._attn_implementation
    if not given:
        # Tensor by tensor: some stay in fp32 whatever a model is loaded in, as rotary frequencies.
        dtypes = {name: t.dtype for name, t in _tensors(policy)}
        for name, tensor in _tensors(reference):
            if tensor.is_floating_point() and name in dtypes:
                tensor.data = tensor.data.to(dtypes[name])
        if got != want:
            reference.set_attn_implementation(want)
        return
    differences = [("dtype", policy.dtype, reference.dtype), ("attn_implementation", want, got)]
    for name, ours, theirs in differences:
        if ours != theirs:
            warnings.warn(
                f"ref_model: expected the {name} of model, {ours}, got {theirs}: the two are "
                f"rounded differently, so that rewards do not start at 0",
                stacklevel=2,
            )


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return itertools.chain(model.named_parameters(), model.named_buffers())


def computes_alike(model: Any, checked: Any) -> bool:
    """Whether two models are of one class and one configuration: what was checked for one of them
    then holds for both."""
    own = ("dtype", "_name_or_path")
    first, second = ({**m.config.to_dict(), **dict.fromkeys(own)} for m in (model, checked))
    return type(model) is type(checked) and first == second


@contextmanager
def probing(model: Any) -> Iterator[None]:
    """`model` with an attention that a few tokens can go through as the model is now: kernels of
    flash attention read neither fp32 nor tensors on the host, and autocast and wrappers, which
    will see to both, are not there yet."""
    own = model.config._attn_implementation or ""
    ready = model.device.type != "cpu" and model.dtype in (torch.bfloat16, torch.float16)
    if "flash" not in own or ready:
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(own)


@torch.no_grad()
def require_trainable(model: Any) -> None:
    """Scores in the mode that trains are the same each time, and a segment's are its own.

    Raises:
        ValueError: naming the model's class (noise of its own in training, state-space layers,
            absolute positions...).
    """
    if any(p.is_meta or not p.numel() for p in model.parameters()):
        return
    vocab, device = model.config.get_text_config().vocab_size, model.device
    ids = torch.tensor([[(7919 * n + 11) % vocab for n in range(9)]], device=device)

    def score() -> Tensor:
        options = {"use_cache": False, "shift_labels": ids, "fused_lm_head": True}
        return model(input_ids=ids, attention_mask=None, **options).log_probs[0]

    with in_mode(model, training=True):
        before = _generators(device)
        first, again = score(), score()
        drew = not all(map(torch.equal, before, _generators(device)))
        # Kernels that add in no fixed order differ by rounding, and draw nothing.
        if drew and not torch.equal(first, again):
            raise ValueError(
                f"model: {type(model).__name__} draws random numbers in training, in a form of "
                f"dropout that could not be switched off (it has "
                f"{dropout_fields(model.config) or 'no field of that name'}); policy and reference "
                f"must differ in their weights only"
            )
        require_separate_segments(model, training=True)


def _generators(device: torch.device) -> list[Tensor]:
    cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *cuda]
