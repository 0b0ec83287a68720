"""The figure, the table, the log reader, and the memory measurement."""

import json
import re
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from tiny_runs import make_cfg, make_trainer, make_units, tiny_model

from bvpo_kernels.packing import pack
from train.config import EstimateConfig
from train.model.head import FusedHeadLM
from train.runtime import report
from train.sizing import head_memory


def test_a_run_leaves_a_figure_and_prints_the_table(tmp_path, capsys):
    make_trainer(make_cfg(tmp_path), make_units(6), make_units(3, seed=3)).run()
    pixels = matplotlib.image.imread(tmp_path / "report.png")
    assert min(pixels.shape[:2]) > 500
    ink = (pixels[..., :3] < 0.98).any(-1)
    panels = [part for row in np.array_split(ink, 2) for part in np.array_split(row, 3, axis=1)]
    assert all(panel.mean() > 0.01 for panel in panels)
    out = capsys.readouterr().out
    assert "held-out pairs of 3 units" in out
    assert re.search(r"trace +loss +0\.6931 +0\.\d{4} +[+-]0\.\d{4}", out)


def test_panels_hold_the_logged_values():
    names = ("loss", "rewards/margins", "rewards/accuracies")
    metrics = {f"{kind}/{name}": 0.1 for kind in ("trace", "empty") for name in names}
    metrics |= {"alpha": 0.5, "grad_norm": 2.0, "lr": 1e-5, "tokens_per_second": 300.0}
    train = [{"step": step, **{k: v * step for k, v in metrics.items()}} for step in (1, 2, 3)]
    held_out = [{"step": step, **{k: v * step for k, v in metrics.items()}} for step in (1, 3)]
    panels = report.figure_of({"train": train, "eval": held_out}).axes
    per_kind = [(0.1, 3), (0.1, 2)] * 2
    expected = [per_kind] * 3 + [[(0.5, 3)], [(2.0, 3)], [(300.0, 3)], [(1e-5, 3)]]
    for axes, curves in zip(panels, expected, strict=True):
        lines = [line for line in axes.lines if line.get_linestyle() != ":"]  # ":" marks a level
        assert len(lines) == len(curves), axes.get_title(loc="left")
        for line, (slope, points) in zip(lines, curves, strict=True):
            assert len(line.get_xdata()) == points
            np.testing.assert_allclose(line.get_ydata(), slope * np.asarray(line.get_xdata()))


def test_figure_without_held_out_units(tmp_path):
    make_trainer(make_cfg(tmp_path), make_units(6)).run()
    assert (tmp_path / "report.png").stat().st_size > 20_000


def test_table_is_aligned_and_signed():
    before = {"trace/loss": 0.6931, "trace/rewards/accuracies": 0.5, "trace/rewards/margins": 0.1}
    after = {"trace/loss": 0.65, "trace/rewards/accuracies": 0.75, "trace/rewards/margins": -12.5}
    lines = report.before_after_table(before, after, 4).splitlines()
    assert lines[0] == "held-out pairs of 4 units"
    assert len({len(line) for line in lines[1:]}) == 1
    assert lines[-1].split() == ["trace", "margin", "0.1000", "-12.5000", "-12.6000"]
    assert len(lines) == 1 + 2 + 3  # no rows for a kind without pairs


def test_accuracy_of_ties_is_not_reported_as_zero():
    before = {"trace/rewards/accuracies": 0.0, "trace/rewards/margins": 0.0}
    after = {"trace/rewards/accuracies": 0.75, "trace/rewards/margins": 0.2}
    lines = report.before_after_table(before, after, 4).splitlines()
    assert lines[3].split() == ["trace", "accuracy", "tie", "0.7500"]
    events = {"train": [], "eval": [{"step": 0, **before}, {"step": 3, **after}]}
    accuracy = report.figure_of(events).axes[2].lines[1]
    assert accuracy.get_xydata().tolist() == [[3, 0.75]]


def test_log_refuses_nan_and_names_a_bad_line(tmp_path):
    with report.RunLog(tmp_path) as log:
        log.write("train", 1, {"loss": 0.5})
        with pytest.raises(ValueError, match="JSON compliant"):
            log.write("train", 2, {"loss": float("nan")})
    path = tmp_path / "log.jsonl"
    assert [line["loss"] for line in report.read_log(path)["train"]] == [0.5]
    path.write_text(path.read_text() + json.dumps({"event": "train"}) + "\n")
    with pytest.raises(ValueError, match=r"log\.jsonl:2: expected a line of a run's log"):
        report.read_log(path)


