"""The gate: a row is timed only if it is as accurate as naive code in the same dtype."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.registry import Gate, Outputs
from bvpo_kernels.oracles import testing


@dataclass(frozen=True)
class Error:
    """Against fp64: largest difference, and Euclidean norm relative to the oracle's."""

    largest: float
    relative: float


@dataclass(frozen=True)
class Verdict:
    """`failure` says which outputs are wrong and by how much; '' when the row passes."""

    errors: dict[str, Error]
    failure: str


def judge(outputs: Outputs, gate: Gate) -> Verdict:
    """Compare what a row returned for `gate.inputs` with the oracle, output by output.

    The tolerance, `oracles.testing.assert_accurate`, is twice (naive error plus an ulp), and the
    `bound:NAME` that the row states for NAME.
    """
    selected = gate.select(outputs)
    missing = sorted(gate.oracle.keys() - selected.keys())
    failures = [f"{name}: not returned" for name in missing]
    errors = {}
    for name in sorted(gate.oracle.keys() & selected.keys()):
        actual, oracle = selected[name], gate.oracle[name]
        norm = float(oracle.norm())
        errors[name] = Error(
            testing.max_error(actual, oracle),
            testing.norm_error(actual, oracle) / norm if norm > 0 else 0.0,
        )
        try:
            bound = float(outputs.get(f"bound:{name}", 0.0))
            testing.assert_accurate(name, actual, gate.baseline[name], oracle, bound)
        except AssertionError as error:
            failures.append(str(error))
    return Verdict(errors, "; ".join(failures))
