"""Exchange between the ranks of a gang: a ring of TCP connections, with the standard library and NumPy alone.

Every rank sends to the one after it and receives from the one before it. Whatever the operation, a rank
sends blocks of its own first and then repeats blocks that it has received; so one loop, `Ring._exchange`,
serves them all. It runs in the caller's thread, on non-blocking sockets: what arrives is always taken,
whether or not there is room to send, so that no buffer size can make the ring wait for itself.

Against the stream of data each connection carries small frames back: signs of life from a rank that waits,
and the news that a rank has failed. The news goes round the ring both ways, and every rank raises it.
"""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate, chain, pairwise
from typing import Any, NoReturn

import numpy as np
from numpy.typing import DTypeLike, NDArray

from spark_nn.errors import CollectiveError, OutOfStep, PeerLost
from spark_nn.gang.collective import CODES, OPS, TYPES, Average, Collective, check_root, flattened, matching
from spark_nn.gang.meeting import form, listen
from spark_nn.gang.shared import Places, Shared, room
from spark_nn.gang.wire import (
    Address,
    Inlet,
    Kind,
    Operation,
    Outlet,
    Position,
    hang_up,
    header,
    place,
    text_frame,
)

__all__ = ["Ring", "listen"]

_UFUNCS = {"sum": np.add, "mean": np.add, "max": np.maximum, "min": np.minimum}

_BLOCK = 512 * 1024  # bytes that travel as one frame: many against the cost of a call, few against a cache
_POWERS = {2**power for power in range(1, 17)}
_SPIN = 2e-4  # seconds of looking again and again before sleeping: to be woken takes a core about as long
_NAP = 2e-3  # seconds between two looks at what the others write, at most
_GRACE = 0.25  # seconds that the news of a failure may lag behind its consequences


