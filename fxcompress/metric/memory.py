"""How much memory can be had, so that what cannot fit is told before it is tried."""

from __future__ import annotations

from pathlib import Path

import torch

GIB = 1 << 30


def in_units(size: float) -> str:
    """A number of bytes in words.

    >>> in_units(3 << 29), in_units(5000)
    ('1.50 GiB', '4.88 KiB')
    """
    for unit, whole in (("GiB", GIB), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= whole:
            return f"{size / whole:.2f} {unit}"
    return f"{size:.0f} bytes"


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None if that cannot be found out.

    On the processor the least of what the machine has left, of what the control group may
    use (a container), and of the limit on the address space of the process.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    if device.type != "cpu":
        return None
    found = [each for each in (_machine(), _group(), _address_space()) if each is not None]
    return min(found, default=None)


def _machine() -> int | None:
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _group() -> int | None:
    root = "/sys/fs/cgroup/memory"
    limit, used = _lines(f"{root}.max"), _lines(f"{root}.current")
    if not limit or not used or not limit[0].isdigit():
        return None
    # Pages of files count as used, and are given up when others are wanted.
    cached = [line.split()[1] for line in _lines(f"{root}.stat") if line.startswith("file ")]
    return int(limit[0]) - int(used[0]) + sum(map(int, cached))


def _address_space() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    pages = _lines("/proc/self/statm")
    if limit == resource.RLIM_INFINITY or not pages:
        return None
    return limit - int(pages[0].split()[0]) * resource.getpagesize()


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="ascii").splitlines()
    except OSError:
        return []
