"""A loop that runs for months does not fill the disk with old rounds."""

from __future__ import annotations

from pathlib import Path

from adapt.loop.records import prune_rounds


def a_round(folder: Path) -> None:
    held = ("labels-1/0.png", "pack/weights.safetensors", "edges/pack/model.toml", "pictures/0-frame.png")
    for part in held:
        (folder / part).parent.mkdir(parents=True, exist_ok=True)
        (folder / part).write_text("x")
    for part in ("train-1.pt", "train-1.twin.pt", "state.json", "report.json", "report.html", "loop.json"):
        (folder / part).write_text("x")


def test_of_old_rounds_the_records_stay(tmp_path):
    for number in range(1, 5):
        a_round(tmp_path / f"round-{number:04d}")
    a_round(tmp_path / "round-0002.lost-17")
    (tmp_path / "round-notes").mkdir()
    prune_rounds(tmp_path, 4)
    for folder in ("round-0001", "round-0002", "round-0002.lost-17"):
        kept = {p.relative_to(tmp_path / folder).as_posix() for p in (tmp_path / folder).rglob("*.*")}
        assert kept == {"report.json", "report.html", "loop.json", "pictures/0-frame.png"}
    for folder in ("round-0003", "round-0004"):  # what may still be asked for: the last round and this one
        assert (tmp_path / folder / "pack" / "weights.safetensors").is_file()
        assert (tmp_path / folder / "train-1.pt").is_file()
    assert (tmp_path / "round-notes").is_dir()
