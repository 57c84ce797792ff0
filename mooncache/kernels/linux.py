"""System calls of kernels, by number: what a wire without a NIC needs, and sleeping until a descriptor stirs.

Each takes the address of libc's `syscall` and returns what the kernel does: -1 on an error, with `errno` saying why.
The structs are those of LP64 Linux.
"""

from mooncache.kernels.arrays import WORD
from mooncache.kernels.atomics import X86, call_syscall, call_word, i32, poke
from mooncache.kernels.jit import kernel

SYS_CLOSE, SYS_SENDMSG, SYS_RECVMSG, SYS_RECVFROM = (3, 46, 47, 45) if X86 else (57, 211, 212, 207)
SYS_EPOLL_CTL, SYS_EPOLL_PWAIT, SYS_PPOLL, SYS_SCHED_YIELD = (233, 281, 271, 24) if X86 else (21, 22, 73, 124)
SYS_PROCESS_VM_READV, SYS_PROCESS_VM_WRITEV = (310, 311) if X86 else (270, 271)

EPOLLIN, EPOLLOUT, EPOLLERR, EPOLLHUP, EPOLLRDHUP, EPOLLET = 0x1, 0x4, 0x8, 0x10, 0x2000, 1 << 31
EPOLL_CTL_ADD = 1
MSG_TRUNC, MSG_DONTWAIT, MSG_NOSIGNAL = 0x20, 0x40, 0x4000
POLLIN, POLLOUT, POLLRDHUP = 0x1, 0x4, 0x2000
ESRCH, EINTR, EAGAIN, EFAULT = 3, 4, 11, 14


@kernel
def errno(location):
    """Return this thread's errno; `location` is the address of libc's `__errno_location`."""
    return int(i32(call_word(location, 0))[0])


@kernel
def sendmsg(syscall, descriptor, msghdr):
    """Send from the ranges of a msghdr; return the bytes a non-blocking socket took. Never raises SIGPIPE."""
    return call_syscall(syscall, SYS_SENDMSG, descriptor, msghdr, MSG_NOSIGNAL | MSG_DONTWAIT, 0, 0, 0)


@kernel
def recvmsg(syscall, descriptor, msghdr):
    """Receive into the ranges of a msghdr, without waiting; return bytes, 0 at the end of the stream."""
    return call_syscall(syscall, SYS_RECVMSG, descriptor, msghdr, MSG_DONTWAIT, 0, 0, 0)


@kernel
def recv(syscall, descriptor, buffer, length):
    """Receive into one buffer, without waiting; return bytes, 0 at the end of the stream."""
    return call_syscall(syscall, SYS_RECVFROM, descriptor, buffer, length, MSG_DONTWAIT, 0, 0)


@kernel
def discard(syscall, descriptor, length):
    """Drop up to `length` bytes of a TCP stream unread; return how many."""
    return call_syscall(syscall, SYS_RECVFROM, descriptor, 0, length, MSG_DONTWAIT | MSG_TRUNC, 0, 0)


@kernel
def close(syscall, descriptor):
    """Close a descriptor; every epoll set forgets it."""
    return call_syscall(syscall, SYS_CLOSE, descriptor, 0, 0, 0, 0, 0)


@kernel
def epoll_add(syscall, epoll, descriptor, event):
    """Watch a descriptor; `event` is the address of a filled struct epoll_event."""
    return call_syscall(syscall, SYS_EPOLL_CTL, epoll, EPOLL_CTL_ADD, descriptor, event, 0, 0)


@kernel
def epoll_wait(syscall, epoll, events, most, ms):
    """Write events to `events`, after at most `ms` milliseconds; 0 looks only. Return how many."""
    return call_syscall(syscall, SYS_EPOLL_PWAIT, epoll, events, most, ms, 0, 0)


@kernel
def is_ready(syscall, descriptor, events, scratch):
    """Return whether one of these events of poll(2) holds for a descriptor, or an error. Does not wait.

    POLLRDHUP: a socket's peer has closed or reset its end, whatever still lies in the socket. `scratch`: three words,
    of which the last two stay 0.
    """
    poke(scratch, descriptor | events << 32)  # struct pollfd; what happened is its upper 16 bits
    return call_syscall(syscall, SYS_PPOLL, scratch, 1, scratch + WORD, 0, 0, 0) > 0


@kernel
def sched_yield(syscall):
    """Yield this core to another thread that is ready."""
    return call_syscall(syscall, SYS_SCHED_YIELD, 0, 0, 0, 0, 0, 0)


@kernel
def process_readv(syscall, pid, local, remote, n):
    """Copy bytes from another process; `local` and `remote` are addresses of n iovecs each. Return bytes."""
    return call_syscall(syscall, SYS_PROCESS_VM_READV, pid, local, n, remote, n, 0)


@kernel
def process_writev(syscall, pid, local, remote, n):
    """Copy bytes into another process; the same operands. Return bytes."""
    return call_syscall(syscall, SYS_PROCESS_VM_WRITEV, pid, local, n, remote, n, 0)
