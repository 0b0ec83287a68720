"""`python -m train <command> --config x.yaml --section.option value`."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import is_dataclass
from typing import Any, get_args, get_type_hints

from jsonargparse import ArgumentParser, Namespace

from train.config import ExportConfig, RunConfig
from train.config.files import Parser, named_files
from train.config.help import explain
from train.evaluation.config import EvaluateConfig
from train.runtime.errors import is_users, one_line
from train.sizing.config import EstimationConfig
from train.study.config import StudyConfig

# command -> (module with `run(cfg)`, help). Modules are imported when their command runs: `--help`
# must not wait for transformers.
COMMANDS = {
    "sample": ("train.preferences.sample", "draw responses with and without a trace"),
    "rank": ("train.preferences.rank", "score the answers and write best-worst pairs"),
    "cache-ref": ("train.reference", "compute and store the reference model's scores"),
    "train": ("train.trainer", "train with the BVPO loss"),
    "estimate": ("train.sizing.estimate", "memory and FLOPs of a step, without weights"),
    "export": ("train.model.export", "write a checkpoint's model for from_pretrained"),
    "evaluate": ("train.evaluation.run", "answer a benchmark's questions, with scores or files"),
    "study": ("train.study.run", "measure, on a small model, whether a* minimises and helps"),
}
# Commands with options of their own; the others share those of `RunConfig`.
CONFIGS: dict[str, type] = {
    "estimate": EstimationConfig,
    "export": ExportConfig,
    "evaluate": EvaluateConfig,
    "study": StudyConfig,
}
# Options that take no value, of the commands that have them.
SWITCHES = {
    "study": {"quick": "small sizes: minutes, and nothing to conclude from"},
    "train": {"dry_run": "build everything, print what a step takes, stop before the first"},
}
# What a command that was interrupted leaves; of the others nothing is half written.
KEPT = {
    "sample": "finished prompts are kept: the same command goes on from there",
    "cache-ref": "no scores were kept: the same command starts again",
    "train": "the same command goes on from the last checkpoint, if there is one",
    "evaluate": "finished questions are kept: the same command goes on from there",
    "study": "finished arms are kept: the same command goes on from there",
}
# Set to 1 to see where an error was raised.
DEBUG_VARIABLE = "BVPO_DEBUG"
INTERRUPTED = 128 + signal.SIGINT


def build_command_parser(name: str, files: Sequence[str] = ()) -> ArgumentParser:
    """The parser of one command: the fields of its configuration, all with defaults.

    Args:
        files: of `--config`, for errors that name a line.
    """
    parser = Parser(
        description=COMMANDS[name][1],
        # The generated usage, repeated with every error, is 80 lines.
        usage=f"python -m train {name} [--config FILE] [--print_config] [--OPTION VALUE ...]",
        # A misspelt option must not become another one.
        allow_abbrev=False,
    )
    parser.config_files = files
    parser.add_argument("--config", action="config", help="a YAML file with these options")
    every_switch = {switch for switches in SWITCHES.values() for switch in switches}
    parser.add_class_arguments(CONFIGS.get(name, RunConfig), skip=every_switch)
    for switch, text in SWITCHES.get(name, {}).items():
        parser.add_argument(f"--{switch}", action="store_true", help=text)
    explain(parser, CONFIGS.get(name, RunConfig))
    return parser


def build_parser(files: Sequence[str] = ()) -> ArgumentParser:
    """The parser of all commands."""
    parser = Parser(
        prog="python -m train",
        description="BVPO: sample responses, rank them into pairs, train on the pairs.",
        epilog="--print_config without a command prints the options of sample, rank and train.",
        allow_abbrev=False,
    )
    parser.config_files = files
    subcommands = parser.add_subcommands(dest="command")
    for name, (_, help_text) in COMMANDS.items():
        subcommands.add_subcommand(name, build_command_parser(name, files), help=help_text)
    return parser


def parse(arguments: Sequence[str] | None = None) -> tuple[str, Any]:
    """Command and configuration of a command line; exits with code 2 on one that is malformed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0].startswith("--print_config"):
        arguments = ["rank", *arguments]  # its options are those that most commands share
    parser = build_parser(named_files(arguments))
    parsed = parser.parse_args(arguments)
    kind = CONFIGS.get(parsed.command, RunConfig)
    wrong = wrong_value(kind, parsed[parsed.command])
    if wrong is not None:
        parser.error(wrong)
    values = parser.instantiate(parsed)
    options: Namespace = values[values.command]
    del options["config"]
    return values.command, kind(**vars(options))


def wrong_value(kind: Any, values: Any, prefix: str = "") -> str | None:
    """What the parser lets through: null for an option or a section that cannot be null."""
    for name, hint in get_type_hints(kind).items():
        if name not in values:  # a switch of another command
            continue
        value = values[name]
        if is_dataclass(hint):
            if not isinstance(value, (Namespace, dict)):
                return f"{prefix}{name}: expected the options of a section, got {value!r}"
            wrong = wrong_value(hint, value, f"{prefix}{name}.")
            if wrong is not None:
                return wrong
        elif value is None and type(None) not in get_args(hint):
            expected = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
            return f"{prefix}{name}: expected {expected}, got null"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, whose exit code is what it returns or 0; the user's errors become one line on
    stderr and exit code 2, and Ctrl-C becomes one and 130."""
    command, cfg = "python -m train", None
    try:
        command, cfg = parse(arguments)
        if hasattr(cfg, "model"):
            from train.model.devices import with_compute_dtype  # `--help` must not wait for torch

            cfg.model = with_compute_dtype(cfg.model)
        code = importlib.import_module(COMMANDS[command][0]).run(cfg)
    except KeyboardInterrupt:
        if _debugging():
            raise
        kept = KEPT.get(command, "nothing was written: the same command starts again")
        print(f"\n{command}: interrupted; {kept}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if _debugging() or not is_users(error):
            raise
        line = f"{command}: error: {one_line(error, cfg)} ({DEBUG_VARIABLE}=1 shows where)"
        print(line, file=sys.stderr)
        return 2
    return code or 0


def _debugging() -> bool:
    return os.environ.get(DEBUG_VARIABLE) == "1"
