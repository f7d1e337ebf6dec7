"""A program that isolates processes: `python -S -E isolate.py VERB PARENT FD`, with what it shall do as JSON on stdin.

Verbs, each a class below: `sandbox` holds a pod's namespaces, `container` runs a command in them as the first process
of a process namespace of its own, `exec` runs a command in a container. Everything dies with the thread that started
it, and every mount is in a mount namespace that ends with the last process: nothing needs to be cleaned up.

A container's root is an overlay over the machine's own root, whose upper layer is in memory: every path can be made and
written, and the machine sees nothing of it. FD is a pipe for what the caller waits for: a line of JSON; then, of
`container`, its end when the command runs, or a second line that says why it does not.

A program of its own, with the standard library alone: between fork and exec, a process with threads can deadlock.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
from typing import Any

NEWNS, NEWUTS, NEWIPC, NEWPID, NEWNET = 0x00020000, 0x04000000, 0x08000000, 0x20000000, 0x40000000
RDONLY, NOSUID, NODEV, NOEXEC, REMOUNT, BIND, REC, PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG = 1
NOT_STARTED = 128
"""Exit code when the command could not be started."""

_OLD = "/.old-root"
"""Where the machine's root is while a container's is made."""
_OWN = ("/proc", "/sys", "/dev", "/run", "/tmp")
"""Where a container sees its own, and nothing of the machine's further file systems."""

_libc = ctypes.CDLL(None, use_errno=True)


def _check(what: str, result: int) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def _mount(source: str, target: str, kind: str | None, flags: int = 0, options: str | None = None) -> None:
    encoded = [None if one is None else one.encode() for one in (source, target, kind)]
    data = None if options is None else options.encode()
    _check(f"mount {source} on {target}", _libc.mount(*encoded, ctypes.c_ulong(flags), data))


def _bind(source: str, target: str, *, read_only: bool = False, recursive: bool = True) -> None:
    _mount(source, target, None, BIND | (REC if recursive else 0))
    if read_only:
        _mount("none", target, None, BIND | REMOUNT | RDONLY)


def _unshare(flags: int) -> None:
    _check("unshare", _libc.unshare(flags))


def _join(pid: int, *kinds: str) -> None:
    """Enter namespaces of a process: all are opened first, since entering one can hide the others."""
    opened = [os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC) for kind in kinds]
    for kind, descriptor in zip(kinds, opened, strict=True):
        _check(f"setns {kind} of process {pid}", _libc.setns(descriptor, 0))
        os.close(descriptor)


