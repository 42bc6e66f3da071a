"""The command line against a running server: what it prints, and its exit codes."""

from __future__ import annotations

import json

import pytest

from runtime import ctl
from tests.runtime import builders as b


@pytest.fixture
def server(repository, quick, serve):
    b.publish(repository)
    return serve(quick)


def run(server, capsys, *arguments):
    code = ctl.main(["--server", server.target, *arguments])
    out, err = capsys.readouterr()
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
    for verb in (["status"], ["versions", "road"], ["history", "road"]):
        code, out, _ = run(server, capsys, *verb)
        assert code == 0
        assert out


def test_no_server(capsys):
    assert ctl.main(["--server", "127.0.0.1:1", "status"]) == 1
    assert "is the server running?" in capsys.readouterr().err


def test_a_number_beyond_all_versions(server, capsys):
    code, _, err = run(server, capsys, "submit", "road", str(10**20))
    assert code == 1
    assert err.startswith("runtime.ctl: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["submit", "road"], ["submit", "road", "x"]])
def test_usage(arguments):
    with pytest.raises(SystemExit) as end:
        ctl.main(arguments)
    assert end.value.code == 2
