"""Sources other than the service: folders, videos and recordings, read against what their own libraries
wrote.
"""

from __future__ import annotations

import io
import re
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from adapt.sources import SourceError, open_source
from adapt.sources.live import LiveSource
from tests.waits import PATIENCE, until


def picture(i: int, size: tuple[int, int] = (48, 64)) -> np.ndarray:
    frame = np.zeros((*size, 3), np.uint8)
    frame[:, : size[1] // 2] = (255, 0, 0)
    frame[i : i + 8, size[1] // 2 :] = (0, 0, 255)
    return frame


def noise() -> np.ndarray:
    """A picture that takes several IDAT chunks of PNG."""
    return np.random.default_rng(0).integers(0, 256, (160, 160, 3), np.uint8)


def everything(source):
    frames = []
    while (captured := source.get(0.0)) is not None:
        frames.append(captured)
    assert source.finished
    return frames


# ------------------------------------------------------------------------------------------------ folders
def test_a_folder_in_order_of_names_without_what_is_no_picture(tmp_path, capsys):
    for i in (2, 0, 1):
        Image.fromarray(picture(i)).save(tmp_path / f"{i}.png")
    (tmp_path / "3.jpg").write_bytes(b"\xff\xd8 not a picture")
    Image.fromarray(noise()).save(tmp_path / "4.png")
    broken = (tmp_path / "4.png").read_bytes()
    at = broken.index(b"IDAT", broken.index(b"IDAT") + 4)  # Pillow raises SyntaxError for its second part
    (tmp_path / "4.png").write_bytes(broken[:at] + b"\xff\x01\x02\x03" + broken[at + 4 :])
    (tmp_path / "notes.txt").write_text("no picture")
    frames = everything(open_source(f"front={tmp_path}"))
    assert [f.source for f in frames] == ["front"] * 3
    for i, captured in enumerate(frames):
        np.testing.assert_array_equal(captured.frame, picture(i))
    said = capsys.readouterr().err
    assert "3.jpg is left out" in said
    assert "4.png is left out" in said
    assert len(everything(open_source(str(tmp_path), skip=2))) == 1


def test_what_is_not_there_or_not_read_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.db3").write_bytes(b"SQLite format 3\x00")
    (tmp_path / "x.doc").write_bytes(b"")
    for text, words in (
        (str(tmp_path / "no"), "not there"),
        (str(tmp_path / "empty"), "holds no picture"),
        (str(tmp_path / "x.db3"), "ros2 bag convert"),
        (str(tmp_path / "x.doc"), "nobody reads .doc"),
    ):
        with pytest.raises(SourceError, match=words):
            open_source(text)


# ------------------------------------------------------------------------------------------------ videos
@pytest.fixture
def video(tmp_path):
    av = pytest.importorskip("av", reason="PyAV is not installed (extra video)")
    path = tmp_path / "drive.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.bit_rate = 4_000_000
        for i in range(20):
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture(i), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def test_a_video_at_its_own_times(video):
    frames = everything(open_source(str(video)))
    assert len(frames) == 20
    assert {f.source for f in frames} == {"drive"}
    assert np.diff([f.time for f in frames]) == pytest.approx(0.1, abs=1e-3)
    for i, captured in enumerate(frames):
        assert np.abs(captured.frame[:, :24].astype(int) - picture(i)[:, :24]).mean() < 12  # coded with loss
        assert captured.frame[2, 4, 0] > 200 > 60 > captured.frame[2, 4, 2], "red is red"
    slow = everything(open_source(str(video), max_fps=5.0))
    assert len(slow) == 10
    assert len(everything(open_source(str(video), max_fps=5.0, skip=7))) == 3


def test_a_video_that_is_cut_or_none_at_all(video, tmp_path):
    import av

    cut = tmp_path / "cut.avi"
    with av.open(str(video)) as source, av.open(str(cut), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
    whole = cut.read_bytes()
    begins = [match.start() for match in re.finditer(b"00dc", whole)]
    cut.write_bytes(whole[: begins[10] + 12])
    assert 1 <= len(everything(open_source(str(cut)))) < 20
    (tmp_path / "none.mp4").write_bytes(b"\x00" * 100)
    with pytest.raises(SourceError, match="cannot be opened"):
        open_source(str(tmp_path / "none.mp4"))


# ------------------------------------------------------------------------------------------------ recordings
IMAGE = """std_msgs/Header header
uint32 height
uint32 width
string encoding
uint8 is_bigendian
uint32 step
uint8[] data
================================================================================
MSG: std_msgs/Header
builtin_interfaces/Time stamp
string frame_id
"""
COMPRESSED = """std_msgs/Header header
string format
uint8[] data
================================================================================
MSG: std_msgs/Header
builtin_interfaces/Time stamp
string frame_id
"""


@pytest.fixture
def bag(tmp_path):
    """Two cameras and a topic that is none."""
    pytest.importorskip("mcap", reason="mcap is not installed (extra ros)")
    writer_module = pytest.importorskip(
        "mcap_ros2.writer", reason="mcap-ros2-support is not installed (extra ros)"
    )
    path = tmp_path / "drive.mcap"
    header = {"stamp": {"sec": 0, "nanosec": 0}, "frame_id": ""}
    with open(path, "wb") as file:
        writer = writer_module.Writer(file)
        image = writer.register_msgdef("sensor_msgs/msg/Image", IMAGE)
        compressed = writer.register_msgdef("sensor_msgs/msg/CompressedImage", COMPRESSED)
        text = writer.register_msgdef("std_msgs/msg/String", "string data")
        for i in range(6):
            at = int((100 + i / 10) * 1e9)
            rows = np.zeros((48, 64 * 3 + 5), np.uint8)  # rows are padded
            rows[:, : 64 * 3] = picture(i)[..., ::-1].reshape(48, -1)
            message = {
                "header": header,
                "height": 48,
                "width": 64,
                "encoding": "bgr8",
                "is_bigendian": 0,
                "step": 64 * 3 + 5,
                "data": rows.tobytes(),
            }
            writer.write_message("/camera/front", image, message, at)
            buffer = io.BytesIO()
            Image.fromarray(picture(i)).save(buffer, "PNG")
            message = {"header": header, "format": "png", "data": buffer.getvalue() if i else b"damaged"}
            writer.write_message("/camera/rear/compressed", compressed, message, at + 1)
            writer.write_message("/chatter", text, {"data": "x"}, at + 2)
        writer.finish()
    return path


def test_a_recording_has_a_camera_a_topic(bag):
    frames = everything(open_source(str(bag)))
    front = [f for f in frames if f.source == "camera_front"]
    rear = [f for f in frames if f.source == "camera_rear_compressed"]
    assert (len(front), len(rear), len(frames)) == (6, 5, 11)  # one picture of the rear is damaged
    for i, captured in enumerate(front):
        np.testing.assert_array_equal(captured.frame, picture(i))
        assert captured.time == pytest.approx(100 + i / 10)
    np.testing.assert_array_equal(rear[0].frame, picture(1))
    named = everything(open_source(f"front={bag}#/camera/front"))
    assert {f.source for f in named} == {"front"}
    with pytest.raises(SourceError, match="no image topic '/nothing'"):
        open_source(f"{bag}#/nothing")
    with pytest.raises(SourceError, match="choose one with"):
        open_source(f"front={bag}")
    assert len(everything(open_source(str(bag.parent)))) == 11  # as `ros2 bag` leaves it: a folder


def test_a_recording_that_is_cut_or_none_at_all(bag, tmp_path):
    for name, content in (
        ("cut.mcap", bag.read_bytes()[:700]),
        ("none.mcap", b"\x00" * 50),
        ("empty.mcap", b""),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SourceError, match=r"cannot be read|no summary"):
            open_source(str(tmp_path / name))


# ------------------------------------------------------------------------------------------------ the service
def until_it_raises(source) -> None:
    until(lambda: source.get(0.1) is source)  # never: it raises, or the wait ends


def test_the_live_source_comes_back_and_gives_up_in_words():
    class Client:
        calls = 0

        def frames(self, model, *, max_fps, source):
            self.calls += 1
            if self.calls > 2:
                threading.Event().wait(5 * PATIENCE)
            yield SimpleNamespace(
                time=float(self.calls),
                source="front",
                model=model,
                version=1,
                frame=picture(0),
                labels=None,
                confidence=None,
                dropped=0,
            )

    source = LiveSource(Client(), "road", wait=0.3)
    assert [source.get(PATIENCE).time, source.get(PATIENCE).time] == [1.0, 2.0]
    with pytest.raises(SourceError, match="no frame for"):
        until_it_raises(source)
    source.close()


def test_a_refused_tap_is_not_tried_for_ever():
    from runtime.client import Rejected

    class Client:
        def frames(self, model, *, max_fps, source):
            raise Rejected("unknown model 'road'", "NOT_FOUND")

    source = LiveSource(Client(), "road")
    with pytest.raises(SourceError, match="refuses the tap of 'road'"):
        until_it_raises(source)
