"""Training runs side by side."""

import json

import pandas as pd
import pytest

pytest.importorskip("train.runtime.report")

from benchmarks import compare_runs


def test_table_and_figure(tmp_path, monkeypatch):
    for name, shift in (("exact", 0.0), ("sparse", 0.25)):
        lines = [
            {
                "event": "train",
                "step": step,
                "loss": 1.0 / step + shift,
                "seconds/backward": 2.0,
                "seconds/forward": 1.0,
                **({"tail/dense_share": 0.5} if shift else {}),
            }
            for step in (1, 2)
        ]
        lines.append({"event": "eval", "step": 2, "trace/loss": 0.7 + shift})
        (tmp_path / name).mkdir()
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name / "log.jsonl").write_text(text)
    out = tmp_path / "figure"
    runs = [str(tmp_path / name) for name in ("exact", "sparse")]
    monkeypatch.setattr("sys.argv", ["compare_runs", *runs, "--out", str(out)])
    compare_runs.main()
    table = pd.read_csv(out.with_suffix(".csv")).set_index("run")
    assert table.loc["exact", "loss"] == 0.5
    assert table.loc["sparse", "held-out trace/loss"] == 0.95
    assert table.loc["sparse", "dense share"] == 0.5
    assert table.loc["sparse", "s/step"] == 3.0
    assert out.with_suffix(".png").stat().st_size > 1000
