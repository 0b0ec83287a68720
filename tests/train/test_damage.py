"""Files of a model that are cut short or are pointers are named, whatever reader found them."""

import gguf
import pytest
import torch
from safetensors.torch import save_file
from tiny_chat import save_causal_lm
from tiny_runs import tiny_model

from train.config import ModelConfig
from train.model.damage import damaged_file
from train.model.loading import empty_model
from train.model.models import load_model, load_tokenizer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def pointer(path):
    path.write_text(POINTER)


def nothing(path):
    path.write_text("")


def write_gguf(path):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("t", torch.ones(64, 64).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


WRITERS = {
    "a.safetensors": lambda path: save_file({"t": torch.ones(64, 64)}, path),
    "zip.bin": lambda path: torch.save({"t": torch.ones(64, 64)}, path),
    "legacy.bin": lambda path: torch.save(
        {"t": torch.ones(64, 64)}, path, _use_new_zipfile_serialization=False
    ),
    "a.gguf": write_gguf,
    "config.json": lambda path: path.write_text('{"vocab_size": 5}'),
}
DAMAGES = {half: "cut short or damaged", pointer: "Git LFS pointer", nothing: "is empty"}


@pytest.mark.parametrize("name", WRITERS)
def test_each_damage_of_each_format(tmp_path, name):
    for number, (damage, words) in enumerate(DAMAGES.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        WRITERS[name](folder / name)
        assert damaged_file(str(folder)) is None
        damage(folder / name)
        found = damaged_file(str(folder))
        assert found is not None
        assert found.startswith(f"{name} ")
        assert words in found


def test_no_folder_is_no_damage(tmp_path):
    assert damaged_file(str(tmp_path / "none")) is None


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("load", [load_model, empty_model, load_tokenizer])
def test_loading_names_the_option_and_the_file(tmp_path, load, damage):
    """One process and several read weights in different ways."""
    folder = save_causal_lm(tmp_path)
    name = "tokenizer.json" if load is load_tokenizer else "model.safetensors"
    damage(folder / name)
    with pytest.raises(ValueError, match=rf"^model\.name: .*{tmp_path.name}.* {name} is") as caught:
        load(ModelConfig(name=str(folder)))
    assert DAMAGES[damage] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_old_weights(tmp_path, damage):
    folder = save_causal_lm(tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save(tiny_model().state_dict(), folder / "pytorch_model.bin")
    damage(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"^model\.name: .*pytorch_model\.bin is"):
        load_model(ModelConfig(name=str(folder)))


def test_a_shard_that_is_damaged_is_the_one_named(tmp_path):
    folder = save_causal_lm(tmp_path)
    (folder / "model.safetensors").unlink()
    tiny_model().save_pretrained(folder, max_shard_size="20kB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    half(shards[1])
    cfg, message = ModelConfig(name=str(folder)), rf"^model\.name: .* {shards[1].name} is cut short"
    with pytest.raises(ValueError, match=message):
        load_model(cfg)
    _, _, weights = empty_model(cfg)
    with weights.open() as take:
        for name in sorted(weights.files):
            if weights.files[name] == shards[1]:
                with pytest.raises(ValueError, match=message):
                    take(name)
            else:
                take(name)


def test_what_lacks_a_package_stays_an_import_error(tmp_path, monkeypatch):
    folder = save_causal_lm(tmp_path)

    def missing(*_, **__):
        raise ImportError("requires the sentencepiece library")

    monkeypatch.setattr("train.model.models.AutoTokenizer.from_pretrained", missing)
    with pytest.raises(ImportError, match=r"^model\.name: .*requires the sentencepiece library"):
        load_tokenizer(ModelConfig(name=str(folder)))
