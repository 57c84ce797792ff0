"""The secret that engines prove to each other: one given to them, or else that of the user they run as.

The user's secret is 32 random bytes in a file that only this user can open. Nothing in the environment of a process
says where it is, so that all processes of a user find the same one; each handshake reads it anew, so that it may be
removed at any time: the next handshake makes another one, and all use that.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import stat
from contextlib import suppress
from functools import lru_cache

from mooncache.errors import TransportError, UsageError

SECRET_BYTES = 6
"""Least length of a secret that is given. All shorter ones can be tried on one recorded handshake: 95**5 of printable
characters are 12 years of a core, days of some graphics cards. Nobody has to type it: take 16 random bytes or more."""

KEY_BYTES = 32
SCRYPT = {"n": 1 << 14, "r": 8, "p": 1, "maxmem": 32 << 20}
"""A guess costs 50 ms of a core and 16 MiB; so does the first engine of a process."""

SALT = b"mooncache handshake 1"
"""The salt is the same for all, since a caller knows nothing yet of the engine that it calls."""

PLACES = ("/run/user/{uid}", "/dev/shm", "/tmp")
"""Folders where the user's own folder can be, best first: the first is there only while the user is logged in, but no
other user can take the name in it."""

FOLDER, FILE = "mooncache-{uid}", "secret"


def check_secret(secret: object) -> None:
    """Raise UsageError unless it is None or enough bytes."""
    if secret is not None and not isinstance(secret, bytes):
        raise UsageError(f"expected the secret to be None, text or bytes, got {type(secret).__name__}")
    if secret is not None and len(secret) < SECRET_BYTES:
        raise UsageError(
            f"expected a secret of at least {SECRET_BYTES} bytes, got {len(secret)}: who sees one handshake could "
            "guess it; take random ones, such as those of `openssl rand -hex 16`"
        )


@lru_cache(maxsize=64)
def key_of(secret: bytes) -> bytes:
    """Derive the key that proofs are made with, once a process and slowly: proofs must not help to guess a secret."""
    return hashlib.scrypt(secret, salt=SALT, dklen=KEY_BYTES, **SCRYPT)


# ------------------------------------------------------------------------------ of a user
def of_user() -> bytes:
    """Return the secret of the user that this process runs as; make it if there is none. Takes microseconds.

    Raises TransportError: no place for it, or others could read or have written what lies there. OSError: no file
    descriptor is left.
    """
    uid, why = os.geteuid(), []
    for place in PLACES:
        path = os.path.join(place, FOLDER).format(uid=uid)
        try:
            folder = _open_folder(path)
        except OSError as error:
            _raise_if_full(error)
            why.append(f"{path}: {error.strerror}")
            continue
        try:
            problem = _problem(os.fstat(folder), stat.S_ISDIR)
            if problem is None:
                return _read_or_make(folder, path)
            why.append(f"{path} {problem}")
        except OSError as error:
            _raise_if_full(error)
            why.append(f"{path}: {error.strerror}")
        finally:
            os.close(folder)
    raise TransportError(
        f"engines of user {uid} find no place for a secret of theirs ({'; '.join(why)}): give them the same secret=, "
        "or say insecure=True"
    )


def _raise_if_full(error: OSError) -> None:
    if error.errno in (errno.EMFILE, errno.ENFILE):
        raise error


def _open_folder(path: str) -> int:
    with suppress(FileExistsError):
        os.mkdir(path, 0o700)
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _problem(found: os.stat_result, is_kind: object) -> str | None:
    """Explain why others might have put the file there, or could read it."""
    if not is_kind(found.st_mode):  # type: ignore[operator]
        return "is of another kind"
    if found.st_uid != os.geteuid():
        return f"belongs to user {found.st_uid}"
    if found.st_mode & 0o077:
        return f"can be reached by other users (mode {found.st_mode & 0o777:o})"
    return None


def _read_or_make(folder: int, path: str) -> bytes:
    try:
        return _read(folder, path)
    except FileNotFoundError:
        _make(folder)
        return _read(folder, path)  # which may be another process's, that was faster


def _read(folder: int, path: str) -> bytes:
    """Read the file. Raises TransportError for a file that `_make` does not make."""
    try:
        file = os.open(FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError:
        raise
    except OSError as error:
        _raise_if_full(error)
        raise _unusable(path, error.strerror) from error
    try:
        problem = _problem(os.fstat(file), stat.S_ISREG)
        if problem is not None:
            raise _unusable(path, problem)
        secret = os.read(file, KEY_BYTES + 1)
        if len(secret) != KEY_BYTES:
            raise _unusable(path, f"does not hold {KEY_BYTES} bytes")
        return secret
    finally:
        os.close(file)


def _unusable(path: str, why: str | None) -> TransportError:
    return TransportError(
        f"the secret of this user's engines, {path}/{FILE}, {why}: remove it, so that a new one is made, or give all "
        "engines the same secret="
    )


def _make(folder: int) -> None:
    """Make the file, whole or not at all, unless there is one."""
    name = f".{secrets.token_hex(8)}"
    file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
    try:
        os.write(file, secrets.token_bytes(KEY_BYTES))
        with suppress(FileExistsError):
            os.link(name, FILE, src_dir_fd=folder, dst_dir_fd=folder)
    finally:
        os.close(file)
        os.unlink(name, dir_fd=folder)
