import errno
import subprocess
import sys

import pytest
import yaml
from safetensors import SafetensorError

from train import cli
from train.config import ExampleConfig, RunConfig


def exit_code(*arguments) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.parse(list(arguments))
    return caught.value.code


@pytest.fixture
def calls(monkeypatch):
    """Commands that were run, in place of running them."""
    ran = []

    class Module:
        def __init__(self, name):
            self.run = lambda cfg: ran.append((name, cfg))

    monkeypatch.setattr(cli.importlib, "import_module", Module)
    return ran


@pytest.mark.parametrize(
    ("command", "module"),
    [
        ("sample", "train.preferences.sample"),
        ("rank", "train.preferences.rank"),
        ("cache-ref", "train.reference"),
        ("train", "train.trainer"),
    ],
)
def test_each_command_runs_its_module(calls, command, module):
    assert cli.main([command]) == 0
    assert calls == [(module, RunConfig())]


def test_file_then_flags(calls, tmp_path):
    config = {
        "seed": 3,
        "model": {"name": "x", "param_dtype": "bfloat16"},
        "prompts": {"tasks": {"chain_sum": {"max_terms": 2}}},
        "sample": {"examples": [{"question": "q", "trace": "t", "answer": "a"}]},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    options = ["--model.name", "y", "--optim.betas", "[0.8, 0.9]", "--train.max_steps=7"]
    assert cli.main(["train", "--config", str(tmp_path / "c.yaml"), *options]) == 0
    ((_, cfg),) = calls
    expected = RunConfig(seed=3)
    expected.model.name, expected.model.param_dtype = "y", "bfloat16"
    expected.prompts.tasks = {"chain_sum": {"max_terms": 2}}
    expected.sample.examples = [ExampleConfig("q", "t", "a")]
    expected.optim.betas, expected.train.max_steps = (0.8, 0.9), 7
    assert cfg == expected


@pytest.mark.parametrize("arguments", [["--print_config"], ["rank", "--print_config"]])
def test_print_config_is_a_config_file(capsys, tmp_path, arguments):
    assert exit_code(*arguments) == 0
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    assert cli.parse(["rank", "--config", str(path)]) == ("rank", RunConfig())


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_help(capsys, arguments):
    assert exit_code(*arguments) == 0
    assert "usage: python -m train" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "command"),
        (["fly"], "fly"),
        (["train", "--config", "no_such.yaml"], "no_such.yaml"),
        (["train", "--model.nam", "x"], "--model.nam"),
        (["train", "--model.param_dtype", "int8"], "model.param_dtype"),
        (["train", "--train.epochs", "many"], "train.epochs"),
    ],
)
def test_malformed_command_lines(capsys, arguments, message):
    assert exit_code(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) <= 6


def test_unknown_key_in_a_file(capsys, tmp_path):
    (tmp_path / "c.yaml").write_text("model: {nmae: x}\n")
    assert exit_code("train", "--config", str(tmp_path / "c.yaml")) == 2
    assert "nmae" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError, TypeError, FileNotFoundError])
def test_user_errors_are_one_line(calls, capsys, monkeypatch, error):
    def fail(cfg):
        raise error("pairs.jsonl:3: expected this,\n   got that")

    module = type("Module", (), {"run": staticmethod(fail)})
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: module)
    monkeypatch.delenv(cli.DEBUG_VARIABLE, raising=False)
    assert cli.main(["rank"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("rank: error: pairs.jsonl:3: expected this, got that")
    monkeypatch.setenv(cli.DEBUG_VARIABLE, "1")
    with pytest.raises(error):
        cli.main(["rank"])


def test_other_errors_keep_their_traceback(monkeypatch):
    def fail(cfg):
        raise RuntimeError("a bug")

    module = type("Module", (), {"run": staticmethod(fail)})
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: module)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["rank"])


def test_help_does_not_wait_for_the_heavy_imports():
    code = (
        "import sys\nfrom train.cli import parse\n"
        "try:\n    parse(['train', '--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--train.pairs" in done.stdout


def test_the_module_is_runnable(tmp_path):
    command = [sys.executable, "-m", "train", "rank", "--run_dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "responses.jsonl: no such file" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["pairs", "demo"])
def test_presets_parse(name):
    command, cfg = cli.parse(["train", "--config", f"train/presets/{name}.yaml"])
    assert command == "train"
    assert cfg != RunConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: null", "model: expected the options of a section, got None"),
        ("train: 5", "train: expected the options of a section, got 5"),
        ("optim: {lr: null}", "optim.lr: expected float, got null"),
        ("model: {name: null}", "model.name: expected str, got null"),
        ("prompts: {tasks: null}", "prompts.tasks: expected dict"),
        ("sample: {examples: null}", "sample.examples: expected list"),
        ("rank: {judge: null}", "rank.judge"),
        ("reference: null", "reference"),
    ],
)
def test_null_and_values_in_place_of_sections(capsys, tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text + "\n")
    assert exit_code("train", "--config", str(tmp_path / "c.yaml")) == 2
    assert message in capsys.readouterr().err


