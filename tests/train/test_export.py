"""Exported folders against `save_pretrained`, whole and sharded, and the command."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from processes import run_processes
from safetensors import safe_open
from test_checkpoint import truncate, world_of_two
from tiny_chat import make_tokenizer, save_causal_lm
from tiny_runs import make_cfg, tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig

from train.alpha import FixedAlpha
from train.checkpoint.checkpoint import Checkpointer
from train.checkpoint.state import TrainState
from train.config import CheckpointConfig, ExportConfig
from train.model import export
from train.model.export import save_model
from train.model.head import build_policy
from train.reference import weights_digest
from train.runtime.parallel import ALONE
from train.trainer import build_optimizer

IDS = torch.arange(3, 15)[None]
MODELS = {
    "tied": partial(tiny_model, tie_word_embeddings=True),
    "untied": tiny_model,
    "experts": partial(
        tiny_model, MixtralConfig, num_local_experts=2, num_experts_per_tok=2, head_dim=None
    ),
}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def assert_same_weights(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("max_shard_size", ["5GB", 20_000])
@pytest.mark.parametrize("name", MODELS)
def test_the_folder_is_that_of_save_pretrained(tmp_path, name, max_shard_size):
    """Names, bytes, files and settings; tied weights once, experts in the form that is stored."""
    model = MODELS[name]()
    save_model(model, None, tmp_path / "ours", max_shard_size=max_shard_size)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=max_shard_size)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert_same_weights(weights(ours), weights(theirs))
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
    for file in ("config.json", "generation_config.json"):
        assert json.loads((ours / file).read_text()) == json.loads((theirs / file).read_text())
    if max_shard_size != "5GB":
        index = "model.safetensors.index.json"
        ours_index, theirs_index = (json.loads((f / index).read_text()) for f in (ours, theirs))
        assert ours_index["weight_map"] == theirs_index["weight_map"]
        assert len(set(ours_index["weight_map"].values())) > 2
    reloaded = AutoModelForCausalLM.from_pretrained(ours)
    with torch.no_grad():
        assert torch.equal(reloaded(IDS).logits, model.eval()(IDS).logits)


@pytest.mark.parametrize("name", MODELS)
def test_in_another_dtype(tmp_path, name):
    model = MODELS[name]()
    save_model(model, None, tmp_path / "ours", dtype=torch.bfloat16)
    assert "bfloat16" not in str(model.config.dtype)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert reloaded.dtype == torch.bfloat16
    for key, value in model.to(torch.bfloat16).state_dict().items():
        assert torch.equal(reloaded.state_dict()[key], value), key


def _save_sharded(folder: Path, name: str) -> None:
    model, mesh = MODELS[name](), init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    save_model(model, None, folder, world_of_two(), max_shard_size=20_000)


@pytest.mark.parametrize("name", MODELS)
def test_sharded_over_ranks(tmp_path, name):
    assert run_processes(partial(_save_sharded, tmp_path / "sharded", name), 2) == [0, 0]
    save_model(MODELS[name](), None, tmp_path / "whole", max_shard_size=20_000)
    assert_same_weights(weights(tmp_path / "sharded"), weights(tmp_path / "whole"))
    config = json.loads((tmp_path / "sharded" / "config.json").read_text())
    assert config == json.loads((tmp_path / "whole" / "config.json").read_text())


@pytest.fixture
def run_dir(tmp_path):
    """A run with one checkpoint, of a model that differs from the one that it started from."""
    cfg = make_cfg(tmp_path / "run")
    cfg.model.name = str(save_causal_lm(tmp_path / "start"))
    policy, _ = build_policy(cfg)
    identity = {"weights": weights_digest(policy.model)}
    optimizer = build_optimizer(policy, cfg.optim)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    with torch.no_grad():
        for param in policy.parameters():
            param.mul_(0.5).grad = torch.zeros_like(param)
    optimizer.step()
    state = TrainState(policy, optimizer, schedule, FixedAlpha(0.5), None)
    folder = Path(cfg.run_dir) / "checkpoints"
    Checkpointer(folder, ALONE, CheckpointConfig(), identity).save(7, state.state_dict())
    return cfg, policy


def make_export(cfg, **options) -> ExportConfig:
    return ExportConfig(run_dir=cfg.run_dir, model=cfg.model, **options)


def test_the_command_writes_what_was_trained(run_dir, tmp_path, capsys):
    cfg, policy = run_dir
    export.run(make_export(cfg, output=str(tmp_path / "out")))
    assert "step 7 of" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, value in policy.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("abc").input_ids == make_tokenizer()("abc").input_ids
    source = str(Path(cfg.run_dir) / "checkpoints" / "step-00000007")
    export.run(make_export(cfg, source=source, dtype="bfloat16"))
    assert (
        AutoModelForCausalLM.from_pretrained(Path(cfg.run_dir) / "export").dtype == torch.bfloat16
    )


def test_an_output_that_is_filled_is_refused(run_dir, tmp_path):
    """Whatever is in it would be gone."""
    cfg, _ = run_dir
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.tex").write_text("chapter 1")
    for output in (folder, folder / "thesis.tex"):
        with pytest.raises(ValueError, match=r"output: expected a new or an empty folder, got the"):
            export.run(make_export(cfg, output=str(output)))
    assert (folder / "thesis.tex").read_text() == "chapter 1"
    (folder / "thesis.tex").unlink()
    export.run(make_export(cfg, output=str(folder)))
    assert (folder / "model.safetensors").exists()


def test_the_command_refuses(run_dir, tmp_path):
    cfg, _ = run_dir
    with pytest.raises(FileNotFoundError, match=r"run_dir: expected checkpoints in .*, got none"):
        export.run(ExportConfig(run_dir=str(tmp_path / "empty"), model=cfg.model))
    with pytest.raises(FileNotFoundError, match="source: expected a checkpoint's folder"):
        export.run(make_export(cfg, source=str(tmp_path / "nowhere")))
    save_causal_lm(Path(cfg.model.name), initializer_range=0.2)
    with pytest.raises(ValueError, match=r"model.name: expected the weights that .* started from"):
        export.run(make_export(cfg))
    truncate(Path(cfg.run_dir) / "checkpoints" / "step-00000007" / "state.json")
    with pytest.raises(ValueError, match=r"step-00000007: checkpoint refused: state.json"):
        export.run(make_export(cfg))
