"""The LM head: log-probabilities of targets and their gradients, as every library computes them.

Inputs, gate and modes are those of the group "logprobs".
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import head_cases
from benchmarks.head_cases import Forward, Inputs, differentiate, naive
from benchmarks.registry import Call, Case, Row, why_not
from bvpo_kernels import IGNORE_INDEX, linear_logprobs

MODES = head_cases.MODES
# Vocabulary columns of a tile of TRL's function, as its trainers call it.
TRL_COLUMNS = 32_768


def _row(
    name: str,
    forward: Forward | Callable[[Case], Forward],
    *,
    package: str = "",
    missing: Callable[[Case], str] = lambda _: "",
    predicted_bytes: Callable[[Case], int] = lambda _: 0,
    of_case: bool = False,
) -> Row:
    def make(case: Case, inputs: Inputs) -> Call:
        return differentiate(forward(case) if of_case else forward, case, inputs)  # type: ignore

    return Row(name, make, missing, predicted_bytes, modes=MODES, package=package)


def _on_gpu(package: str, module: str, reason: str) -> Callable[[Case], str]:
    def missing(case: Case) -> str:
        # Asked first: importing some of these needs a driver.
        return why_not(package, module) if case.device.startswith("cuda") else reason

    return missing


def trl_selective(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """All logits, then a log-softmax of one sequence at a time, in their dtype."""
    from trl.trainer.utils import selective_log_softmax

    scored = target != IGNORE_INDEX
    logits = (hidden @ weight.T).unflatten(0, (head_cases.SEQUENCES, -1))
    index = target.where(scored, 0).unflatten(0, (head_cases.SEQUENCES, -1))
    return selective_log_softmax(logits, index).flatten().where(scored, 0.0)


def trl_chunked(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """The function behind `fused_lm_head=True` of TRL's trainers."""
    from trl.kernels import ChunkedLogProbFunction

    # Every row is computed, as TRL does where it has no Triton.
    logprobs = ChunkedLogProbFunction.apply(
        hidden, weight, None, target.clamp(min=0), 1.0, TRL_COLUMNS, None, 1.0, ("log_probs",)
    )[0]
    return logprobs.where(target != IGNORE_INDEX, 0.0)


def _cce(case: Case) -> Forward:
    from cut_cross_entropy import linear_cross_entropy

    # Its own kernels are Triton's. This one forms all logits under torch.compile.
    kernel = "cce" if case.device.startswith("cuda") else "torch_compile"

    def forward(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return -linear_cross_entropy(
            hidden, weight, target, ignore_index=IGNORE_INDEX, reduction="none", impl=kernel
        )

    return forward


def _liger(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return -liger_fused_linear_cross_entropy(
        hidden, weight, target, ignore_index=IGNORE_INDEX, reduction="none"
    )


def _torch_core(chunked: bool) -> Forward:
    def forward(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        function = torch.nn.functional.linear_cross_entropy  # type: ignore[attr-defined]
        options = torch.nn.LinearCrossEntropyOptions() if chunked else None  # type: ignore[attr-defined]
        return -function(
            hidden, weight, target, ignore_index=IGNORE_INDEX, reduction="none", options=options
        )

    return forward


def _no_torch_core(_: Case) -> str:
    present = hasattr(torch.nn.functional, "linear_cross_entropy")
    return "" if present else f"torch {torch.__version__} has no linear_cross_entropy"


def _no_chunks(case: Case) -> str:
    if case.shape["V"] > 65_536 and not case.device.startswith("cuda"):
        return "minutes per call: 17 to 58 x naive at T=256 V=49152 on two cores"
    return _no_torch_core(case)


def _quack(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from quack.linear_cross_entropy import linear_cross_entropy_func

    return -linear_cross_entropy_func(
        hidden, weight, None, target, ignore_index=IGNORE_INDEX, reduction="none"
    )


def trl_missing(_: Case) -> str:
    """Why TRL cannot run here; '' when it can."""
    return why_not("trl", "trl.trainer.utils")


PEERS = (
    _row("torch.compile", lambda _: torch.compile(naive, dynamic=False), of_case=True,
         predicted_bytes=head_cases.naive_bytes),
    _row("TRL selective", trl_selective, package="trl", missing=trl_missing,
         predicted_bytes=head_cases.trl_bytes),
    _row("TRL chunked", trl_chunked, package="trl", missing=trl_missing),
    _row("cut-cross-entropy", _cce, package="cut-cross-entropy", of_case=True,
         missing=lambda _: why_not("cut-cross-entropy", "cut_cross_entropy"),
         predicted_bytes=head_cases.naive_bytes),
    _row("torch core", _torch_core(False), missing=_no_torch_core,
         predicted_bytes=head_cases.naive_bytes),
    _row("torch core chunked", _torch_core(True), missing=_no_chunks),
    _row("Liger", _liger, package="liger-kernel",
         missing=_on_gpu("liger-kernel", "liger_kernel.transformers.functional",
                         "its fused linear cross-entropy is a Triton kernel: a CUDA device")),
    _row("QuACK", _quack, package="quack-kernels",
         missing=_on_gpu("quack-kernels", "quack.linear_cross_entropy",
                         "its kernels are CuTe's: a CUDA device of Hopper or later")),
)  # fmt: skip
ROWS = (
    Row(
        "naive",
        lambda case, inputs: differentiate(naive, case, inputs),
        modes=MODES,
        predicted_bytes=head_cases.naive_bytes,
    ),
    *PEERS,
    _row("bvpo_kernels", linear_logprobs, package="bvpo_kernels"),
)
