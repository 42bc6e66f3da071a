"""Options of the command line and the settings that they describe."""

from __future__ import annotations

import pytest

from adapt.loop import LoopError
from adapt.loop.options import loop_config, parse_arguments, parser, round_config

BASE = ["--server", "s", "--model", "m", "--pack", "p", "--repository", "r", "--workdir", "w"]


def test_settings_on_the_command_line():
    told = parser().parse_args(
        [
            *BASE,
            "--portions",
            ".2,.4",
            "--batch",
            "2+5",
            "--crop",
            "64x96",
            "--source-free",
            "--seed",
            "3",
            "--set",
            "mrkld=0.1",
            "--set",
            "label_scales=[0.75,1.0]",
            "--set",
            "bn=split",
        ]
    )
    config = round_config(told)
    assert config.portions == (0.2, 0.4)
    assert (config.source, config.target, config.crop) == (2, 5, (64, 96))
    assert (config.source_free, config.seed, config.mrkld, config.bn) == (True, 3, 0.1, "split")
    assert config.label_scales == (0.75, 1.0)
    assert (
        config.keep_parent > 0.5
    )  # a student without replay stays near its parent, unless a preset is named
    named = round_config(parser().parse_args([*BASE, "--source-free", "--preset", "cbst"]))
    assert (named.source_free, named.keep_parent) == (True, 0.0)
    classic = round_config(parser().parse_args([*BASE, "--preset", "cbst", "--rate", "0.001"]))
    assert (classic.adabn, classic.bn, classic.rate, classic.portions) == (
        False,
        "frozen",
        0.001,
        (0.2, 0.25, 0.3),
    )
    with pytest.raises(LoopError, match="no such setting; there are"):
        round_config(parser().parse_args([*BASE, "--set", "nothing=1"]))
    with pytest.raises(LoopError, match="malformed"):
        round_config(parser().parse_args([*BASE, "--batch", "6"]))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["--threads", "0"], "must be 1 or more"),
        (["--slow", "1"], "above 1"),
        (["--idle", "--priority", "nice"], "--idle belongs to"),
        (["--idle", "--nice", "5"], "--nice belongs to"),
        (["--group", "both"], "belong together"),
    ],
)
def test_options_that_do_not_fit_together_are_wrong_usage(wrong, says, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_arguments([*BASE, *wrong])
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


def test_the_loop_responds_to_domains_unless_it_ends_after_a_round():
    assert loop_config(parse_arguments(BASE)).respond == "refresh"
    assert loop_config(parse_arguments([*BASE, "--once"])).respond == "off"
    assert loop_config(parse_arguments([*BASE, "--once", "--respond", "back"])).respond == "back"
    with pytest.raises(LoopError, match="give two numbers"):
        loop_config(parse_arguments([*BASE, "--scores", "high"]))
