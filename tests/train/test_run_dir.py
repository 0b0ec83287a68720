"""A second run in a used folder replaces nothing, and a refused one leaves everything as it was."""

import pytest
from tiny_runs import inputs_of, make_cfg, make_trainer, make_units, tiny_model

from train import trainer as loop
from train.model.head import FusedHeadLM
from train.runtime import report
from train.runtime.run_dir import check_run_dir, set_aside


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A picture with nothing in it: drawing takes most of the time of so short a run."""
    monkeypatch.setattr(report, "draw", lambda log, image: image.write_bytes(log.read_bytes()))


def contents(folder):
    """Bytes by name, of what a run leaves."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def run(run_dir, lr=1e-3, **options):
    cfg = make_cfg(run_dir, max_steps=2)
    cfg.optim.lr = lr
    for name, value in options.items():
        setattr(cfg.checkpoint, name, value)
    return make_trainer(cfg, make_units(4)).run()


def test_what_an_earlier_run_left_steps_aside(tmp_path, capsys):
    run(tmp_path)
    (tmp_path / "pairs.jsonl").write_text("the user's")
    first = contents(tmp_path)
    assert {"config.yaml", "log.jsonl", "report.png", "model/model.safetensors"} <= first.keys()
    assert "earlier run" not in capsys.readouterr().out
    run(tmp_path, lr=2e-3)
    said = f"what an earlier run left in {tmp_path} is now in {tmp_path / 'previous-1'}\n"
    assert said in capsys.readouterr().out
    second = contents(tmp_path)
    stays = ("pairs.jsonl", "reference")
    for name, value in first.items():
        place = name if name.startswith(stays) else f"previous-1/{name}"
        assert second[place] == value, name
    for name in ("config.yaml", "log.jsonl", "model/model.safetensors"):
        assert second[name] != first[name]
    run(tmp_path)
    third = contents(tmp_path)
    for name in ("config.yaml", "log.jsonl", "model/model.safetensors"):
        assert third[f"previous-1/{name}"] == first[name]
        assert third[f"previous-2/{name}"] == second[name]


@pytest.mark.parametrize("name", ["log.jsonl", "report.png", "model", "adapter"])
def test_each_result_alone_is_kept(tmp_path, name):
    """Of a run that was killed, or that somebody tidied up after."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "file").write_text("kept")
    (tmp_path / "config.yaml").write_text("its options")
    assert set_aside(tmp_path) == tmp_path / "previous-1"
    kept = {f"previous-1/{name}/file": b"kept", "previous-1/config.yaml": b"its options"}
    assert contents(tmp_path) == kept
    assert set_aside(tmp_path) is None


def test_a_new_folder_has_nothing_to_keep(tmp_path):
    assert set_aside(tmp_path / "none") is None
    for name in ("pairs.jsonl", "responses.jsonl", "reference.safetensors", "config.yaml"):
        (tmp_path / name).touch()
    assert set_aside(tmp_path) is None
    assert len(list(tmp_path.iterdir())) == 4


def test_the_same_run_is_no_second_one(tmp_path):
    """A finished run with checkpoints goes on from its end: nothing steps aside."""
    run(tmp_path, every=1)
    before = contents(tmp_path)
    run(tmp_path, every=1)
    after = contents(tmp_path)
    same = ("log.jsonl", "model/", "config.yaml")
    assert not [name for name in after if name.startswith("previous")]
    assert all(after[n] == value for n, value in before.items() if n.startswith(same))


def test_a_refused_run_changes_nothing(tmp_path, monkeypatch):
    run(tmp_path, every=1)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"optim\.lr: expected 0\.5 \(this command\)"):
        run(tmp_path, lr=0.5)
    with pytest.raises(ValueError, match=r"checkpoint\.resume"):
        run(tmp_path, resume=False)
    assert contents(tmp_path) == before


def test_a_dry_run_changes_nothing(tmp_path, monkeypatch):
    run(tmp_path)
    before = contents(tmp_path)
    cfg = make_cfg(tmp_path, max_steps=2)
    cfg.optim.lr, cfg.dry_run = 0.5, True
    monkeypatch.setattr(loop, "load_inputs", lambda cfg: inputs_of(make_units(4)))
    monkeypatch.setattr(loop, "build_policy", lambda cfg, world: (FusedHeadLM(tiny_model()), None))
    loop.run(cfg)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["model", "adapter", "model/sub"])
def test_the_model_that_is_trained_does_not_lie_where_it_would_be_moved(tmp_path, name):
    cfg = make_cfg(tmp_path / "run")
    cfg.model.name = str(tmp_path / "run" / name)
    with pytest.raises(
        ValueError, match=r"run_dir: expected another folder than that of model\.na"
    ):
        check_run_dir(cfg)
    with pytest.raises(ValueError, match=r"choose another run_dir"):
        loop.run(cfg)
    for other in (tmp_path / "other" / name, tmp_path / "run" / "export", tmp_path / "run"):
        cfg.model.name = str(other)
        check_run_dir(cfg)
