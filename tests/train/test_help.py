"""Every option of every command is explained by `--help`, from the docstrings alone."""

import re
from dataclasses import dataclass, field

import pytest

from train import cli
from train.config import EstimateConfig, RunConfig
from train.config.help import field_texts, option_texts, summary


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_option_is_explained(command, capsys):
    kind = cli.CONFIGS.get(command, RunConfig)
    texts = option_texts(kind)
    switches = {name for names in cli.SWITCHES.values() for name in names}
    assert [name for name, text in texts.items() if len(text) < 5] == []
    with pytest.raises(SystemExit):
        cli.parse([command, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name, text in texts.items():
        # Options of a section that is off are listed with it; switches are of some commands only.
        if not name.startswith(("adapter.", "alpha.estimate.")) and name not in switches:
            assert text.replace(" ", "") in shown.replace(" ", ""), name


def test_help_shows_how_a_star_is_switched_on(capsys):
    with pytest.raises(SystemExit):
        cli.parse(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "measure a* while training, and use it. Off by default; --alpha.estimate={}" in shown
    for name, text in field_texts(EstimateConfig).items():
        assert f"{name}: {text[:20]}" in shown
    _, cfg = cli.parse(["train", "--alpha.estimate={}"])
    assert cfg.alpha.estimate == EstimateConfig()
    assert "<class" not in shown
    assert re.search(r"loss: The loss of a pair", shown)


@dataclass
class Inner:
    """What is inside. size: in MiB."""

    size: int = 1


@dataclass
class Outer:
    """A title, with name: not a field here; nor is this. And more.

    name, other: both of them. other words: none. limit: 3 at most; a `name: x` in the middle stays.
    inner: see there.
    """

    name: str = ""
    other: str = ""
    limit: int = 3
    plain: str = ""
    inner: Inner | None = None
    always: Inner = field(default_factory=Inner)


@dataclass
class Derived(Outer):
    """Adds one. extra: it."""

    extra: int = 0


def test_a_sentence_explains_the_fields_it_begins_with():
    texts = option_texts(Derived)
    assert texts["name"] == texts["other"] == "both of them. other words: none"
    assert texts["limit"] == "3 at most; a `name: x` in the middle stays"
    assert texts["plain"] == ""
    assert texts["extra"] == "it"
    assert texts["always.size"] == texts["inner.size"] == "in MiB"
    assert "always" not in texts
    assert texts["inner"] == ("see there. Off by default; --inner={} switches it on. size: in MiB")
    assert summary(Outer) == "A title, with name: not a field here; nor is this"
