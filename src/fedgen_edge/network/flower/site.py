"""A site's side of Flower: takes what its SuperNode received, and hands it to installed code."""

import threading
import time
from logging import getLogger
from pathlib import Path
from typing import cast

import fedgen_edge.network.flower.version  # noqa: F401 - says which Flower is needed

# isort: split
import httpx
from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import context_from_proto, message_from_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullAppMessagesResponse,
    PullTaskInputRequest,
    PushTaskOutputRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import push_message

from fedgen_edge.errors import CarrierError, ConfigError
from fedgen_edge.network.flower.carrier import unwrap, wrap
from fedgen_edge.network.flower.http import FlowerServer, Heartbeat
from fedgen_edge.network.messages import Handler

LOG = getLogger(__name__)
FAILED = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
PATIENCE = 5.0
"""Seconds that a SuperNode may be away in a task; one that starts anew knows nothing of it."""
POLL_SECONDS = 0.25
"""Seconds between two looks for work."""
RETRY_SECONDS = 1.0
"""Seconds before a SuperNode that is away is asked again."""


def serve(address: str, secret: Path, handler: Handler, stop: threading.Event) -> None:
    """Answer each message that a SuperNode of this machine receives, until told to stop.

    Work in hand is done first. A SuperNode that is away is waited for. Messages whose time is past
    are not handled, and of a handler's error the server learns the name alone.

    Args:
        address: host and port of the SuperNode, which speaks plainly to this machine alone.
        secret: the file that `supernode` names.
        handler: of this program; what a server says cannot choose another.
        stop: ends it, when set.

    Raises:
        ConfigError: the secret cannot be read.
        CarrierError: the SuperNode has another secret.
    """
    try:
        secret_bytes = secret.read_bytes()
    except OSError as error:
        raise ConfigError(f"{secret} cannot be read: {error.strerror}") from None
    server = FlowerServer(address, None, PATIENCE)
    with server.make_client(RuntimeHttpClient, secret=secret_bytes, patience=0.0) as client:
        while not stop.is_set():
            try:
                token = _acquire_task(client, secret)
            except httpx.HTTPError:
                stop.wait(RETRY_SECONDS)
                continue
            if not token:
                stop.wait(POLL_SECONDS)
                continue
            try:
                _run_task(server, token, handler)
            except Exception as error:  # whatever it is, the next message is another
                # Without a heartbeat the SuperNode answers for us, after a minute.
                LOG.warning("a message was not answered: %s", error)
                stop.wait(RETRY_SECONDS)


def _acquire_task(client: RuntimeHttpClient, secret: Path) -> str:
    """The token of a task that waits; an empty one where none does."""
    try:
        request = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
        return client.AcquireTask(request).token
    except httpx.HTTPStatusError as error:
        if error.response.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            raise CarrierError(
                f"the SuperNode has another secret than {secret}: start both with the same"
            ) from None
        raise


def _run_task(server: FlowerServer, token: str, handler: Handler) -> None:
    with server.make_client(RuntimeHttpClient, token=token) as client, Heartbeat(server, token):
        context = context_from_proto(client.PullTaskInput(PullTaskInputRequest()).context)
        pulled = _pull_message(client)
        request = message_from_proto(pulled.messages_list[0])
        content = _pull_content(client, context, pulled)
        push_message(client, _make_answer(request, content, handler), context)
        client.PushTaskOutput(PushTaskOutputRequest(sub_status=SubStatus.COMPLETED))


def _pull_message(client: RuntimeHttpClient) -> PullAppMessagesResponse:
    """The task's message; a SuperNode offers the task shortly before it has the message."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        pulled = client.PullMessages(PullAppMessagesRequest())
        if pulled.messages_list:
            return pulled
        time.sleep(POLL_SECONDS)
    raise CarrierError("the SuperNode has a task without a message")


def _pull_content(
    client: RuntimeHttpClient, context: Context, pulled: PullAppMessagesResponse
) -> RecordDict:
    """What is in the message, once the SuperNode has all of it."""
    node, tree = Node(node_id=context.node_id), pulled.message_object_trees[0]
    pull = make_pull_object_fn_protobuf(client.PullObject, node, context.run_id)
    ids = list(dict.fromkeys(each.object_id for each in iterate_object_tree(tree)))
    objects = pull_objects(ids, pull, initial_backoff=POLL_SECONDS, backoff_cap=2)
    message = inflate_object_from_contents(tree.object_id, objects)
    client.ConfirmMessageReceived(
        ConfirmMessageReceivedRequest(
            node=node, run_id=context.run_id, message_object_id=tree.object_id
        )
    )
    return cast(Message, message).content


def _make_answer(request: Message, content: RecordDict, handler: Handler) -> Message:
    seconds_left = request.metadata.created_at + request.metadata.ttl - time.time()
    if seconds_left <= 0:
        # The server no longer waits; but its clock may not be ours.
        return Message(Error(FAILED, "its time was past: do the clocks agree?"), reply_to=request)
    try:
        return Message(wrap(*handler(*unwrap(content))), reply_to=request)
    except Exception as error:
        # What it says may be of the data, and stays here.
        LOG.warning("a message could not be handled", exc_info=True)
        return Message(Error(FAILED, type(error).__name__), reply_to=request)
