"""Group "tail": the certified sparse backward against the exact one and naive code.

Modes are kinds of tokens (`benchmarks/token_profiles.py`): "peaked" (80 % with p > .99),
"reasoning" (entropies of Qwen3-8B's chains of thought), "flat" (nothing to gain) and "smollm2" (its
own samples). Forward and backward, hidden and weight trained; rows are tolerances.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from benchmarks import head_cases, plot, token_profiles
from benchmarks.head_cases import Inputs
from benchmarks.registry import Call, Case, Gate, Group, Outputs, Row
from bvpo_kernels import linear_logprobs
from bvpo_kernels.backends import MISSING
from bvpo_kernels.head import tail_certificates

EXPONENTS = range(5, 13)


def make_inputs(case: Case) -> Inputs:
    """Upstream gradients are +1 and -1, as DPO gives a batch of fresh pairs, up to a factor."""
    tokens, dim, vocab = (case.shape[key] for key in "TDV")
    if case.mode == "smollm2" and vocab == head_cases.SMOLLM2["V"]:
        hidden, weight, target = token_profiles.smollm2(tokens)
    else:
        profile = "reasoning" if case.mode == "smollm2" else case.mode
        hidden, weight, target = token_profiles.synthetic(profile, tokens, dim, vocab, case.device)
    generator = torch.Generator().manual_seed(0)
    sign = torch.randint(2, (len(target),), generator=generator) * 2.0 - 1
    return Inputs(hidden, weight, target, sign.to(case.device))


def _trained(case: Case) -> Case:
    return replace(case, mode="trained")


def _impl(case: Case) -> str:
    return "cpp" if case.device == "cpu" else "triton"


def _forward(tolerance: float, impl: str) -> head_cases.Forward:
    def forward(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return linear_logprobs(hidden, weight, target, tail_tolerance=tolerance, impl=impl)

    return forward


def _make(tolerance: float, case: Case, inputs: Inputs) -> Call:
    return head_cases.differentiate(_forward(tolerance, _impl(case)), _trained(case), inputs)


def _certified(tolerance: float, case: Case, inputs: Inputs) -> Call:
    """What the gate runs: the bounds go with the results."""
    call = _make(tolerance, case, inputs)

    def certified() -> Outputs:
        with tail_certificates() as log:
            outputs = call()
        (certificate,) = log
        bounds = {
            "dhidden": certificate.dhidden_bound_T.norm(),
            "dweight": certificate.dweight_bound,
            "dweight_rest": certificate.dweight_bound,
        }
        return outputs | {f"bound:{name}": bound for name, bound in bounds.items()}

    return certified


def _facts(tolerance: float, case: Case, inputs: Inputs) -> dict[str, float]:
    """What the certificate says of the timed call."""
    with tail_certificates() as log:
        outputs = _make(tolerance, case, inputs)()
    (certificate,) = log
    tokens = float(certificate.num_tokens)
    return {
        "dense_share": float(certificate.num_dense) / tokens,
        "entries_per_token": float(certificate.num_entries) / tokens,
        "max_bound": float(certificate.max_bound),
        "relative_bound:dweight": float(certificate.dweight_bound / outputs["dweight"].norm()),
    }


def _profile(case: Case, inputs: Inputs) -> dict[str, float]:
    """How sure the tokens are."""
    with torch.no_grad():
        logp, entropy = linear_logprobs(
            inputs.hidden_TD, inputs.weight_VD, inputs.target_T, return_entropy=True
        )
    return {
        "share_p99": float((logp > -0.01005).float().mean()),
        "share_entropy_below_0.01": float((entropy < 0.01).float().mean()),
        "entropy_p80": float(entropy.quantile(0.8)),
        "mean_nll": -float(logp.mean()),
    }


def _sparse_row(exponent: int) -> Row:
    tolerance = 2.0**-exponent
    return Row(
        f"2^-{exponent}",
        lambda case, inputs: _make(tolerance, case, inputs),
        missing=lambda case: MISSING[_impl(case)],
        facts=lambda case, inputs: _facts(tolerance, case, inputs),
        make_certified=lambda case, inputs: _certified(tolerance, case, inputs),
    )


def gate(case: Case, inputs: Inputs) -> Gate:
    """That of `logprobs`; upstream gradients there are +1 and -1 too."""
    return head_cases.gate(_trained(case), inputs)


def _values(frame: pd.DataFrame, case: str, metric: str) -> dict[str, float]:
    chosen = frame[(frame["case"] == case) & (frame["metric"] == metric)]
    return dict(zip(chosen["row"], chosen["value"].astype(float), strict=True))


def draw(frame: pd.DataFrame, path: Path) -> None:
    """Per case: time relative to the exact backward, and the errors, against the tolerance."""
    cases = list(frame["case"].unique())
    with plot.drawing(path, (3.2 * len(cases) + 1, 6)) as figure:
        panels: Any = figure.subplots(2, len(cases), squeeze=False, sharex=True)
        for (top, bottom), case in zip(panels.T, cases, strict=True):
            _draw_case(frame, case, top, bottom)
        panels[0, 0].set_ylabel("time / exact")
        panels[1, 0].set_ylabel("relative error against fp64")
        first = frame.iloc[0]
        figure.suptitle(f"tail: {plot.machine(first)}", fontsize=9)


def _draw_case(frame: pd.DataFrame, case: str, top: Any, bottom: Any) -> None:
    time, dense = _values(frame, case, "ratio"), _values(frame, case, "dense_share")
    exact = time.get("exact", float("nan"))
    rows = [row for row in time if row.startswith("2^")]
    places = [int(row.removeprefix("2^-")) for row in rows]
    top.plot(places, [time[row] / exact for row in rows], marker="o", label="sparse")
    top.axhline(1.0, color="black", linewidth=0.8, label="exact")
    top.axhline(1 / exact, color="C3", linewidth=0.8, linestyle="--", label="naive")
    top.plot(places, [dense[row] for row in rows], color="grey", linestyle=":", label="dense share")
    top.set_ylim(bottom=0)
    top.set_title(case, fontsize=7)
    top.legend(fontsize=6)
    for index, name in enumerate(("dhidden", "dweight")):
        error = _values(frame, case, f"relative_error:{name}")
        color = f"C{index}"
        bottom.plot(places, [error[row] for row in rows], marker="o", color=color, label=name)
        bottom.axhline(error.get("exact", float("nan")), color=color, linestyle="--", linewidth=0.8,
                       label=f"{name}, exact")  # fmt: skip
    bottom.set_yscale("log")
    bottom.set_xticks(places, [f"$2^{{-{place}}}$" for place in places], fontsize=7)
    bottom.set_xlabel("tail_tolerance")
    bottom.legend(fontsize=6)


def _case(tokens: int, model: dict[str, int], mode: str, rounds: int) -> Case:
    return Case({"T": tokens, **model}, "bfloat16", mode, rounds=rounds)


GROUP = Group(
    name="tail",
    title="the certified sparse backward by tolerance, against the exact one and naive code",
    cases=(
        _case(1024, head_cases.SMOLLM2, "smollm2", 3),
        _case(512, head_cases.QWEN25, "peaked", 3),
        _case(512, head_cases.QWEN25, "reasoning", 3),
        _case(512, head_cases.QWEN25, "flat", 3),
    ),
    quick=(
        _case(512, head_cases.SMOLLM2, "smollm2", 3),
        _case(512, {"D": 576, "V": 49_152}, "reasoning", 3),
    ),
    rows=(
        Row("naive", lambda case, inputs: head_cases.differentiate(
            head_cases.naive, _trained(case), inputs), facts=_profile),
        Row("exact", lambda case, inputs: _make(0.0, case, inputs),
            missing=lambda case: MISSING[_impl(case)]),
        *(_sparse_row(exponent) for exponent in EXPONENTS),
    ),
    make_inputs=make_inputs,
    gate=gate,
    tiny=head_cases.tiny,
    memory=False,
    draw=draw,
)  # fmt: skip
