"""The page that makes marks: its server's guards, its session, and a scripted person in a real browser."""

from __future__ import annotations

import errno
import http.client
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from adapt.mark.__main__ import main
from adapt.mark.frames import Frames, order, unsure
from adapt.mark.server import PageServer
from adapt.mark.session import Session, Stale
from adapt.weak import Box, Point, Scribble, WeakError, read

CLASSES = ("sky", "road", "car", "pole")
COLOURS = ((70, 130, 180), (128, 64, 128), (0, 0, 142), (153, 153, 153))
WIDTH, HEIGHT = 96, 64
BOX = {"kind": "box", "x0": 1, "y0": 1, "x1": 5, "y1": 5, "label": "car"}


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    found = Session(tmp_path / "weak.json", CLASSES, "human:ab")
    yield found
    found.close()


@pytest.fixture
def server(session: Session) -> Iterator[PageServer]:
    rng = np.random.default_rng(0)
    pictures = [
        np.kron(rng.integers(0, 255, (8, 12, 3)), np.ones((8, 8, 1))).astype(np.uint8) for _ in range(14)
    ]
    answers = [np.kron(rng.integers(0, 4, (8, 12)), np.ones((8, 8))).astype(np.uint8) for _ in range(14)]
    with PageServer(
        session,
        [f"f{i}" for i in range(14)],
        lambda i: pictures[i],
        lambda i: answers[i],
        COLOURS,
        minutes=10,
    ) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def ask(server: PageServer, path: str, body: Any = None, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    content = body if body is None or isinstance(body, (str, bytes)) else json.dumps(body)
    try:
        connection.request("GET" if body is None else "POST", path, content, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


# ------------------------------------------------------------------------------------------- session
def test_each_operation_is_saved_and_can_be_undone(session: Session, tmp_path: Path) -> None:
    def do(revision: int, **op: Any) -> dict[str, Any]:
        return session.apply("a", (9, 9), {"revision": revision, "seconds": 1.5, "op": op})

    assert do(0, kind="none")["revision"] == 0
    assert not (tmp_path / "weak.json").exists()
    do(0, kind="point", x=1, y=2, label="car")
    do(1, **BOX)
    do(2, kind="scribble", line=[[0, 0], [3, 3]], width=2, label="!sky")
    do(3, kind="absent", label="pole")
    do(4, kind="all_boxes", label="sky")
    assert do(5, kind="all_boxes", label="sky")["marks"].get("all_boxes") is None
    marks = read(tmp_path / "weak.json", CLASSES).frames["a"]
    assert marks.points == (Point(1, 2, "car"),)
    assert marks.boxes == (Box(1, 1, 5, 5, "car"),)
    assert marks.scribbles == (Scribble("!sky", ((0, 0), (3, 3)), 2),)
    assert (marks.absent, marks.source, marks.seconds) == (("pole",), "human:ab", 9.0)
    assert do(6, kind="undo")["undo"] == 5
    for revision in range(7, 12):
        found = do(revision, kind="undo")
    assert found["clicks"] == 0
    do(12, kind="absent", label="car")
    with pytest.raises(WeakError, match="class that is absent"):
        do(13, kind="point", x=1, y=1, label="car")
    for op, words in (
        ({"kind": "draw", "label": "car"}, "unknown"),
        ({"kind": "point"}, "no label"),
        ({"kind": "scribble", "label": "car", "line": 3}, "no list"),
        ({"kind": "point", "x": 1, "y": "1", "label": "road"}, "no number"),
        ({"kind": "point", "x": 1, "y": 9, "label": "road"}, "outside"),
        ({"kind": "box", "x0": None, "label": "road"}, "no number"),
    ):
        with pytest.raises(WeakError, match=words):
            do(13, **op)
    with pytest.raises(WeakError, match="seconds"):
        session.apply("a", (9, 9), {"revision": 13, "seconds": -1, "op": {"kind": "none"}})
    with pytest.raises(Stale, match="another window"):
        do(3, kind="point", x=1, y=1, label="road")
    with pytest.raises(WeakError, match="9x9, the picture has 8x9"):
        session.view("a", (8, 9))


def test_a_full_disk_loses_nothing(session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session.apply("a", (9, 9), {"revision": 0, "op": BOX})
    before = (tmp_path / "weak.json").read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            session.apply("a", (9, 9), {"revision": 1, "op": BOX})
    assert (tmp_path / "weak.json").read_bytes() == before
    assert session.view("a", (9, 9))["clicks"] == 1
    assert not list(tmp_path.glob("*.tmp"))
    session.apply("a", (9, 9), {"revision": 1, "op": BOX})


def test_one_process_per_file(session: Session, tmp_path: Path) -> None:
    with pytest.raises(WeakError, match="end that one or give"):
        Session(tmp_path / "weak.json", CLASSES)
    session.apply("a", (9, 9), {"revision": 0, "op": BOX})
    session.close()
    with pytest.raises(WeakError, match="'sky' is not one of"):
        Session(tmp_path / "weak.json", ("x",))
    again = Session(tmp_path / "weak.json", CLASSES)
    assert again.view("a", (9, 9))["clicks"] == 1
    again.close()
    with pytest.raises(WeakError, match="choose a folder"):
        Session(tmp_path / "no" / "weak.json", CLASSES)


# -------------------------------------------------------------------------------------------- server
def test_what_comes_from_elsewhere_is_refused(server: PageServer) -> None:
    own = f"/{server.token}"
    assert server.server_address[0] == "127.0.0.1"
    assert ask(server, f"{own}/state")[0] == 200
    assert ask(server, f"{own}/")[1].startswith(b"<!doctype html>")
    assert ask(server, "/state")[0] == 403
    assert ask(server, f"{own[:-1]}/state")[0] == 403
    assert ask(server, f"{own}/state", Host="evil.example")[0] == 403
    point = {"revision": 0, "op": {"kind": "point", "x": 1, "y": 1, "label": "car"}}
    assert ask(server, f"{own}/marks/0", point, Origin="http://evil.example")[0] == 403
    for path in ("marks/99", "marks/-1", "marks/..", "frame/1/2", "other/1", "../../etc/passwd"):
        assert ask(server, f"{own}/{path}")[0] == 404, path
    assert ask(server, f"{own}/marks/0", "[" * 100_000)[0] == 422
    assert ask(server, f"{own}/marks/0", b"", **{"Content-Length": str(2 << 20)})[0] == 413
    assert ask(server, f"{own}/marks/0", b"", **{"Content-Length": "-1"})[0] == 413
    assert ask(server, f"{own}/marks/0", {"revision": 3, "op": {}})[0] == 409
    assert not server.session.out.exists()
    status, found = ask(server, f"{own}/marks/0", point)
    assert (status, json.loads(found)["clicks"]) == (200, 1)


def test_unsure_of_rare_classes_comes_first() -> None:
    shares = np.array([[0.9, 0.1], [1.0, 0.0], [0.9, 0.1]])
    confidence = np.array([[0.9, 0.9], [0.2, 0.0], [0.9, 0.2]])
    assert unsure(shares, confidence).argmax() == 2
    told = [{"share": s, "confidence": c} for s, c in zip(shares, confidence, strict=True)]
    assert order("unsure", told)[0] == 2
    assert order("time", told) == [0, 1, 2]
    assert sorted(order("random", told)) == [0, 1, 2]


def test_frames_of_a_store_and_of_a_folder(tmp_path: Path) -> None:
    from adapt.frames.store import FrameStore

    picture = np.random.default_rng(1).integers(0, 255, (8, 9, 3)).astype(np.uint8)
    (tmp_path / "folder").mkdir()
    Image.fromarray(picture).save(tmp_path / "folder" / "x.png")
    with FrameStore(tmp_path / "store") as store:
        kept = store.add(picture, source="front", model="m", version=1)
    for path, key in ((tmp_path / "folder", "x"), (tmp_path / "store", f"id:{kept.id}")):
        frames = Frames.of(path)
        assert frames.keys == (key,)
        assert np.array_equal(frames.read(0), picture)


def test_the_command_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack = str(Path(__file__).parents[3] / "packs" / "street-day")
    assert main([str(tmp_path / "none"), "--pack", pack]) == 1
    assert capsys.readouterr().err.startswith("adapt.mark: there is no folder")
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--pack", pack, "--minutes", "0"])
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--pack", pack, "--source", "map"])


# ------------------------------------------------------------------------------------------- browser
@pytest.fixture
def browser() -> Iterator[Any]:
    api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium: install the package chromium")
    with api.sync_playwright() as run:
        found = run.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


class Person:
    """Clicks on the page, and waits until the page has saved each mark."""

    def __init__(self, browser: Any, server: PageServer, width: int, height: int) -> None:
        self.page = browser.new_page(viewport={"width": width, "height": height})
        self.page.set_default_timeout(60_000)
        self.faults: list[str] = []
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.goto(server.url)
        self.page.wait_for_selector("body[data-frame]")

    def done(self) -> int:
        return int(self.page.evaluate("Number(document.body.dataset.done || 0)"))

    def saved(self, work: Any) -> None:
        count = self.done() + 1
        work()
        self.page.wait_for_selector(f"body[data-done='{count}']")

    def at(self, x: float, y: float) -> tuple[float, float]:
        """The middle of a pixel on the screen."""
        box = self.page.locator("#stage").bounding_box()
        return box["x"] + (x + 0.5) * box["width"] / WIDTH, box["y"] + (y + 0.5) * box["height"] / HEIGHT

    def key(self, key: str) -> None:
        self.page.keyboard.press(key)

    def click(self, x: int, y: int) -> None:
        self.saved(lambda: self.page.mouse.click(*self.at(x, y)))

    def drag(self, *places: tuple[int, int]) -> None:
        def work() -> None:
            self.page.mouse.move(*self.at(*places[0]))
            self.page.mouse.down()
            for place in places[1:]:
                self.page.mouse.move(*self.at(*place))
            self.page.mouse.up()

        self.saved(work)

    def turn(self, key: str, frame: int) -> None:
        self.key(key)
        self.page.wait_for_selector(f"body[data-frame='{frame}']")


def test_a_session_of_130_clicks_ends_in_the_right_file(
    browser: Any, server: PageServer, tmp_path: Path
) -> None:
    person = Person(browser, server, 1280, 800)
    rng = np.random.default_rng(7)
    wanted: dict[str, list[Point]] = {}
    for frame in range(13):
        places = rng.choice(WIDTH * HEIGHT, 10, replace=False)
        mine = wanted.setdefault(f"f{frame}", [])
        for place in places.tolist():
            y, x = divmod(place, WIDTH)
            c = int(rng.integers(4))
            person.key(str(c + 1))
            person.click(x, y)
            mine.append(Point(x, y, CLASSES[c]))
        person.turn("n", frame + 1)
    labels = read(tmp_path / "weak.json", CLASSES)
    assert {k: list(m.points) for k, m in labels.frames.items()} == wanted
    assert person.page.inner_text("#total") == "130"
    assert (labels.counts()["seconds"] or 0) > 0
    assert person.faults == []


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_every_kind_of_mark(
    browser: Any, server: PageServer, tmp_path: Path, width: int, height: int
) -> None:
    person = Person(browser, server, width, height)
    person.key("3")
    person.drag((10, 10), (20, 15), (30, 20))
    person.key("2")
    person.page.keyboard.down("Shift")
    person.drag((5, 50), (40, 50))
    person.page.keyboard.up("Shift")
    person.key("x")
    person.click(60, 30)
    person.key("x")
    person.key("/")
    person.click(70, 40)
    person.key("4")
    person.saved(lambda: person.key("0"))
    person.key("1")
    person.click(80, 5)
    person.click(81, 5)
    person.saved(lambda: person.key("z"))
    person.key("3")
    person.saved(lambda: person.page.click("#every"))
    marks = read(tmp_path / "weak.json", CLASSES).frames["f0"]
    assert marks.boxes == (Box(10, 10, 31, 21, "car"),)
    assert (marks.scribbles[0].label, marks.scribbles[0].line[0], marks.scribbles[0].line[-1]) == (
        "road",
        (5, 50),
        (40, 50),
    )
    assert marks.points == (Point(60, 30, "!road"), Point(70, 40, "?"), Point(80, 5, "sky"))
    assert (marks.absent, marks.all_boxes) == (("pole",), ("car",))
    # A contradiction is shown and not saved.
    person.key("4")
    person.saved(lambda: person.page.mouse.click(*person.at(1, 1)))
    assert "absent" in person.page.inner_text("#message")
    # What another window marked is loaded before the next mark.
    other = Person(browser, server, width, height)
    other.key("1")
    other.click(3, 3)
    person.key("1")
    person.saved(lambda: person.page.mouse.click(*person.at(4, 4)))
    assert "another window" in person.page.inner_text("#message")
    person.click(4, 4)
    points = read(tmp_path / "weak.json", CLASSES).frames["f0"].points
    assert points[-2:] == (Point(3, 3, "sky"), Point(4, 4, "sky"))
    assert person.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    if folder := os.environ.get("SCREENSHOTS"):
        person.page.screenshot(path=f"{folder}/mark-{width}.png", full_page=True)
    person.turn("n", 1)
    person.turn("p", 0)
    assert person.faults == other.faults == []
