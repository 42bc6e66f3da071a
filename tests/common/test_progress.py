"""What progress prints on standard error when it is not a terminal."""

from __future__ import annotations

from common.progress import ProgressBars, no_progress


def test_one_line_at_each_quarter_of_a_stage(capsys):
    with ProgressBars() as bars:
        for done in range(9):
            bars("train", done, 8, loss=0.12345)
        bars("score", 1, 1)
    assert capsys.readouterr().err.splitlines() == [
        *(f"train: {done}/8  loss 0.123" for done in (2, 4, 6, 8)),
        "score: 1/1  ",
    ]


def test_nothing_is_printed_when_it_is_quiet_or_may_not_print_lines(capsys):
    for bars in (ProgressBars(quiet=True), ProgressBars(lines=False), no_progress):
        bars("train", 8, 8, loss=1.0)
    assert capsys.readouterr() == ("", "")