class Ring(Collective):
    """Ranks in a ring of TCP connections; made by `Ring.connect`.

    Large buffers are reduced as in [1]_: cut into one piece per rank, each of which travels round once and is
    added to on its way, and round again to hand out the result. A rank sends 2 (world - 1) / world of the
    buffer and needs a single block of memory besides it, whatever the number of ranks; several arrays that are
    averaged together are first laid end to end, in memory that is kept. Small buffers travel
    whole, half as many hops, and each rank combines them in the order of ranks; between ranks of one machine
    they do not travel, but lie in memory that all of them see.

    One operation runs at a time: further threads wait for their turn.

    References
    ----------
    .. [1] P. Patarasu and X. Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations",
       Journal of Parallel and Distributed Computing 69 (2009) 117-124.
    """

    def __init__(
        self,
        rank: int,
        addresses: Sequence[Address],
        before: socket.socket,
        after: socket.socket,
        timeout: float,
        spin: bool = False,
    ) -> None:
        self.rank = rank
        self.world = len(addresses)
        self._before, self._after = (
            f"rank {peer} ({place(addresses[peer])})" for peer in ((rank - 1) % self.world, (rank + 1) % self.world)
        )
        self._timeout = timeout
        self._spin = _SPIN if spin else 0.0
        self._shared: Shared | None = None
        self._inlet, self._outlet = Inlet(before), Outlet(after)  # the stream of data
        self._back_inlet, self._back_outlet = Inlet(after), Outlet(before)  # the small frames against it
        self._scratch = np.empty(_BLOCK, np.uint8)
        self._places = Places(self._scratch, self.world, _BLOCK)
        self._pack: NDArray[np.uint8] = np.empty(0, np.uint8)
        self._lock = threading.RLock()  # reentrant: a signal's handler may abort amid an operation
        self._place = (0, 0)
        self._position = Position()
        self._heard_before = self._heard_after = self._sign_due = self._looked = 0.0
        self._left: Position | None = None  # the last operation of the rank after this one, if it has closed
        self._aborted: str | None = None

    @classmethod
    def connect(
        cls,
        *,
        rank: int,
        addresses: Sequence[Address],
        listener: socket.socket,
        secret: bytes,
        timeout: float,
        spin: bool = False,
    ) -> Ring:
        """Form the ring; returns once it has closed on all ranks.

        Parameters
        ----------
        rank : int
            This rank.
        addresses : sequence of (host, port)
            Where each rank listens, in the order of ranks, the same on all of them.
        listener : socket.socket
            This rank's own, from `listen`. It is closed once the ring has formed or failed to.
        secret : bytes
            Known to the ranks of this ring alone. It proves them to each other and is never sent.
        timeout : float
            The seconds a neighbour may take to come, and later to give a sign of life while it is waited for.
        spin : bool
            Whether each rank has a core of its own, on which it may look for data some time before it sleeps.

        Raises
        ------
        PeerLost
            A rank did not come; all ranks that did come learn which.
        """
        if not 0 <= rank < len(addresses):
            raise ValueError(f"rank {rank} has no address among the {len(addresses)} given")
        if not secret:
            raise ValueError("the secret is empty: it must be random bytes that only the ring's ranks know")
        before, after = form(rank, addresses, listener, secret, timeout)
        # A neighbour that still waits for its own other neighbour keeps silent until it gives up, which is
        # at most `timeout` from now: wait a little longer, so as to hear which rank is missing.
        ring = cls(rank, addresses, before, after, timeout + 1, spin)
        try:
            ring.barrier()
            ring._shared = Shared.form(rank, ring.world, _BLOCK, ring.all_gather, watch=spin)
        except BaseException:
            ring.close()
            raise
        ring._timeout = timeout
        return ring

    def mark(self, epoch: int, step: int) -> None:
        """See `Collective.mark`."""
        self._place = (int(epoch), int(step))

    def all_reduce(self, buffer: NDArray[Any], op: str = "sum", source: NDArray[Any] | None = None) -> None:
        """See `Collective.all_reduce`."""
        flat = flattened(buffer, op)
        self._reduction(flat.dtype, (flat.size,), op)([matching(flat, source)], [flat])

    def averaging(self, dtype: np.dtype[Any], sizes: tuple[int, ...]) -> Average:
        """See `Collective.averaging`."""
        return self._reduction(dtype, sizes, "mean")

    def broadcast(self, buffer: NDArray[Any], root: int = 0) -> None:
        """See `Collective.broadcast`."""
        flat = flattened(buffer)
        check_root(root, self.world)
        blocks = _cut(_raw(flat))
        sends = blocks if (self.rank + 1) % self.world != root else []
        receives = blocks if self.rank != root else []
        with self._operation(Operation.BROADCAST, flat.nbytes, flat.dtype, root):
            self._exchange(sends, receives, lead=0 if receives else len(sends))

    def all_gather(self, data: bytes) -> list[bytes]:
        """See `Collective.all_gather`."""
        mine = bytes(data)
        lengths = np.full(self.world, len(mine), np.int64)
        with self._lock:
            with self._operation(Operation.ALL_GATHER, lengths.nbytes):
                self._hand_round([_raw(lengths[rank : rank + 1]) for rank in range(self.world)])
            with self._operation(Operation.ALL_GATHER, int(lengths.sum())):
                pieces = [bytearray(length) for length in lengths.tolist()]
                pieces[self.rank][:] = mine
                self._hand_round([memoryview(piece) for piece in pieces])
        return [bytes(piece) for piece in pieces]

    def barrier(self) -> None:
        """See `Collective.barrier`."""
        with self._operation(Operation.BARRIER, 0):
            self._hand_round([memoryview(b"")] * self.world)

    @contextmanager
    def waited_for(self) -> Iterator[None]:
        """See `Collective.waited_for`: the neighbours get signs of life meanwhile."""
        over = threading.Event()
        signs = threading.Thread(target=self._give_signs, args=(over,), name="spark_nn-signs", daemon=True)
        signs.start()
        try:
            yield
        finally:
            over.set()
            signs.join()

    def abort(self, reason: str) -> None:
        """See `Collective.abort`."""
        self._aborted = f"rank {self.rank} failed: {reason}"
        if not self._lock.acquire(blocking=False):
            # Another thread is in an operation: this wakes it, to find the verdict and let go of the lock.
            with suppress(OSError):
                self._inlet.socket.shutdown(socket.SHUT_RD)
            self._lock.acquire()
        try:
            self._break(CollectiveError(self._aborted))
        finally:
            self._lock.release()

    def close(self) -> None:
        """See `Collective.close`."""
        with self._lock:
            if not self.error:
                self._say(header(Kind.FINISHED, self._position.pack(), 0), patience=self._timeout)
                self.error = CollectiveError(f"rank {self.rank} has closed its ring")
            hang_up(self._inlet.socket)
            hang_up(self._outlet.socket)

    def _operation(self, operation: Operation, nbytes: int, dtype: DTypeLike = np.uint8, argument: int = 0) -> _Turn:
        """Take a turn and a place in the sequence; whatever goes wrong within breaks the ring for good."""
        return _Turn(self, operation, nbytes, CODES[np.dtype(dtype)], argument)

    def _begin(self, operation: Operation, nbytes: int, code: int, argument: int) -> None:
        if self.error:
            raise _again(self.error)
        if self._aborted:
            raise CollectiveError(self._aborted)
        sequence = self._position.sequence + 1
        self._position = Position(operation, code, argument, sequence, *self._place, nbytes)
        self._heard_before = self._heard_after = self._looked = now = time.monotonic()
        self._sign_due = now + self._timeout / 4
        if self._left and self._left.sequence < sequence:
            error = self._closed(self._after, self._left)
            self._break(error)
            raise error

    def _break(self, error: BaseException) -> None:
        """Let no later call through, and give both neighbours the news, once."""
        if self.error:
            return
        if isinstance(error, CollectiveError):
            self.error = _again(error)
        else:
            self.error = CollectiveError(f"rank {self.rank} failed: {error!r}")
        kind = Kind.OUT_OF_STEP if isinstance(error, OutOfStep) else Kind.LOST
        self._say(text_frame(kind, str(self.error)))

    def _give_signs(self, over: threading.Event) -> None:
        while not over.wait(self._timeout / 4):
            with self._lock:
                if not self.error:
                    self._say(header(Kind.WAITING, self._position.pack(), 0))

    def _say(self, frame: bytes, patience: float = 0) -> None:
        self._back_outlet.say(frame, patience)
        self._outlet.say(frame, patience)

    def _reduction(self, dtype: np.dtype[Any], sizes: tuple[int, ...], op: str) -> Average:
        """What combines arrays of one dimension and these sizes: small ones as a whole, others in pieces."""
        operation = self._operation(Operation.ALL_REDUCE, sum(sizes) * dtype.itemsize, dtype, OPS.index(op))
        reduce = self._reduce_whole if self.world * room(dtype, sizes) <= _BLOCK else self._reduce_packed

        def combine(given: Sequence[NDArray[Any]], filled: Sequence[NDArray[Any]]) -> None:
            with operation, np.errstate(all="ignore"):  # an overflow is the training's to judge
                reduce(given, op, filled, sizes)

        return combine

    def _reduce_packed(
        self, given: Sequence[NDArray[Any]], op: str, flats: Sequence[NDArray[Any]], sizes: tuple[int, ...]
    ) -> None:
        """Reduce arrays in pieces, laid end to end if they are several."""
        whole = flats[0] if len(flats) == 1 else self._packed(flats[0].dtype, sum(sizes))
        bounds = list(pairwise(accumulate(sizes, initial=0)))
        for part, (start, stop) in zip(given, bounds, strict=True):
            if part is not whole:
                np.copyto(whole[start:stop], part)
        self._reduce_in_pieces(whole, op)
        for flat, (start, stop) in zip(flats, bounds, strict=True):
            if flat is not whole:
                np.copyto(flat, whole[start:stop])

    def _packed(self, dtype: np.dtype[Any], size: int) -> NDArray[Any]:
        """Memory to lay arrays end to end in: the same at every step, as fresh memory is slow."""
        if self._pack.size < size * dtype.itemsize:
            self._pack = np.empty(size * dtype.itemsize, np.uint8)
        return self._pack[: size * dtype.itemsize].view(dtype)

    def _reduce_whole(
        self, given: Sequence[NDArray[Any]], op: str, flats: Sequence[NDArray[Any]], sizes: tuple[int, ...]
    ) -> None:
        """Take in everybody's arrays, then combine them in the order of ranks."""
        shared, world, dtype = self._shared, self.world, flats[0].dtype
        rows = self._places.of(dtype, sizes) if shared is None else shared.places(dtype, sizes)
        # Halving is exact, and so may as well be done on the way.
        halved = op == "mean" and world in _POWERS and dtype.itemsize >= 4
        share = dtype.type(1 / world) if halved else None
        for part, mine in zip(given, rows[self.rank], strict=True):
            if share is None:
                np.copyto(mine, part)
            else:
                np.multiply(part, share, out=mine)
        if shared is None:
            self._hand_round([area[: room(dtype, sizes)].data for area in self._places.areas])
        elif shared.watched:
            self._meet(shared)
        else:
            self._hand_round([memoryview(b"")] * world)
        for flat, first, *others in zip(flats, *rows, strict=True):
            result = first
            for other in others:
                result = _UFUNCS[op](result, other, out=flat)
            if result is not flat:  # of a ring of one
                np.copyto(flat, result)
            if op == "mean" and not halved:
                np.divide(flat, world, out=flat)

    def _reduce_in_pieces(self, flat: NDArray[Any], op: str) -> None:
        """Hand one piece per rank round twice: once to combine it, once to hand out the result."""
        bounds = [flat.size * rank // self.world for rank in range(self.world + 1)]
        hops = self._hops([_raw(flat[start:stop]) for start, stop in pairwise(bounds)], rounds=2)
        partial = sum(map(len, hops[1 : self.world - 1]))  # blocks that come and still lack some rank's share
        combine, scratch = _UFUNCS[op], self._scratch.view(flat.dtype)

        def fold(number: int, block: memoryview) -> None:
            mine = np.frombuffer(block, flat.dtype)
            combine(mine, scratch[: mine.size], out=mine)
            if op == "mean" and number >= partial:
                np.divide(mine, self.world, out=mine)

        sends, receives = list(chain(*hops[:-1])), list(chain(*hops[1:]))
        folds = partial + len(hops[self.world - 1])
        self._exchange(sends, receives, lead=len(hops[0]), folds=folds, fold=fold)

    def _meet(self, shared: Shared) -> None:
        """Wait until all ranks have come, as the memory shows that they share: no frame is as fast."""
        position = self._position.pack()
        shared.arrive(position)
        began = time.perf_counter()
        while not shared.all_at(position):
            if time.perf_counter() > began + _SPIN:
                self._doze(shared, position, began)
                return

    def _doze(self, shared: Shared, position: bytes, began: float) -> None:
        """Wait for one that is late, and leave the core to others; the ring brings bad news and signs of life."""
        stray = None
        while not shared.all_at(position):
            time.sleep(min((time.perf_counter() - began) / 8, _NAP))
            frames = self._listen(for_before=True, for_after=False, patience=0)
            if shared.all_at(position):
                return  # and what has come is for the next operation
            if frames:
                self._came(position, memoryview(b""))
            before, stray = stray, shared.stray(position)
            if stray is not None and stray == before:
                raise self._out_of_step(f"rank {stray[0]}", stray[1])

    def _hand_round(self, pieces: Sequence[memoryview]) -> None:
        """Give every rank all pieces; each holds its own beforehand."""
        hops = self._hops(pieces)
        self._exchange(list(chain(*hops[:-1])), list(chain(*hops[1:])), lead=len(hops[0]))

    def _hops(self, pieces: Sequence[memoryview], rounds: int = 1) -> list[list[memoryview]]:
        """Return the pieces as they pass this rank, each cut into blocks: its own, then those that arrive.

        It sends all but the last and receives all but the first.
        """
        count = rounds * (self.world - 1) + 1
        return [_cut(pieces[(self.rank - hop) % self.world]) for hop in range(count)]

    def _exchange(
        self,
        sends: Sequence[memoryview],
        receives: Sequence[memoryview],
        lead: int,
        folds: int = 0,
        fold: Callable[[int, memoryview], None] | None = None,
    ) -> None:
        """Send and receive at the same time, until all blocks have gone and come.

        Parameters
        ----------
        sends, receives : sequence of memoryview
            The memory to send from and to receive into, in order.
        lead : int
            How many blocks may go before any has come. Each further one repeats a block received, in order,
            and so may go when that one is complete.
        folds, fold : int, callable
            How many of the blocks received do not overwrite their memory but come to the scratch block, for
            `fold(number, memory)` to combine the two.
        """
        position = self._position.pack()
        scratch = self._scratch.data
        sent = received = 0
        while sent < len(sends) or received < len(receives):
            waiting = True
            may_send = sent < min(len(sends), lead + received)
            if may_send and self._sent(position, sends[sent]):
                sent, waiting = sent + 1, False
            if received < len(receives):
                block = receives[received]
                folded = fold is not None and received < folds
                if self._came(position, scratch[: len(block)] if folded else block):
                    if fold is not None and folded:
                        fold(received, block)
                    received, waiting = received + 1, False
            if waiting:
                self._wait(for_before=received < len(receives), for_after=may_send)

    def _sent(self, position: bytes, block: memoryview) -> bool:
        """Send what can go, and say whether that was the rest of the block."""
        try:
            return self._outlet.sent(position, block)
        except OSError as error:
            self._listen_back()  # for its last words
            self._lose(self._after, error)

    def _came(self, position: bytes, block: memoryview) -> bool:
        """Receive what has come, and say whether that was the rest of the block."""
        read = self._inlet.read
        try:
            while self._inlet.head_came():
                if self._inlet.head == header(Kind.BLOCK, position, len(block)):
                    return self._inlet.body_came(block)
                self._hear(self._inlet, self._before)
        except (OSError, EOFError) as error:
            # Amid a block even a rank that knew why had no way to say so: the news comes by the other side.
            self._listen_back(patience=0 if self._inlet.between_frames else _GRACE)
            self._lose(self._before, error)
        finally:
            # The look at the sockets may have missed it: ranks that wait tell each other so at the same times, and then
            # each frame comes between the look and the reading.
            if self._inlet.read != read:
                self._heard_before = time.monotonic()
        return False

    def _wait(self, for_before: bool, for_after: bool) -> None:
        """Sleep until a neighbour can be read or written; raise where one that is waited for keeps silent."""
        if not (self._spin and for_before and self._inlet.comes_within(self._spin)):
            self._listen(for_before, for_after)

    def _listen(self, for_before: bool, for_after: bool, patience: float = np.inf) -> bool:
        """Wait so long for the neighbours; say whether the one before has sent something."""
        if self._aborted:
            raise CollectiveError(self._aborted)
        before, after = self._inlet.socket.fileno(), self._outlet.socket.fileno()
        poller, until = select.poll(), self._sign_due
        if not self._left:
            poller.register(after, select.POLLIN)
        if for_after:
            poller.register(after, select.POLLIN | select.POLLOUT)
            until = min(until, self._heard_after + self._timeout)
        if for_before:  # else what has come already, for the next operation, would let nobody sleep
            poller.register(before, select.POLLIN)
            until = min(until, self._heard_before + self._timeout)
        ready = dict(poller.poll(max(0.0, min(until - time.monotonic(), patience)) * 1000))
        now = time.monotonic()
        # No look is due later than a quarter of the limit after the one before. What is over it, this rank did not
        # run, and neither, perhaps, did the machine: only time in which it listened counts as a neighbour's silence.
        absence = max(0.0, now - self._looked - self._timeout / 4)
        self._heard_before += absence
        self._heard_after += absence
        self._looked = now
        if before in ready:
            self._heard_before = now
        if after in ready:
            self._heard_after = now
            if ready[after] != select.POLLOUT:
                self._listen_back()
        if for_before and now >= self._heard_before + self._timeout:
            raise PeerLost(f"{self._before} kept silent for {self._timeout:g} s")
        if for_after and now >= self._heard_after + self._timeout:
            raise PeerLost(f"{self._after} took no data for {self._timeout:g} s")
        if now >= self._sign_due:
            # The ranks that wait for this one must not take it for the one that all are waiting for.
            self._sign_due = now + self._timeout / 4
            self._say(header(Kind.WAITING, self._position.pack(), 0))
        return before in ready

    def _listen_back(self, patience: float = 0) -> None:
        """Act on the small frames from the rank after this one, and wait a while for more."""
        until = time.monotonic() + patience
        try:
            while not self._left:
                if self._back_inlet.head_came():
                    self._heard_after = time.monotonic()
                    self._hear(self._back_inlet, self._after)
                elif time.monotonic() >= until:
                    return
                else:
                    self._back_inlet.wait(until - time.monotonic())
        except (OSError, EOFError) as error:
            self._lose(self._after, error)

    def _hear(self, inlet: Inlet, who: str) -> None:
        """Act on a frame that is not the block expected: raise the news it brings, or pass on to the next."""
        kind, length = inlet.kind_and_length()
        theirs, ours = inlet.position(), self._position
        if kind is Kind.LOST:
            raise PeerLost(inlet.text(length))
        if kind is Kind.OUT_OF_STEP:
            raise OutOfStep(inlet.text(length))
        if kind is Kind.FINISHED:
            if inlet is self._inlet or theirs.sequence < ours.sequence:
                raise self._closed(who, theirs)
            self._left = theirs  # it has been in this operation to the end, and needs nothing more of this rank
        elif kind is Kind.BLOCK or (theirs.sequence == ours.sequence and theirs != ours):
            raise self._out_of_step(who, theirs)
        inlet.skip()

    def _out_of_step(self, who: str, theirs: Position) -> OutOfStep:
        return OutOfStep(
            f"{who} is at {_describe(theirs)}, and rank {self.rank} at {_describe(self._position)}. "
            "All ranks must make the same calls in the same order: look for unequal numbers of batches"
        )

    def _closed(self, who: str, last: Position) -> PeerLost:
        here = f"rank {self.rank} is at {_describe(self._position)}"
        return PeerLost(f"{who} closed in good order after {_describe(last)}, and {here}")

    def _lose(self, who: str, error: Exception) -> NoReturn:
        """Raise what the end of a connection means."""
        if self._aborted:
            raise CollectiveError(self._aborted)
        if isinstance(error, (EOFError, ConnectionError)):
            raise PeerLost(f"{who} closed its connection") from error
        raise PeerLost(f"{who} was lost: {error}") from error


class _Turn:
    """An operation's turn: a class, as a generator would cost a small one more than its data."""

    __slots__ = ("_operation", "_ring")

    def __init__(self, ring: Ring, *operation: Any) -> None:
        self._ring = ring
        self._operation = operation

    def __enter__(self) -> None:
        self._ring._lock.acquire()
        try:
            self._ring._begin(*self._operation)
        except BaseException:
            self._ring._lock.release()
            raise

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        try:
            if error is not None:
                self._ring._break(error)
        finally:
            self._ring._lock.release()


def _again(error: CollectiveError) -> CollectiveError:
    """Return the error without its traceback, which would keep the frames' buffers alive."""
    return type(error)(str(error))


def _raw(flat: NDArray[Any]) -> memoryview:
    """Return the bytes of an array, the same memory."""
    return flat.view(np.uint8).data


def _cut(piece: memoryview) -> list[memoryview]:
    """Cut a piece into blocks; an empty piece is one empty block, so that its header travels."""
    return [piece[start : start + _BLOCK] for start in range(0, max(len(piece), 1), _BLOCK)]


def _describe(position: Position) -> str:
    """Say in words where a rank stands."""
    operation = Operation(position.operation)
    argument = {
        Operation.ALL_REDUCE: f" ({OPS[position.argument % len(OPS)]})",
        Operation.BROADCAST: f" (from rank {position.argument})",
    }.get(operation, "")
    return (
        f"{operation.name.lower()}{argument} of {position.nbytes} bytes of {TYPES[position.dtype]}, "
        f"operation {position.sequence}, epoch {position.epoch}, step {position.step}"
    )
