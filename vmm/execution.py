"""A process in a machine as its client sees it, across links that break.

    start ──▶ chunks … ──▶ exit, acknowledged
      │          │
      └──────────┴─ link breaks ─▶ attach on a new link at the offsets reached so far ─▶ …

The process is started exactly once, however often the OPEN had to be sent, because the agent knows it by its id. Output
is handed out without loss or repetition: the agent keeps what has not been credited. Input that the agent has not
credited is kept here and sent again from where it says that it stopped. When the agent does not know the process any
more, or no link comes up in time, LinkError says that nothing is known.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import Any, Self

from native import frames
from vmm.calls import LinkProvider, Patience, call, decode, is_break, open_stream, within
from vmm.errors import AgentError, LinkError, VmmError
from vmm.guest import ProcessExit, ProcessRecord
from vmm.stream import Chunk, Event, Stream

#: How long one break may last when the caller's own deadline is further away.
RECOVERY_S = 30.0


class Execution:
    """Made by `Agent.exec` and `Agent.attach`. Iterate over its Chunks; when they end, `exit` tells how it ended.

    One reader, one writer. Leaving the context manager, or `close`, detaches: the process goes on.
    """

    def __init__(self, links: LinkProvider, op: Mapping[str, Any], deadline: float | None) -> None:
        self._links = links
        self._op = op
        self._deadline = deadline
        self._stream: Stream | None = None
        self._recovering = asyncio.Lock()
        self._offsets: dict[str, int] = dict(op.get("offsets", {}))
        self._input = bytearray()
        self._input_start = 0
        self._input_sent = 0
        self._input_ended = False
        self._is_closed = False
        self.id = ""
        self.pid = 0
        #: How the process ended; None while it runs, and after following a running one with `follow=False`.
        self.exit: ProcessExit | None = None
        #: What `attach` told about the process; None after `exec`.
        self.record: ProcessRecord | None = None

    async def start(self) -> Self:
        """Send the operation, on as many links as it takes. Raises AgentError, MachineError or LinkError.

        A caller that is cancelled meanwhile has no process to leave behind: a foreground one is killed.
        """
        patience = Patience(self._limit())
        while self._stream is None:
            stream = await open_stream(self._links, self._op, patience)
            try:
                async with within(patience.deadline):
                    self._adopt(stream, await stream.reply())
            except VmmError as error:
                stream.close()
                await patience.after(error)
            except asyncio.CancelledError:
                self._leave_unstarted(stream)
                raise
            else:
                self._stream = stream
        return self

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        while self.exit is None and not self._is_closed:
            stream = self._live()
            try:
                item = await anext(stream)
            except StopAsyncIteration:
                break
            except VmmError as error:
                await self._recover(stream, error)
                continue
            if isinstance(item, Chunk):
                self._offsets[str(item.channel)] = item.offset + len(item.data)
                return item
            if isinstance(item, Event) and item.get("type") == "exit":
                self.exit = decode(ProcessExit, item)
                stream.ack()
        raise StopAsyncIteration

    async def wait(self) -> ProcessExit:
        """Read and drop what is left of the output, and return how the process ended."""
        async for _ in self:
            pass
        if self.exit is None:
            raise LinkError("link_lost", "the process was left before it ended")
        return self.exit

    async def write(self, data: bytes) -> None:
        """Send input, waiting while the process does not read. Raises AgentError `process_exited` after its end."""
        for start in range(0, len(data), frames.DATA_BYTES_MAX):
            self._raise_if_input_is_over()
            self._input += data[start : start + frames.DATA_BYTES_MAX]
            await self._through_breaks(self._flush)

    async def write_eof(self) -> None:
        """Close its input."""
        self._raise_if_input_is_over()
        await self._through_breaks(self._flush_end)

    async def resize(self, rows: int, cols: int) -> None:
        """Change the size of its terminal."""
        while self.exit is None:
            stream = self._live()
            try:
                stream.control({"type": "resize", "rows": rows, "cols": cols})
            except VmmError as error:
                await self._recover(stream, error)
            else:
                return

    async def signal(self, name: str, *, group: bool = True) -> None:
        """Signal it, with its whole process group unless told otherwise. Not repeated when the link breaks."""
        op = self._addressed({"op": "signal", "signal": name, "group": group})
        await call(self._links, op, deadline=self._deadline, is_repeatable=False)

    def kill(self) -> None:
        """Kill its process group and leave, without waiting: for a caller that is going away."""
        self._is_closed = True
        if self._stream is not None:
            self._kill(self._stream)

    def close(self) -> None:
        """Detach from it."""
        self._is_closed = True
        if self._stream is not None:
            self._stream.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _limit(self) -> float:
        limit = time.monotonic() + RECOVERY_S
        return limit if self._deadline is None else min(limit, self._deadline)

    def _live(self) -> Stream:
        if self._stream is None:
            raise RuntimeError("the execution has not been started")
        return self._stream

    def _addressed(self, op: dict[str, Any]) -> dict[str, Any]:
        return {**op, "id": self.id} | {key: self._op[key] for key in ("to", "passive") if key in self._op}

    def _adopt(self, stream: Stream, reply: dict[str, Any]) -> None:
        try:
            self.id, self.pid = str(reply["id"]), int(reply["pid"])
            taken = int(reply.get("stdin_bytes", 0))
        except (KeyError, TypeError, ValueError) as error:
            raise LinkError("bad_frame", "the agent sent something unexpected", detail=str(error)) from error
        if self._stream is None:
            self._input_start = self._input_sent = taken
        if not self._input_start <= taken <= self._input_sent:
            raise LinkError("link_lost", "it is not known how much of the input arrived")
        self._drop_input_before(taken)
        stream.start_input_at(taken)
        if self._op["op"] == "attach" and self.record is None:
            self.record = decode(ProcessRecord, reply)

    async def _recover(self, broken: Stream, error: VmmError) -> None:
        """Have a working stream again, or raise `error`, or what was said to the last attempt."""
        async with self._recovering:
            if self._stream is not broken:
                return
            if not is_break(error) or self._is_closed:
                raise error
            patience = Patience(self._limit())
            while self._stream is broken:
                await patience.after(error)
                try:
                    await self._attach_again(patience)
                except VmmError as again:
                    error = again

    async def _attach_again(self, patience: Patience) -> None:
        op = self._addressed({"op": "attach", "offsets": dict(self._offsets)})
        stream = await open_stream(self._links, op, patience)
        try:
            async with within(patience.deadline):
                self._adopt(stream, await stream.reply())
                # What was sent before fits into a new stream's credit, so this never waits for the process.
                await self._flush(stream, self._input_sent)
            if self._input_ended:
                stream.end()
            self._stream = stream
        except AgentError as error:
            if error.code != "no_such_process":
                raise
            raise LinkError("no_answer", "the process is not known any more, nor how it ended") from error
        finally:
            if self._stream is not stream:
                stream.close()

    async def _through_breaks(self, send: Callable[[Stream], Awaitable[None]]) -> None:
        while True:
            stream = self._live()
            try:
                await send(stream)
            except VmmError as error:
                self._raise_if_input_is_over()
                await self._recover(stream, error)
            else:
                return

    async def _flush(self, stream: Stream, end: int | None = None) -> None:
        """Send what is kept of the input, up to offset `end`."""
        last = self._input_start + len(self._input) if end is None else end
        while stream.sent < last:
            start = stream.sent - self._input_start
            await stream.send(bytes(self._input[start : last - self._input_start]))
            self._input_sent = max(self._input_sent, stream.sent)
            self._drop_input_before(stream.sent_and_taken)

    async def _flush_end(self, stream: Stream) -> None:
        stream.end()
        self._input_ended = True

    def _leave_unstarted(self, stream: Stream) -> None:
        if self._op["op"] == "exec" and not self._op.get("background"):
            self._kill(stream)
        stream.close()

    @staticmethod
    def _kill(stream: Stream) -> None:
        if not stream.is_over:
            stream.control({"type": "signal", "signal": "SIGKILL"})
            stream.close()

    def _drop_input_before(self, offset: int) -> None:
        if offset > self._input_start:
            del self._input[: offset - self._input_start]
            self._input_start = offset

    def _raise_if_input_is_over(self) -> None:
        if self.exit is not None:
            raise AgentError("process_exited", "the process has ended")
