"""The channel to a real server: reports, commands, and a server that goes away."""

from __future__ import annotations

from adapt.loop.server_channel import ControlChannel
from tests.waits import PATIENCE, until


def test_a_channel_to_a_real_server_reports_answers_commands_and_reconnects(tmp_path):
    from runtime.client import Client, Rejected
    from runtime.config import EngineConfig, ServerConfig
    from runtime.repository.repository import Repository
    from runtime.server import Server
    from tests.runtime import builders

    home = Repository(tmp_path / "engines")
    builders.publish(home)
    config = ServerConfig(repository=str(home.path), port=0, metrics_port=0, engine=EngineConfig(threads=1))
    server = Server(config).start()
    port = int(server.target.rsplit(":", 1)[1])
    ours, theirs = Client(server.target), Client(server.target)
    channel = ControlChannel(ours, "road", "car-7", interval=0.05)
    channel.open()
    try:
        channel.report(phase="collect", progress=0.5, collection={"on": True, "kept": 3})
        until(lambda: theirs.adaptation("road")["adapters"])
        until(lambda: theirs.adaptation("road")["adapters"][0]["report"].get("phase") == "collect")
        said = theirs.adaptation("road")["adapters"][0]
        assert (said["name"], said["report"]["collection"]["kept"]) == ("car-7", 3)

        import threading

        answers: list = []
        asked = threading.Thread(target=lambda: answers.append(theirs.start_round("road", "why not")))
        asked.start()
        commands: list = []
        until(lambda: commands.extend(channel.poll()) or commands)
        assert (commands[0].kind, commands[0].values["reason"]) == ("start_round", "why not")
        channel.answer(commands[0], True)
        asked.join(PATIENCE)
        assert answers[0]["command"]["accepted"] is True
        refusals: list = []

        def cancel() -> None:
            try:
                theirs.cancel_round("road")
            except Rejected as error:
                refusals.append(error.reason)

        asked = threading.Thread(target=cancel)
        asked.start()
        until(lambda: commands.extend(channel.poll()) or len(commands) > 1)
        channel.answer(commands[1], False, "nothing runs")
        asked.join(PATIENCE)
        assert "nothing runs" in refusals[0]
        server.stop()
        channel.report(phase="paused", note="while it was away")
        server = Server(ServerConfig(**{**vars(config), "port": port})).start()
        again = Client(server.target)
        until(lambda: again.adaptation("road")["adapters"])
        until(lambda: again.adaptation("road")["adapters"][0]["report"].get("phase") == "paused")
        again.close()
    finally:
        channel.close()
        ours.close()
        theirs.close()
        server.stop()