def test_null_where_it_means_something(tmp_path):
    (tmp_path / "c.yaml").write_text("train: {max_steps: null}\nalpha: {estimate: null}\n")
    assert cli.parse(["train", "--config", str(tmp_path / "c.yaml")])[1] == RunConfig()


def fails_with(monkeypatch, error):
    def fail(cfg):
        raise error

    module = type("Module", (), {"run": staticmethod(fail)})
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: module)
    monkeypatch.delenv(cli.DEBUG_VARIABLE, raising=False)


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FULL, "run_dir: RUNS: the disk is full"),
        (OSError(errno.ENOSPC, "No space", "RUNS/log.jsonl"), "run_dir: RUNS/log.jsonl: the disk"),
        (OSError(errno.EROFS, "Read-only file system", "RUNS"), "run_dir: RUNS: the file sy"),
        (PermissionError(errno.EACCES, "Permission denied", "MODEL/x"), "model.name: MODEL/x: no"),
        (PermissionError(errno.EACCES, "Permission denied", "/else"), "train: error: /else: no p"),
        (FileExistsError(errno.EEXIST, "File exists", "RUNS"), "run_dir: RUNS: File exists"),
        (OSError(errno.EXDEV, "Cross-device", "RUNS/a", None, "OUT"), "rank.output: OUT: Cross"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "run_dir: RUNS: the"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0"), "run_dir: RUNS: a fi"),
        (ImportError("adapter: expected peft to be installed"), "adapter: expected peft"),
        (FloatingPointError("step 3: loss nan"), "step 3: loss nan"),
        (OSError("page one\n page two"), "train: error: page one page two ("),
        (MemoryError(), "train: error: MemoryError"),
    ],
)
def test_errors_of_disk_and_packages(monkeypatch, capsys, tmp_path, error, message):
    """One line with the file and the option whose value led there."""
    names = {"RUNS": tmp_path / "runs", "MODEL": tmp_path / "model", "OUT": tmp_path / "out.jsonl"}

    def placed(text):
        for name, path in names.items():
            text = text.replace(name, str(path)) if isinstance(text, str) else text
        return text

    if isinstance(error, OSError) and error.errno is not None:
        second = (None, placed(error.filename2)) if error.filename2 else ()
        error = type(error)(error.errno, error.strerror, placed(error.filename), *second)
    fails_with(monkeypatch, error)
    options = [
        f"--run_dir={names['RUNS']}",
        f"--model.name={names['MODEL']}",
        f"--rank.output={names['OUT']}",
        "--model.compute_dtype=float32",
    ]
    assert cli.main(["train", *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert placed(message) in lines[0]
    assert lines[0].endswith("(BVPO_DEBUG=1 shows where)")
    monkeypatch.setenv(cli.DEBUG_VARIABLE, "1")
    with pytest.raises(type(error)):
        cli.main(["train", *options])


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_ctrl_c_in_every_command(monkeypatch, capsys, command):
    fails_with(monkeypatch, KeyboardInterrupt())
    assert cli.main([command]) == 130
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"{command}: interrupted; ")
    assert len(line.split("; ")[1]) > 20
    monkeypatch.setenv(cli.DEBUG_VARIABLE, "1")
    with pytest.raises(KeyboardInterrupt):
        cli.main([command])


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("seed: 1\noptim:\n  betas: [0.9, 0.9]\n  lr: abc\n", 4),
        ("seed: 1\noptim:\n  lr: null\n", 3),
        ("\n\ntrain: 5\n", 3),
        ("# note\nmodel: {param_dtype: int8}\n", 2),
        ("model:\n  nmae: x\n", 2),
    ],
)
def test_an_option_of_a_file_is_named_with_its_line(capsys, tmp_path, text, line):
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("train: {epochs: 2.0}\n")
    bad.write_text(text)
    assert exit_code("train", f"--config={good}", "--config", str(bad)) == 2
    error = capsys.readouterr().err
    assert f"({bad}:{line})" in error
    assert len(error.splitlines()) <= 6


def test_an_option_of_the_command_line_has_no_line(capsys, tmp_path):
    (tmp_path / "c.yaml").write_text("seed: 1\n")
    assert exit_code("train", "--config", str(tmp_path / "c.yaml"), "--optim.lr", "x") == 2
    assert "c.yaml" not in capsys.readouterr().err


def test_a_file_that_is_no_yaml_is_named(capsys, tmp_path):
    (tmp_path / "c.yaml").write_text("a: [1\n")
    assert exit_code("train", "--config", str(tmp_path / "c.yaml")) == 2
    assert "c.yaml" in capsys.readouterr().err
