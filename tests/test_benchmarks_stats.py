"""Group "stats" of the benchmarks and its peers, the figures, and the table of the proxies."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from benchmarks import ghost, proxies, readme, records, run, verify
from benchmarks.groups import stats
from benchmarks.registry import Case, why_not
from bvpo_kernels.types import EMPTY, TRACE

SIZES = {"B": 2, "D": 64, "V": 512}
CASE = Case({"R": 8, "L": 2, **SIZES}, rounds=1)
SMALL = Case({"R": 16, "L": 1, **SIZES}, rounds=1)


@pytest.fixture(scope="module")
def inputs():
    return stats.make_inputs(CASE)


@pytest.fixture(scope="module")
def gate(inputs):
    return stats.gate(CASE, inputs)


@pytest.mark.parametrize("name", ["exact", "exact+sketch", "exact+sums", "loop"])
def test_rows_of_the_exact_numbers_pass_the_gate(name, inputs, gate):
    outputs = stats.GROUP.row(name).make(CASE, gate.inputs)()
    assert verify.judge(outputs, gate).failure == ""
    outputs["gram"][0, 0, 0] *= 1.01
    assert "gram" in verify.judge(outputs, gate).failure


@pytest.mark.skipif(bool(why_not("opacus", "opacus.grad_sample")), reason="opacus")
def test_ghost_clipping_gives_the_norms_of_the_same_gradients(inputs):
    """The peer measures what it is compared with: |g| of each unit and kind, the head untied."""
    torch.manual_seed(0)
    policy = stats.FusedHeadLM(ghost.untied(inputs.policy.model).double())
    gram_BKK = stats.loop_gram(policy, inputs.units, "cpu")
    pairs = [unit.pairs[kind][0] for unit in inputs.units for kind in (TRACE, EMPTY)]
    norms = ghost.norms(policy.model, pairs, "cpu")()
    torch.testing.assert_close(
        norms.double(), gram_BKK.diagonal(dim1=1, dim2=2).flatten().sqrt(), rtol=1e-6, atol=0
    )


def test_figure_and_table(tmp_path):
    """Results of both kinds of cases, measured in two parts that `update` puts together."""
    group = replace(stats.GROUP, cases=(CASE, SMALL))
    for rows in ("^exact$", "norm"):
        run.run_group(group, out=tmp_path, rows=rows, update=True, no_memory=True)
    frame = records.read_csv(tmp_path / "stats.csv")
    assert list(frame["row"].unique()) == ["none", "exact", "norm"]
    assert (frame.groupby(["case", "row", "metric"]).size() == 1).all()
    assert "peak_memory" not in set(frame["metric"])
    assert (tmp_path / "stats.png").read_bytes().startswith(b"\x89PNG")
    header, _, *lines = readme.stats_table(frame).splitlines()[2:7]
    assert [cell.strip() for cell in header.strip("|").split("|")][-2:] == ["16 tokens", ""]
    assert [line.split("|")[1].strip() for line in lines] == ["none", "exact", "norm"]
    assert lines[0].split("|")[3].strip() == "0.0 %"


def test_proxies_are_compared_up_to_a_factor():
    """A mode that is half of exact is perfect; one that is noise around it has that error."""
    exact = torch.linspace(1.0, 2.0, 8)
    noise = torch.tensor([1.0, -1.0] * 4) * 0.1
    lines = []
    for mode in proxies.MODES:
        values = {"sketch": exact + noise, "norm": exact / 2}.get(mode, exact)
        for name in proxies.PRODUCTS:
            lines += [
                {"mode": mode, "unit": str(unit), "quantity": name, "value": value.item()}
                for unit, value in enumerate(values)
            ]
        for name in ("a*", "a* low", "a* high", "kappa"):
            lines.append({"mode": mode, "unit": "all", "quantity": name, "value": 0.5})
    frame = pd.DataFrame(lines).assign(compute_dtype="float32", **records.environment(1))
    table = proxies.summarise(frame).set_index("mode")
    name = "|t|^2"
    assert table.loc["norm", f"{name}: r"] == pytest.approx(1.0)
    assert table.loc["norm", f"{name}: factor"] == pytest.approx(2.0)
    assert table.loc["norm", f"{name}: error / spread"] == pytest.approx(0.0, abs=1e-6)
    expected = float(noise.std() / exact.std())
    assert table.loc["sketch", f"{name}: error / spread"] == pytest.approx(expected, rel=0.1)
    text = proxies.markdown(frame)
    assert "8 units" in text
    assert "| norm" in text
    assert "0.500 [0.500, 0.500]" in text
