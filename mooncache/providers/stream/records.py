"""The records of wires that carry frames over sockets: queue pairs, their entries, ports, lanes, frames."""

import numpy as np

from mooncache.kernels.records.base import TIMESPEC, record_at, row
from mooncache.kernels.records.linux import MSGHDR
from mooncache.providers.records import PORT_FIELDS, QUEUE_FIELDS

QUEUE = row(
    [
        *QUEUE_FIELDS,
        ("sent", np.int64),  # of those posted, how many have been given to lanes or copied
        ("broken", np.int64),  # Broken
        ("table", np.int64),  # address of the header of the peer's region table
        ("port", np.int64),  # address of its worker's
        ("lanes", np.int64),  # address of int64[lane_count], those of its lanes
        ("lane_count", np.int64),
        ("doubt", np.int64),  # slices ever sent on a lane that ended before they were answered
        # shared memory only
        ("direct", np.int64),  # entries ever posted to be copied
        ("copied", np.int64),  # of those, how many are; any worker
        ("claimed", np.int64),  # up to which entry workers have taken them on
        ("maps", np.int64),  # address of the table of the peer's memory as it is mapped here, or 0
        ("map_hint", np.int64),  # where in it the last was found
        ("pid", np.int64),  # the peer's process, where its memory can be copied without a mapping, or 0
        ("guards", np.int64),  # address of the guards in the peer's table of keys, a cache line a worker
        ("posting", np.int64),  # odd while entries are being posted
    ]
)

ENTRY = np.dtype(
    [
        ("id", np.int64),  # wr_id
        ("local", np.int64),  # address here
        ("remote", np.int64),  # address at the peer
        ("length", np.int64),  # bytes
        ("opcode", np.int64),
        ("key", np.int64),  # rkey; its outcome, complemented, once it is decided
        ("status", np.int64),  # a WcStatus, or PENDING
        ("route", np.int64),  # Route, or where the peer's range is mapped here
    ]
)  # of a queue pair's ring

PORT = row(
    [
        *PORT_FIELDS,
        ("index", np.int64),  # the worker's
        ("epoll", np.int64),  # descriptor
        ("syscall", np.int64),  # addresses of libc's functions
        ("errno", np.int64),
        ("clock", np.int64),
        ("write", np.int64),
        ("lanes", np.int64),  # address of LANE[lane_count]
        ("lane_count", np.int64),  # lanes ever used
        ("adopt", np.int64),  # rises when Python has made a lane ready, or wants one cut
        ("adopted", np.int64),  # what it was when the worker looked last
        ("list", np.int64),  # address of int64[listed]: lanes with something to do
        ("listed", np.int64),
        ("keys", np.int64),  # address of this engine's KEYs
        ("inbox", np.int64),  # address
        ("zeros", np.int64),  # address of pages that read as zero
        ("events", np.int64),  # address of EPOLL_EVENT[EVENTS]
        ("trouble_fd", np.int64),  # eventfd that tells Python of lanes that broke
        ("nudge", np.int64),  # eventfd that makes a sleeping worker look at its words
        ("one", np.int64),  # 1: what is written to an eventfd
        ("now", np.int64),  # ns, at the beginning of the round
        ("next_check", np.int64),  # when to look for stalls, ns
        ("stall", np.int64),  # how long nothing may move while something is under way, ns
        ("turns", np.int64),  # rounds
        ("fresh", np.int64),  # 1: epoll was asked just before
        ("message", MSGHDR),
        ("timespec", TIMESPEC),
        ("poll", np.int64, 3),  # scratch of `linux.is_ready`; the last two stay 0
        # shared memory only
        ("asleep", np.int64),  # 1: it may be called for help
        ("ports", np.int64),  # address of int64[port_count]: those of all workers
        ("port_count", np.int64),
        ("lots", np.int64),  # polls
        ("copier", np.int64),  # address of a COPIER
    ]
)

LANE = row(
    [
        ("state", np.int64),  # LaneState
        ("fd", np.int64),
        ("queue", np.int64),  # address of its queue pair's row, or 0: a peer sends over it
        ("port", np.int64),
        ("listed", np.int64),  # 1: in the port's list
        ("readable", np.int64),  # 0: no; 1: perhaps; ENDED
        ("writable", np.int64),  # 0: no; 1: perhaps
        ("reason", np.int64),  # Reason why it broke
        ("errno", np.int64),
        ("moving", np.int64),  # odd while pages of ours are touched for the peer
        ("cut", np.int64),  # 1: Python wants it ended
        ("progress", np.int64),  # when something moved last, ns
        ("seq", np.int64),  # of the next request
        ("sender", np.int64),  # address of who sends notifications over it
        # the frame that comes in
        ("in_stage", np.int64),  # HEADER, TABLE or BODY
        ("in_got", np.int64),  # bytes of its head
        ("in_head", np.int64),  # address
        ("in_next", np.int64),  # address of the next one's header, which may come along
        ("in_next_got", np.int64),  # bytes of that
        ("in_iov", np.int64),  # address of IOVEC[]: where its body goes
        ("in_at", np.int64),  # first of those with bytes to come
        ("in_end", np.int64),  # how many there are
        ("in_status", np.int64),  # address of CELL[FRAME_SLICES]: a WcStatus for each slice
        ("in_note", np.int64),  # address of what takes a notification
        ("in_single", np.int64),  # 1: ranges go one by one, since one of them is gone
        # the frame that goes out
        ("out_head", np.int64),  # address
        ("out_iov", np.int64),  # address of IOVEC[]
        ("out_at", np.int64),  # first of those with bytes to go
        ("out_end", np.int64),  # how many there are
        ("out_kind", np.int64),  # Frame
        ("out_trailer", np.int64),  # address of its trailer
        ("out_single", np.int64),  # 1: ranges go one by one
        # requests sent and not answered
        ("flights", np.int64),  # address of FLIGHT[FLIGHTS], by sequence number
        ("flight_head", np.int64),  # requests ever sent
        ("flight_tail", np.int64),  # answered
        ("trailer", np.int64),  # address of the trailer of an answer
    ]
)

FLIGHT = np.dtype(
    [
        ("first", np.int64),  # number of its first entry
        ("count", np.int64),  # entries
        ("opcode", np.int64),
    ]
)

FRAME = np.dtype(
    [
        ("kind", np.int64),  # MAGIC and Frame
        ("seq", np.int64),
        ("count", np.int64),  # entries of its table
        ("bytes", np.int64),  # of its body
    ]
)  # a frame's first words; its table follows
SLICE = np.dtype([("first", np.int64), ("second", np.int64), ("third", np.int64)])  # an entry of a frame's table
queue_at, port_at, lane_at = record_at(QUEUE), record_at(PORT), record_at(LANE)
entry_at, flight_at, frame_at, slice_at = record_at(ENTRY), record_at(FLIGHT), record_at(FRAME), record_at(SLICE)
