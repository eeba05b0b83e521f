"""What this process holds in memory, on Linux.

Not `getrusage`: the kernel carries a parent's peak through `exec` into `ru_maxrss`, so that a child
of a large process seems large.
"""

import re
from pathlib import Path


def resident_bytes() -> int:
    """Return what the process holds now."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """Return the most that it has held since its start or `restart_peak`."""
    return _status("VmHWM")


def restart_peak() -> None:
    """Let the peak begin at what the process holds now."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