def test_naive_and_fused_head_compute_the_same():
    """What the memory of the two is measured on must be the same computation."""
    hidden, weight = torch.randn(20, 16), torch.randn(50, 16)
    target = torch.randint(50, (20,))
    gradients = []
    for head in head_memory.HEADS:
        inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        head_memory._step(head, *inputs, target)
        gradients.append([tensor.grad for tensor in inputs])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_head_memory_is_measured_apart():
    """512 rows x 20 000 columns: bf16 logits alone take 20 MiB, the fp32 copy 39 MiB."""
    model = tiny_model(vocab_size=20_000)
    policy = FusedHeadLM(model, compute_dtype=torch.bfloat16, workspace_bytes=2**22)
    batch = pack(make_units(30))
    line = head_memory.compare(policy, batch)
    naive, fused = map(int, re.search(r"naive (\d+) MiB, fused (\d+) MiB", line).groups())
    rows = int((batch.target_T >= 0).sum())
    assert f"of {rows} rows (D=32, V=20000, bfloat16)" in line
    assert naive >= rows * 20_000 * 4 / 2**20
    assert fused < naive


def test_time_goes_on_after_a_resume(tmp_path):
    """As if an hour had passed before, and the last line before the kill was of a later step."""
    lines = [{"event": "train", "step": step, "time": 1800.0 * step} for step in (1, 2, 3)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with report.RunLog(tmp_path, step=2) as log:
        log.write("train", 3, {})
    times = [line["time"] for line in report.read_log(tmp_path / "log.jsonl")["train"]]
    assert times[:2] == [1800.0, 3600.0]
    assert 3600.0 < times[2] < 3660.0
    with report.RunLog(tmp_path) as log:
        log.write("train", 1, {})
    (line,) = report.read_log(tmp_path / "log.jsonl")["train"]
    assert line["time"] < 60.0


def test_the_figure_carries_the_name_of_the_run(tmp_path, monkeypatch):
    folder = tmp_path / "runs" / "wide $x$"
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text('{"event": "train", "step": 1, "alpha": 0.5}\n')
    figures = []
    made = report.figure_of
    monkeypatch.setattr(
        report, "figure_of", lambda *args: figures.append(made(*args)) or figures[0]
    )
    report.draw(folder / "log.jsonl", folder / "report.png")
    assert figures[0].get_suptitle().endswith("runs/wide $x$")


# Keys of runs that are not made below: with extra traces, or where a* is on its way.
ELSEWHERE = {
    "ess",
    "bias_t_sq",
    "bias_e_sq",
    "units_lacking_a_kind",
    "alpha_determined",
    "alpha_next",
    "alpha_credibility",
    "alpha_units",
    "alpha_units_needed",
    "alpha_warmup_left",
    "B_mix",
    "kappa",
    "alpha_se",
    "alpha_lo",
    "alpha_hi",
    "mfu",
}
STAGES = {"data", "reference", "forward", "backward", "optimizer", "statistics", "checkpoint"}


def documented():
    """Keys of the manual's two tables."""
    text = Path("train/README.md").read_text(encoding="utf-8")
    section = text.partition("Keys of `log.jsonl`")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`[^|]*`) \|", section, re.MULTILINE)
    return {key for cell in cells for key in re.findall(r"`([^`]+)`", cell)}


def test_every_key_of_the_log_is_in_the_manual(tmp_path):
    cfg = make_cfg(tmp_path, tail_tolerance=0.01)
    cfg.checkpoint.every, cfg.alpha.estimate = 1, EstimateConfig(warmup=1)
    make_trainer(cfg, make_units(6), make_units(2, seed=3)).run()
    events = report.read_log(tmp_path / "log.jsonl")
    logged = {key for lines in events.values() for line in lines for key in line}
    stages = {key.partition("/")[2] for key in logged if key.startswith("seconds/")}
    assert stages == STAGES
    keys = {re.sub(r"^(trace|empty)/", "KIND/", key) for key in logged}
    keys = {re.sub(r"^seconds/.*", "seconds/STAGE", key) for key in keys}
    assert keys - documented() == set()
    assert documented() - keys <= ELSEWHERE
