"""The part of the control service that is about frame groups."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from protos import roadworthy_pb2 as pb
from runtime.errors import Code, ServiceError
from runtime.rpc.base import Streams, followed, streamed, typed, wired
from runtime.service import Service
from runtime.swap.group_controller import GroupStatus


class GroupEdge:
    def __init__(self, service: Service, commands: Streams) -> None:
        self._service = service
        self._commands = commands

    def methods(self) -> dict[str, Any]:
        return {
            "Groups": typed(self.groups, pb.GroupsRequest, pb.GroupsResponse),
            "SubmitGroup": streamed(self._commands, self.submit, pb.SubmitGroupRequest, pb.Event),
            "RollbackGroup": streamed(self._commands, self.rollback, pb.GroupRequest, pb.Event),
        }

    def groups(self, request: pb.GroupsRequest, context: Any) -> pb.GroupsResponse:
        return pb.GroupsResponse(groups=statuses(self._service, request.group))

    def submit(self, request: pb.SubmitGroupRequest, context: Any) -> Iterator[pb.Event]:
        members = {member.model: member.version for member in request.members}
        if len(members) != len(request.members):
            message = f"a member of '{request.group[:200]}' is named twice; name each once"
            raise ServiceError(Code.INVALID_ARGUMENT, message, "invalid")
        yield from followed(self._service.admin.submit_group(request.group, members), context)

    def rollback(self, request: pb.GroupRequest, context: Any) -> Iterator[pb.Event]:
        for event in self._service.models.group(request.group).rollback():
            yield wired(event)


def statuses(service: Service, group: str = "") -> list[pb.GroupStatus]:
    """ "" = all."""
    controllers = [service.models.group(group)] if group else list(service.models.groups().values())
    return [_status(controller.status()) for controller in controllers]


def _status(status: GroupStatus) -> pb.GroupStatus:
    members = [
        pb.GroupMember(model=model, live=live, previous=previous)
        for model, (live, previous) in status.members.items()
    ]
    return pb.GroupStatus(**{**vars(status), "members": members})
