"""Prints what ptxas said of every kernel that was compiled: registers, shared memory, spills. Fails where there is none."""

import re
import sys
from pathlib import Path

ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores")
USED = re.compile(r"Used (\d+) registers")


def rows(log: str):
    name = arch = stack = spills = None
    for line in log.splitlines():
        if found := ENTRY.search(line):
            name, arch = found.groups()
        elif found := SPILLS.search(line):
            stack, spills = map(int, found.groups())
        elif (found := USED.search(line)) and name:
            yield name, arch, int(found[1]), stack, spills


def main() -> int:
    logs = sorted(Path(sys.argv[1]).glob("*.log"))
    table = sorted({row for log in logs for row in rows(log.read_text())})
    print(f"{'kernel':40} {'arch':8} {'registers':>9} {'stack':>6} {'spills':>6}")
    for name, arch, registers, stack, spills in table:
        print(f"{name:40} {arch:8} {registers:9} {stack:6} {spills:6}")
    print(f"{len(table)} compiled kernels")
    return 0 if table and not any(row[4] for row in table) else 1


if __name__ == "__main__":
    sys.exit(main())
