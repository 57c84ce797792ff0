"""The side of a handshake that answers.

Over TCP, and over an abstract Unix socket, which only processes of the same host (strictly: the same network
namespace) can reach: over that one file descriptors can be handed out. The kernel says there who calls; without a
secret only processes of the same user are answered.
"""

from __future__ import annotations

import asyncio
import logging
import selectors
import socket
from collections import Counter
from collections.abc import Callable, Container, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any, cast

from mooncache import forks
from mooncache.background import Background
from mooncache.discovery import handshake
from mooncache.discovery.address import join_address, parse_address
from mooncache.discovery.complaints import Complaints
from mooncache.discovery.credentials import Process, process_at
from mooncache.discovery.handshake import FDS_A_MESSAGE, Answered, Call, Hello, Refused
from mooncache.discovery.messages import Reply, Request
from mooncache.discovery.secret import check_secret, key_of, of_user
from mooncache.discovery.sockets import Loop, advertised, listen_tcp, listen_unix, resolve_own
from mooncache.discovery.spare import Spare
from mooncache.discovery.visitors import CROWD_S, Visitors
from mooncache.errors import CapacityError, DiscoveryError, MooncacheError
from mooncache.shortage import none_left

log = logging.getLogger("mooncache")

CALLS = 32
"""The calls of one caller that are being answered at once: its workers connect at the same time."""

SERVING = 8
"""Threads that answer what may wait, for former connections to end or for a NIC's queue pairs, 5 s at most: half of the
workers of one caller that connects."""

ACCEPTED = 16
"""Connections accepted before anything else has its turn."""

ACCEPT_PAUSE_S = 0.1
"""Before accepting again when the process had no file descriptor left; accepting at once would only spin."""


