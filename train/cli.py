"""`python -m train <command> --config x.yaml --section.option value`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from train.config import ExportConfig, RunConfig
from train.estimation.config import EstimationConfig
from train.evaluation.config import EvaluateConfig
from train.study.config import StudyConfig

# command -> (module with `run(cfg)`, help). Modules are imported when their command runs: `--help`
# must not wait for transformers.
COMMANDS = {
    "sample": ("train.sample", "draw responses with and without a trace"),
    "rank": ("train.rank", "score the answers and write best-worst pairs"),
    "cache-ref": ("train.reference", "compute and store the reference model's scores"),
    "train": ("train.loop", "train with the BVPO loss"),
    "estimate": ("train.estimation.run", "memory and FLOPs of a step, without weights"),
    "export": ("train.export", "write a checkpoint's model for from_pretrained"),
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
# Set to 1 to see where an error was raised.
DEBUG_VARIABLE = "BVPO_DEBUG"
USER_ERRORS = (ValueError, TypeError, FileNotFoundError, MemoryError)


def build_command_parser(name: str) -> ArgumentParser:
    """The parser of one command: the fields of its configuration, all with defaults."""
    parser = ArgumentParser(
        description=COMMANDS[name][1],
        # The generated usage, repeated with every error, is 80 lines.
        usage=f"python -m train {name} [--config FILE] [--print_config] [--OPTION VALUE ...]",
        # A misspelt option must not become another one.
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="a YAML file with these options")
    every_switch = {switch for switches in SWITCHES.values() for switch in switches}
    parser.add_class_arguments(CONFIGS.get(name, RunConfig), skip=every_switch)
    for switch, text in SWITCHES.get(name, {}).items():
        parser.add_argument(f"--{switch}", action="store_true", help=text)
    return parser


def build_parser() -> ArgumentParser:
    """The parser of all commands."""
    parser = ArgumentParser(
        prog="python -m train",
        description="BVPO: sample responses, rank them into pairs, train on the pairs.",
        epilog="--print_config without a command prints the options of sample, rank and train.",
        allow_abbrev=False,
    )
    subcommands = parser.add_subcommands(dest="command")
    for name, (_, help_text) in COMMANDS.items():
        subcommands.add_subcommand(name, build_command_parser(name), help=help_text)
    return parser


def parse(arguments: Sequence[str] | None = None) -> tuple[str, Any]:
    """Command and configuration of a command line; exits with code 2 on one that is malformed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0].startswith("--print_config"):
        arguments = ["rank", *arguments]  # its options are those that most commands share
    parser = build_parser()
    values = parser.instantiate(parser.parse_args(arguments))
    options: Namespace = values[values.command]
    del options["config"]
    return values.command, CONFIGS.get(values.command, RunConfig)(**vars(options))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, whose exit code is what it returns or 0; the user's errors become one line on
    stderr and exit code 2."""
    command, cfg = parse(arguments)
    try:
        if hasattr(cfg, "model"):
            from train.devices import with_compute_dtype  # `--help` must not wait for torch

            cfg.model = with_compute_dtype(cfg.model)
        code = importlib.import_module(COMMANDS[command][0]).run(cfg)
    except USER_ERRORS as error:
        if os.environ.get(DEBUG_VARIABLE) == "1":
            raise
        message = " ".join(str(error).split())
        print(f"{command}: error: {message} ({DEBUG_VARIABLE}=1 shows where)", file=sys.stderr)
        return 2
    return code or 0
