"""The command line against a running server: what it prints, and its exit codes."""

from __future__ import annotations

import dataclasses
import json
import os
import socket

import pytest

from runtime import ctl
from runtime.config import SecurityConfig
from runtime.rpc import adaptation
from tests.runtime import builders as b
from tests.runtime.adapters import Adapter
from tests.waits import PATIENCE


@pytest.fixture(autouse=True)
def _patient(monkeypatch):
    monkeypatch.setattr(ctl, "PATIENCE", PATIENCE)
    monkeypatch.setattr(adaptation, "ANSWER", PATIENCE)


@pytest.fixture
def server(repository, quick, serve):
    b.publish(repository)
    return serve(quick)


def run(server, capsys, *arguments):
    code = ctl.main(["--server", server.target, *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def watched(server, capsys, says):
    """What `watch-round` prints, with a time that is long enough on this machine for the words `says`."""
    for seconds in ("0.5", "2", "8", "32", "100"):
        code, out, err = run(server, capsys, "--timeout", seconds, "watch-round", "road")
        if code == 0 and says in out + err:
            break
    return code, out, err


def test_submit_follows_the_swap(server, repository, capsys):
    version = b.publish(repository)
    code, out, _ = run(server, capsys, "submit", "road", str(version))
    assert code == 0
    assert [line.split()[2] for line in out.splitlines()] == ["SUBMITTED", "VERIFIED", "SHADOWING", "LIVE"]
    code, out, _ = run(server, capsys, "--json", "rollback", "road")
    assert code == 0
    assert json.loads(out)["state"] == "ROLLED_BACK"


def test_a_refusal_is_exit_code_1_and_names_the_check(server, repository, capsys):
    bad = b.publish(repository, model=b"garbage", answers=b.golden(b.segmentation(*b.nearest_weights())))
    code, out, err = run(server, capsys, "submit", "road", str(bad))
    assert code == 1
    assert "REJECTED (load)" in out
    assert err.startswith(f"runtime.ctl: 'road' version {bad} is refused by the check 'load': ")
    assert err.count("\n") == 1
    code, _, err = run(server, capsys, "rollback", "road")
    assert code == 1
    assert (
        err == "runtime.ctl: FAILED_PRECONDITION: 'road' has no previous version to go back to; promote one\n"
    )


def test_status_and_versions_as_json(server, capsys):
    code, out, _ = run(server, capsys, "status", "--json")
    assert code == 0
    assert json.loads(out)["models"]["road"]["live"] == 1
    code, out, _ = run(server, capsys, "--json", "versions", "road")
    assert [v["version"] for v in json.loads(out)["versions"]] == [1]
    assert json.loads(out)["versions"][0]["manifest"]["classes"] == list(b.CLASSES)
    code, out, _ = run(server, capsys, "--json", "history", "road")
    assert [json.loads(line)["state"] for line in out.splitlines()] == ["LIVE"]


@pytest.mark.parametrize(
    ("arguments", "flag", "value"),
    [
        (["freeze", "road", "--reason", "driving"], "frozen", True),
        (["freeze"], "frozen", True),
        (["pin", "road"], "pinned", True),
        (["pin", "road", "1"], "pinned", True),
        (["unpin", "road"], "pinned", False),
    ],
)
def test_flags(server, capsys, arguments, flag, value):
    code, out, _ = run(server, capsys, "--json", *arguments)
    assert code == 0
    assert json.loads(out)["models"]["road"][flag] is value


def test_tables_are_for_people(server, capsys):
    for verb in (
        ["status"],
        ["versions", "road"],
        ["history", "road"],
        ["drift", "road"],
        ["adaptation", "road"],
        ["groups"],
    ):
        code, out, _ = run(server, capsys, *verb)
        assert code == 0
        assert out


def test_no_server(capsys):
    assert ctl.main(["--server", "127.0.0.1:1", "status"]) == 1
    assert "is the server running?" in capsys.readouterr().err


def test_a_peer_that_says_nothing(capsys):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        server = f"127.0.0.1:{listener.getsockname()[1]}"
        assert ctl.main(["--server", server, "--timeout", "0.3", "status"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_without_an_adapter(server, capsys):
    for verb in (["start-round", "road"], ["cancel-round", "road"], ["collection", "road", "on"]):
        code, out, err = run(server, capsys, *verb)
        assert (code, out) == (1, "")
        assert err.startswith("runtime.ctl: FAILED_PRECONDITION: no adapter of 'road' is connected; start")
    code, out, _ = run(server, capsys, "adaptation", "road")
    assert (code, out) == (0, "road: no adapter is connected\n")
    code, out, err = watched(server, capsys, "waiting for one")
    assert (code, out) == (0, "")
    assert "waiting for one" in err


def test_with_an_adapter(server, capsys):
    round_ = {"round": 3, "stage": "train", "step": 4, "of": 10, "loss": 0.5, "trigger": "drift [fog]"}
    labels = {"labelled": 0.25, "frames": 9, "classes": [{"name": "road", "threshold": 0.875}]}
    kept = {"on": True, "kept": 7, "bytes": 3_000_000, "refused": {"near-duplicate": 5}}
    said = {"phase": "round", "progress": 0.5, "round": round_, "pseudo_labels": labels, "collection": kept}
    with Adapter(server.target, **said) as adapter:
        code, out, _ = run(server, capsys, "start-round", "road", "--reason", "snow")
        assert code == 0
        assert "the adapter has taken it" in out
        assert adapter.got[-1]["start_round"]["reason"] == "snow"
        run(server, capsys, "collection", "road", "off")
        assert adapter.got[-1]["set_collection"] == {"on": False}
        _, out, _ = run(server, capsys, "adaptation", "road")
        for text in ("train 4/10, loss 0.5000", "(drift [fog])", "7 frames in 3.0 MB", "25.0%", "0.875"):
            assert text in out
        code, out, _ = run(server, capsys, "adaptation", "road", "--json")
        report = json.loads(out)["adapters"][0]["report"]
        assert report["round"]["loss"] == 0.5
        code, out, _ = watched(server, capsys, "train")
        assert (code, out) == (0, "round 50%, round 3 (drift [fog]): train 4/10, loss 0.5000\n")
        adapter.says = (False, "parked is not given")
        code, _, err = run(server, capsys, "start-round", "road")
        assert code == 1
        assert "refuses: parked is not given" in err
        _, out, _ = run(server, capsys, "status")
        assert "garage" in out
        assert "round 50%" in out


def test_reset_and_dated_history(server, repository, capsys):
    adapted = b.publish(repository, adaptation={"round": "1"})
    assert run(server, capsys, "promote", "road", str(adapted))[0] == 0
    code, out, _ = run(server, capsys, "reset", "road")
    assert code == 0
    assert out.splitlines()[-1].split()[:3] == ["road", "1", "LIVE"]
    _, out, _ = run(server, capsys, "history", "road")
    assert all(line.startswith("20") for line in out.splitlines())


def test_groups(repository, quick, serve, capsys):
    b.publish(repository)
    b.publish(repository, "simple", b.simple(), foreign=True)
    server = serve(dataclasses.replace(quick, groups={"both": ["road", "simple"]}))
    new = b.publish(repository)
    code, out, err = run(server, capsys, "submit-group", "both", f"road={new}")
    assert code == 0, err
    assert out.splitlines()[-1].split()[0] == "both"
    assert run(server, capsys, "groups")[0] == 0
    code, out, _ = run(server, capsys, "groups", "both", "--json")
    members = {m["model"]: m["live"] for m in json.loads(out)["both"]["members"]}
    assert members == {"road": new, "simple": 1}
    assert "both" in json.loads(run(server, capsys, "status", "--json")[1])["groups"]
    code, out, _ = run(server, capsys, "rollback-group", "both")
    assert code == 0
    assert json.loads(run(server, capsys, "status", "--json")[1])["models"]["road"]["live"] == 1
    code, _, err = run(server, capsys, "submit-group", "both", "road=99")
    assert code == 1
    assert "is refused by the check 'manifest'" in err
    assert set(json.loads(run(server, capsys, "status", "both", "--json")[1])["groups"]) == {"both"}
    code, _, err = run(server, capsys, "watch", "raod")
    assert (code, err.count("\n")) == (1, 1)
    code, _, err = run(server, capsys, "submit-group", "none", "road=1")
    assert (code, err) == (1, "runtime.ctl: NOT_FOUND: there is no group 'none'; groups: both\n")


def test_a_number_beyond_all_versions(server, capsys):
    code, _, err = run(server, capsys, "submit", "road", str(10**20))
    assert code == 1
    assert err.startswith("runtime.ctl: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["submit", "road"],
        ["submit", "road", "x"],
        ["submit-group", "both"],
        ["submit-group", "both", "road"],
        ["submit-group", "both", "road=-1"],
        ["collection", "road", "maybe"],
        ["--timeout", "0", "status"],
        ["--timeout", "nan", "status"],
    ],
)
def test_usage(arguments):
    with pytest.raises(SystemExit) as end:
        ctl.main(arguments)
    assert end.value.code == 2


def test_a_token_by_file_or_environment(repository, quick, serve, capsys, tmp_path, monkeypatch):
    """So that `ps` does not show it; the option goes on working and says so."""
    b.publish(repository)
    server = serve(dataclasses.replace(quick, security=SecurityConfig(tokens={"s3cret": ["control"]})))
    file = tmp_path / "token"
    file.write_text("s3cret\n")
    monkeypatch.delenv("ROADWORTHY_TOKEN", raising=False)
    assert run(server, capsys, "--token-file", str(file), "status")[::2] == (0, "")
    code, _, err = run(server, capsys, "--token", "s3cret", "status")
    assert (code, err) == (0, "runtime.ctl: 'ps' shows --token; use --token-file or ROADWORTHY_TOKEN\n")
    code, _, err = run(server, capsys, "status")
    assert code == 1
    assert "a token is needed" in err
    monkeypatch.setenv("ROADWORTHY_TOKEN", "s3cret")
    assert run(server, capsys, "status")[::2] == (0, "")
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "two").write_text("one two")
    os.mkfifo(tmp_path / "pipe")
    for name, says in (
        ("empty", "is empty; write the token into it"),
        ("two", "not a token"),
        ("pipe", "is a pipe"),
        ("none", "No such file"),
    ):
        code, _, err = run(server, capsys, "--token-file", str(tmp_path / name), "status")
        assert code == 1
        assert says in err
        assert err.count("\n") == 1
    with pytest.raises(SystemExit) as usage:
        ctl.main(["--token", "x", "--token-file", str(file), "status"])
    assert usage.value.code == 2
