from __future__ import annotations

import dataclasses

import pytest

from runtime import config
from runtime.errors import ConfigError


def write(tmp_path, text):
    path = tmp_path / "server.toml"
    path.write_text(text)
    return path


def test_a_file_fills_the_sections(tmp_path):
    path = write(
        tmp_path,
        'repository = "engines"\nport = 9\n[shadow]\nframes = 3\ntimeout = 2\n[queue]\npolicy = "latest"\n'
        '[security.tokens]\nsecret = ["infer"]\n',
    )
    loaded = config.load(path, port=0, host=None)
    assert loaded.repository == "engines"
    assert loaded.port == 0
    assert loaded.host == "127.0.0.1"
    assert loaded.shadow.frames == 3
    assert loaded.shadow.timeout == 2.0
    assert loaded.queue.policy == "latest"
    assert loaded.security.tokens == {"secret": ["infer"]}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("prot = 1", "did you mean 'port'"),
        ("[shadow]\nframe = 1", "did you mean 'frames'"),
        ("[shadow]\nframes = 'x'", "must be of type int"),
        ("[shadow]\nframes = true", "must be of type int"),
        ("[shadow]\nframes = 0", "at least 1"),
        ("shadow = 1", "must be a table"),
        ("[queue]\npolicy = 'lifo'", "one of fifo, latest"),
        ("x = ", "TOML"),
        ("port = 1.5", "must be of type int"),
        ("port = 70000", "from 0 to 65535"),
        ("metrics_port = -2", "from -1 to 65535"),
        ("[engine]\nhost_code = true", r"set security\.trusted_keys"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(tmp_path, text, says):
    with pytest.raises(ConfigError, match=says) as error:
        config.load(write(tmp_path, text))
    assert "\n" not in str(error.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(tmp_path / "none.toml")


def test_round_trip():
    default = config.ServerConfig()
    assert config.from_dict(dataclasses.asdict(default)) == default


def test_the_documented_settings_are_the_defaults():
    """docs/serving.md lists every key with its default."""
    import re
    import tomllib
    from pathlib import Path

    page = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text()
    (block,) = [text for text in re.findall(r"```toml\n(.*?)```", page, re.DOTALL) if "[guard]" in text]
    default = dataclasses.asdict(config.ServerConfig(repository="engines"))
    del default["security"]  # a section of its own
    assert tomllib.loads(block) == default