def _die_with_parent(parent: int | None = None) -> None:
    _check("prctl", _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    if parent is not None and os.getppid() != parent:
        os._exit(1)  # it died before the signal was set


def _say(descriptor: int, **message: Any) -> None:
    os.write(descriptor, json.dumps(message).encode() + b"\n")


def _wait(child: int) -> int:
    """Exit code of a child, as shells write it: 128 + N for a signal."""
    _, status = os.waitpid(child, 0)
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def sandbox(order: dict[str, Any], said: int) -> None:
    """Make a pod's namespaces and file systems in memory, and stay."""
    if order["network"] is None:
        _unshare(NEWNET | NEWNS | NEWIPC | NEWUTS)
    else:
        _join(order["network"], "net")
        _unshare(NEWNS | NEWIPC | NEWUTS)
    _mount("none", "/", None, REC | PRIVATE)
    hostname = order["hostname"].encode()
    _check("sethostname", _libc.sethostname(hostname, len(hostname)))
    for one in order["memory"]:
        size = f"size={one['size']},mode=1777" if one["size"] else "mode=1777"
        _mount("tmpfs", one["path"], "tmpfs", NOSUID | NODEV, size)
    _say(said, ready=True)
    os.close(said)
    os.execvp("sleep", ["pause", "infinity"])


def container(order: dict[str, Any], said: int) -> None:
    """Run a command as process 1, on a root of its own; end with its exit code."""
    _join(order["sandbox"], "net", "uts", "ipc", "mnt")
    _unshare(NEWNS | NEWPID)
    child = os.fork()
    if child:
        _say(said, pid=child)
        os.close(said)
        os._exit(_wait(child))
    try:
        _die_with_parent()
        os.setsid()
        _enter_root(order)
        _run(order)
    except OSError as error:
        _say(said, error=str(error))
    os._exit(NOT_STARTED)


def exec_in(order: dict[str, Any], said: int) -> None:
    """Run a command in a container; end with its exit code."""
    os.close(said)
    _join(order["pid"], "net", "uts", "ipc", "pid", "mnt")
    child = os.fork()
    if child:
        os._exit(_wait(child))
    try:
        _die_with_parent()
        _run(order)
    except OSError as error:
        os.write(2, f"{error}\n".encode())
    os._exit(NOT_STARTED)


def _run(order: dict[str, Any]) -> None:
    os.makedirs(order["directory"], exist_ok=True)
    os.chdir(order["directory"])
    if order.get("read_only_root"):
        _mount("none", "/", None, BIND | REMOUNT | RDONLY)
    try:
        os.execvpe(order["argv"][0], order["argv"], order["env"])
    except OSError as error:
        raise OSError(error.errno, f"cannot run {order['argv'][0]!r}: {error.strerror}") from error


def _enter_root(order: dict[str, Any]) -> None:
    base = order["root"]
    _mount("tmpfs", base, "tmpfs")
    upper, work, root = (f"{base}/{name}" for name in ("upper", "work", "root"))
    for folder in (upper, work, root):
        os.mkdir(folder)
    for hidden in order["hidden"]:
        os.makedirs(upper + hidden)
        os.chmod(upper + hidden, 0o1777 if hidden.endswith("tmp") else 0o755)
        os.setxattr(upper + hidden, "trusted.overlay.opaque", b"y")
    further = _further_mounts()
    sources = [os.path.realpath(one["source"]) for one in order["mounts"]]
    memory = os.path.realpath(order["memory"])
    _mount("overlay", root, "overlay", 0, f"lowerdir=/,upperdir={upper},workdir={work}")
    os.mkdir(root + _OLD)
    _check("pivot_root", _libc.pivot_root(root.encode(), (root + _OLD).encode()))
    os.chdir("/")
    # From here on paths, and the links in them, are the container's; the machine's begin with _OLD.
    for point in further:
        if os.path.exists(point) and point not in order["files"] and point not in order["links"]:
            _bind(_OLD + point, point, read_only=True, recursive=False)
    _system_folders(_OLD + memory)
    for path, text in order["files"].items():
        _replace(path)
        with open(path, "w") as file:
            file.write(text)
    for path, target in order["links"].items():
        _replace(path)
        os.symlink(target, path)
    for one, source in zip(order["mounts"], sources, strict=True):
        _make_point(_OLD + source, one["target"])
        _bind(_OLD + source, one["target"], read_only=one["read_only"])
    _check("umount of the old root", _libc.umount2(_OLD.encode(), MNT_DETACH))
    os.rmdir(_OLD)


def _further_mounts() -> list[str]:
    """The machine's other file systems: an overlay shows only its first."""
    with open("/proc/self/mountinfo") as file:
        points = [line.split()[4].encode().decode("unicode_escape") for line in file]
    inside = tuple(f"{own}/" for own in _OWN)
    return sorted({one for one in points if one != "/" and one not in _OWN and not one.startswith(inside)})


def _replace(path: str) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _make_point(source: str, target: str) -> None:
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    elif not os.path.exists(target):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))


def _system_folders(memory: str) -> None:
    """/proc, /sys and /dev as container runtimes make them; `memory` becomes /dev/shm."""
    _mount("proc", "/proc", "proc", NOSUID | NODEV | NOEXEC)
    _mount("sysfs", "/sys", "sysfs", NOSUID | NODEV | NOEXEC | RDONLY)
    if os.path.isdir(f"{_OLD}/sys/fs/cgroup"):
        _bind(f"{_OLD}/sys/fs/cgroup", "/sys/fs/cgroup", read_only=True)
    _mount("tmpfs", "/dev", "tmpfs", NOSUID, "mode=755")
    for name in ("null", "zero", "full", "random", "urandom", "tty"):
        _make_point(f"{_OLD}/dev/{name}", f"/dev/{name}")
        _bind(f"{_OLD}/dev/{name}", f"/dev/{name}")
    for name, target in (("fd", "fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        os.symlink(f"/proc/self/{target}", f"/dev/{name}")
    for name in ("pts", "shm"):
        os.mkdir(f"/dev/{name}")
    _mount("devpts", "/dev/pts", "devpts", NOSUID | NOEXEC, "newinstance,ptmxmode=0666,mode=0620")
    os.symlink("pts/ptmx", "/dev/ptmx")
    _bind(memory, "/dev/shm")


def main() -> None:
    """Entry point of the program."""
    verb, parent, said = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    _die_with_parent(parent)
    os.set_inheritable(said, False)
    order = json.load(sys.stdin)
    nothing = os.open("/dev/null", os.O_RDONLY)
    os.dup2(nothing, 0)
    try:
        {"sandbox": sandbox, "container": container, "exec": exec_in}[verb](order, said)
    except OSError as error:
        with contextlib.suppress(OSError):
            _say(said, error=str(error))
        sys.exit(f"{verb}: {error}")


if __name__ == "__main__":
    main()