class Listener:
    """The listener answers handshakes, in a thread of its own.

    Args:
        bind: "host:port"; port 0 takes a free one.
        secret: shared by all engines that may talk to each other; None: the user's own (see `secret`).
        insecure: without a secret anybody may ask, also where other hosts can reach it; but over the Unix socket only
            processes of the same user.
        name: of the engine, for logs.
        serve: answers a request, in one of SERVING threads. A MooncacheError it raises is raised by the caller's
            `dial`.
        quick: purposes that `serve` answers without waiting for anything: in the listener's own thread, so that they
            are answered whatever the others are at.
        advertise: "host" or "host:port" that peers are told to dial, where that is not `bind`'s: behind a mapping of
            ports, say.
        limit_s: for one handshake.

    Attributes:
        address: "host:port" for peers to dial: `advertise`, else what it is bound to, with this machine's name for a
            wildcard.
        near: "host:port" for others of this machine, which may not reach what is advertised.
        unix: name of the abstract Unix socket, for `dial("unix:" + name)` on this host.
        background: its thread, and what is wrong with it.

    Raises:
        UsageError: a bad `bind`, `advertise` or secret, or no secret where other hosts can come.
        TransportError: the host is unknown or not here, the port is in use, or there is no place for the user's secret.
    """

    def __init__(
        self, bind: str, *, secret: bytes | None, insecure: bool, name: str, serve: Callable[[Request], Reply],
        quick: Container[str] = (), advertise: str | None = None, limit_s: float = handshake.HANDSHAKE_S,
    ) -> None:  # fmt: skip
        check_secret(secret)
        self._secret, self._open = secret, secret is None and insecure
        self._key()  # which may take a moment, or fail
        self._name, self._serve, self._quick, self._limit_s = name, serve, quick, limit_s
        self._serving = ThreadPoolExecutor(SERVING, f"{name}-serving")
        host, _ = parse_address(bind)
        family, where = resolve_own(bind, secret is None and not insecure)
        with ExitStack() as undo:
            tcp = undo.enter_context(listen_tcp(family, where, bind))
            port = tcp.getsockname()[1]
            self.address = advertised(host, advertise, port)
            self.near = join_address({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port)
            unix = undo.enter_context(listen_unix())
            self._spare = Spare()
            undo.callback(self._spare.give)
            self.unix: str = unix.getsockname()[1:].decode()
            self._listening = {tcp: False, unix: True}
            self._handshakes: set[asyncio.Task[None]] = set()
            self._visitors = Visitors()
            self._answering: Counter[str] = Counter()  # by caller
            self._complaints = Complaints(log)
            self._stop = asyncio.Event()
            self._selector = selectors.DefaultSelector()
            undo.callback(self._selector.close)
            self._loop = Loop(self._selector)
            undo.callback(self._loop.close)
            self._closed = False
            self.background = Background()
            forks.private(self)
            undo.callback(self.close)  # a signal handler may raise while the thread is started
            self.background.start(f"{name}-listener", self._run)
            undo.pop_all()

    def close(self) -> None:
        """Close the sockets and every handshake under way, and wait for the thread; not from `serve`.

        A second close does nothing.
        """
        self._closed = True
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._stop.set)
        self.background.close()

    def disown(self) -> None:
        """Wake nothing in a forked child; sockets are closed by themselves; see `forks.Holder`."""
        self._closed = True
        self._selector.close()
        for sock in (getattr(self._loop, "_ssock", None), getattr(self._loop, "_csock", None)):
            if sock is not None:
                sock.close()

    def _key(self) -> bytes | None:
        """Return the key that callers have to prove."""
        if self._open:
            return None
        return of_user() if self._secret is None else key_of(self._secret)

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._handshakes)} handshakes under way"
        return f"<Listener of {self._name!r} at {self.address}, {state}>"

    # -------------------------------------------------------------------------- the thread
    def _run(self) -> None:
        self._loop.set_exception_handler(self._went_wrong)
        self._loop.run_until_complete(self._listen())
        self._serving.shutdown()
        self._loop.close()
        for sock in self._listening:
            sock.close()
        self._spare.give()

    def _went_wrong(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log what raised in the event loop and nobody waits for; the loop goes on."""
        error = context.get("exception")
        why = context["message"] if error is None else f"{context['message']}: {type(error).__name__}: {error}"
        if self.background.note(f"listener of {self._name!r}", why):
            log.error("listener of engine %r: %s", self._name, context["message"], exc_info=error)

    async def _listen(self) -> None:
        for sock in self._listening:
            self._loop.add_reader(sock, self._accept, sock)
        await self._stop.wait()
        for sock in self._listening:
            self._loop.remove_reader(sock)
        await asyncio.sleep(0)  # a task cancelled before its first step would not close its socket
        for task in self._handshakes:
            task.cancel()
        await asyncio.gather(*self._handshakes, return_exceptions=True)
        self._complaints.close()

    def _accept(self, listening: socket.socket) -> None:
        """Accept connections that wait. A plain callback: a cancelled coroutine could lose the socket it accepted."""
        for _ in range(ACCEPTED):
            try:
                sock, remote = listening.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                self._cannot_accept(listening, error)
                return
            self.background.settled(f"connections to {self._name!r}")
            try:
                self._admit(sock, remote, self._listening[listening])
            except BaseException:
                sock.close()
                raise
            while self._visitors.too_many:
                if not self._make_room(listening):
                    return

    def _cannot_accept(self, listening: socket.socket, error: OSError) -> None:
        """Make room, else tell one caller that no descriptor is left, by means of those kept for it; others wait."""
        none = none_left(error, f"engine {self._name!r} takes no connections")
        self.background.note(f"connections to {self._name!r}", str(none or error))
        self._complaints.tell("this process", "%s", none or f"engine {self._name!r} cannot accept connections: {error}")
        if len(self._visitors):
            self._make_room(listening)
            return
        if none is not None and self._spare.give():
            with suppress(OSError):
                told = self._admit(*listening.accept(), self._listening[listening], none)
                if told is not None:
                    for each in self._listening:
                        self._loop.remove_reader(each)
                    told.add_done_callback(self._told)
                    return
        self._spare.take()
        self._pause(listening, ACCEPT_PAUSE_S)

    def _told(self, _: asyncio.Task[None]) -> None:
        self._spare.take()
        for each in self._listening:
            self._accept_again(each)

    def _make_room(self, listening: socket.socket) -> bool:
        """Hang up on the visitor that has to go; return False when that is too early: nobody is accepted until then."""
        visitor, when = self._visitors.next_to_go()
        early = when - self._loop.time()
        if early > 0:
            self._pause(listening, early)
            return False
        self._visitors.leave(visitor)
        cast("asyncio.Task[None]", visitor).cancel()
        return True

    def _pause(self, listening: socket.socket, seconds: float) -> None:
        self._loop.remove_reader(listening)
        self._loop.call_later(seconds, self._accept_again, listening)

    def _accept_again(self, listening: socket.socket) -> None:
        if not self._closed:
            self._loop.add_reader(listening, self._accept, listening)

    def _admit(
        self, sock: socket.socket, remote: Any, local: bool, none: CapacityError | None = None
    ) -> asyncio.Task[None] | None:
        """Attend to a connection, in the task returned; None where it was hung up on. `none`: what it is to be told."""
        forks.private(sock)
        process = process_at(sock) if local else None
        if process is None:
            host, source = str(remote[0]), join_address(remote[0], remote[1])
        else:
            host, source = f"user {process.uid}", f"process {process.pid} of user {process.uid}"
        if process is not None and self._secret is None and not process.ours:
            what = "engine %r hung up on %s: another user's, and there is no secret"
            self._complaints.tell(host, what, self._name, source)
            sock.close()
            return None
        sock.setblocking(False)
        if process is None:
            handshake.set_options(sock)
        patience = min(self._limit_s, CROWD_S) if self._visitors.crowded else self._limit_s
        task = self._loop.create_task(self._attend(sock, host, source, process, patience, none))
        self._visitors.enter(task, host, self._loop.time())
        self._handshakes.add(task)
        task.add_done_callback(self._handshakes.discard)
        task.add_done_callback(self._visitors.leave)
        return task

    async def _attend(
        self, sock: socket.socket, host: str, source: str, process: Process | None, patience: float,
        none: CapacityError | None,
    ) -> None:  # fmt: skip
        """Serve one connection to its end, whatever that is."""
        handed_over = False
        try:
            call = await asyncio.wait_for(self._hear(sock, host, source), patience)
            self._visitors.leave(asyncio.current_task())
            patience = self._limit_s
            if call is not None:
                reply = await asyncio.wait_for(self._reply(sock, *call, process, none), patience)
                if reply.then is not None:
                    self._serving.submit(self._hand_over, sock, host, source, reply.then, reply)
                    handed_over = True
        except asyncio.TimeoutError:
            what = "engine %r hung up on %s: no handshake within %s s"
            self._complaints.tell(host, what, self._name, source, patience)
        except asyncio.CancelledError:
            if not self._closed:
                what = "engine %r hung up on %s: too many are at the door, and it was the oldest"
                self._complaints.tell(host, what, self._name, source)
            raise
        except OSError as error:
            self._complaints.tell(host, "engine %r lost %s: %s", self._name, source, error)
        except DiscoveryError as error:
            self._complaints.tell(host, "engine %r hung up on %s", self._name, error)
        except Exception:
            self._complaints.tell(host, "engine %r could not go on with %s", self._name, source, trace=True)
        finally:
            if not handed_over:
                sock.close()

    def _hand_over(
        self, sock: socket.socket, host: str, source: str, then: Callable[[socket.socket], None], reply: Reply
    ) -> None:
        """Hand the connection to the provider, in a thread."""
        try:
            then(sock)
        except Exception:
            sock.close()
            reply.give_up()
            self._complaints.tell(host, "engine %r could not go on with %s", self._name, source, trace=True)

    async def _hear(self, sock: socket.socket, host: str, source: str) -> tuple[Call, bytes | None] | None:
        """Read the call of a caller that has proven to know the secret, and the answer's key; None when refused."""
        hello = Hello(handshake.new_nonce(), not self._open, not self._open and self._secret is None)
        await self._loop.sock_sendall(sock, handshake.frame(hello.message(), handshake.HELLO_BYTES))
        header = await self._receive(sock, handshake.HEADER.size)
        text = await self._receive(sock, handshake.text_bytes(header, handshake.CALL_BYTES, source))
        key = self._key()
        call, proven = Call.read(text, hello, key, source)
        if proven:
            return call, key
        what = "engine %r refused %s (%r): it did not prove that it knows the secret"
        self._complaints.tell(host, what, self._name, source, call.caller)
        why = Refused("DiscoveryError", "you did not prove that you know the secret; give both engines the same one")
        await self._loop.sock_sendall(sock, handshake.frame(call.answer(why, None), handshake.ANSWER_BYTES))
        return None

    async def _reply(
        self, sock: socket.socket, call: Call, key: bytes | None, process: Process | None, none: CapacityError | None
    ) -> Reply:
        """Answer a call."""
        self._answering[call.caller] += 1
        try:
            answer, reply = await self._answered(call, key, process, none)
            try:
                await self._loop.sock_sendall(sock, answer)
                for first in range(0, len(reply.fds), FDS_A_MESSAGE):
                    await self._send_fds(sock, reply.fds[first : first + FDS_A_MESSAGE])
            except BaseException:  # it hung up, or took too long
                reply.give_up()
                raise
            return reply
        finally:
            self._answering[call.caller] -= 1
            if not self._answering[call.caller]:
                del self._answering[call.caller]

    async def _answered(
        self, call: Call, key: bytes | None, process: Process | None, none: CapacityError | None
    ) -> tuple[bytes, Reply]:
        """Answer, in a thread unless that is quick. What a thread makes for a caller who has left is undone."""
        if none is not None or call.purpose in self._quick:
            return self._answer(call, key, process, none)
        work = self._serving.submit(self._answer, call, key, process, none)
        try:
            return await asyncio.wrap_future(work)
        except asyncio.CancelledError:
            work.add_done_callback(_give_up)
            raise

    def _answer(
        self, call: Call, key: bytes | None, process: Process | None, none: CapacityError | None
    ) -> tuple[bytes, Reply]:
        """Return the frame that answers a call, and what is to follow it."""
        try:
            if none is not None:
                raise none
            if self._answering[call.caller] > CALLS:
                raise CapacityError(f"{CALLS} calls of {call.caller!r} are being answered, as many as may be; wait")
            reply = self._serve(Request(call.purpose, call.caller, call.generation, call.body, process))
            try:
                if reply.fds and process is None:
                    raise ValueError(f"file descriptors cannot be sent to another host: {reply!r}")
                said = Answered(reply.body, len(reply.fds))
                return handshake.frame(call.answer(said, key), handshake.ANSWER_BYTES), reply
            except BaseException:
                reply.give_up()
                raise
        except MooncacheError as error:
            refused = Refused(type(error).__name__, str(error))
        except Exception as error:
            what = f"engine {self._name!r} cannot answer {call.purpose!r}"
            none = none_left(error, what) if isinstance(error, OSError) else None
            refused = Refused("InternalError", "internal error; the log of that engine says more")
            if none is not None:
                refused = Refused("CapacityError", str(none))
            what = "engine %r could not answer %r from %r"
            self._complaints.tell(f"peer {call.caller!r}", what, self._name, call.purpose, call.caller, trace=True)
        return handshake.frame(call.answer(refused, key), handshake.ANSWER_BYTES), Reply({})

    async def _receive(self, sock: socket.socket, n: int) -> bytes:
        """Read exactly n bytes: what comes after the call is not the listener's."""
        got = b""
        while len(got) < n:
            more = await self._loop.sock_recv(sock, n - len(got))
            if not more:
                raise ConnectionError("it hung up early; if it is an engine, its error says why")
            got += more
        return got

    async def _send_fds(self, sock: socket.socket, fds: Sequence[int]) -> None:
        while True:
            try:
                socket.send_fds(sock, [b"F"], fds)
                return
            except BlockingIOError:
                writable = self._loop.create_future()
                self._loop.add_writer(sock, writable.set_result, None)
                try:
                    await writable
                finally:
                    self._loop.remove_writer(sock)


def _give_up(work: Future[tuple[bytes, Reply]]) -> None:
    """Undo an answer that nobody waits for any more."""
    if not work.cancelled() and work.exception() is None:
        work.result()[1].give_up()
