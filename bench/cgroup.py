"""A memory control group for one process of a bench script."""

import os
import pathlib


class Cgroup:
    """A memory control group of v1 or v2, made for one run and removed after it."""

    def __init__(self, limit):
        v1, v2 = pathlib.Path("/sys/fs/cgroup/memory"), pathlib.Path("/sys/fs/cgroup")
        if (v1 / "memory.limit_in_bytes").exists():
            self.version, root, limit_file, self.peak_file = "v1", v1, "memory.limit_in_bytes", "memory.max_usage_in_bytes"
        elif "memory" in (v2 / "cgroup.controllers").read_text().split():
            self.version, root, limit_file, self.peak_file = "v2", v2, "memory.max", "memory.peak"
            (root / "cgroup.subtree_control").write_text("+memory")
        else:
            raise OSError("no memory controller")
        self.path = root / f"lighter-bench-{os.getpid()}"
        self.path.mkdir()
        page = os.sysconf("SC_PAGE_SIZE")
        (self.path / limit_file).write_text(str(-(-limit // page) * page))

    def peak(self):
        try:
            return int((self.path / self.peak_file).read_text())
        except OSError:
            return None

    def remove(self):
        self.path.rmdir()


def entering(command, group):
    """The command, run by a shell that first enters the group."""
    return ["sh", "-c", f'echo $$ > "{group.path}/cgroup.procs"; exec "$@"', "sh", *command]
