"""Rules that the compiler does not check: which crate may use which, licences, file sizes, left-over markers.

Reads `cargo metadata` and the files git knows; needs only the standard library.
"""

import json
import re
import subprocess
import sys

# Crate -> crates of ours it may depend on (ARCHITECTURE.md draws it).
ALLOWED = {
    "lapidary-engine": set(),
    "lapidary-text": set(),
    "lapidary-model": {"lapidary-engine"},
    "lapidary-cpu": {"lapidary-engine", "lapidary-model"},
    "lapidary-cuda": {"lapidary-engine", "lapidary-model"},
    "lapidary-server": {"lapidary-cpu", "lapidary-cuda", "lapidary-engine", "lapidary-model", "lapidary-text"},
    "lapidary-tests": {"lapidary-cpu", "lapidary-engine", "lapidary-model", "lapidary-server", "lapidary-text"},
}
# Crates only these may use.
RESERVED = {
    "cudarc": {"lapidary-cuda"},
    "axum": {"lapidary-server", "lapidary-tests"},
    "tokenizers": {"lapidary-text"},
    "serde": {"lapidary-server", "lapidary-text", "lapidary-model", "lapidary-tests"},
}
LICENCES = {
    "0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0",
    "CC0-1.0", "CDLA-Permissive-2.0", "ISC", "MIT", "MIT-0", "Unicode-3.0", "Unlicense", "Zlib",
}
MAX_FILE_LINES = 800
LEFT_OVER = re.compile(r"\b(?:todo|unimplemented)!\(|\bTODO\b(?!\(#\d+\))|\bFIXME\b|#\[ignore")


def licence_is_allowed(expression: str) -> bool:
    """Whether an SPDX expression (OR, AND, parentheses, the old '/') can be met from LICENCES."""
    tokens = re.findall(r"\(|\)|/|(?:(?!\b(?:OR|AND)\b|[()/]).)+|\bOR\b|\bAND\b", expression)
    python = []
    for token in (token.strip() for token in tokens):
        if token in ("(", ")"):
            python.append(token)
        elif token in ("OR", "/"):
            python.append("or")
        elif token == "AND":
            python.append("and")
        elif token:
            python.append(str(token in LICENCES))
    return bool(eval(" ".join(python), {"__builtins__": {}}))  # only True, False, and, or, parentheses


def main() -> int:
    metadata = json.loads(subprocess.check_output(["cargo", "metadata", "--format-version", "1", "--locked"]))
    packages = {package["id"]: package for package in metadata["packages"]}
    members = set(metadata["workspace_members"])
    faults = []

    for member in members:
        package = packages[member]
        name = package["name"]
        if name not in ALLOWED:
            faults.append(f"{name}: not in ALLOWED of {sys.argv[0]}")
            continue
        for dependency in package["dependencies"]:
            target = dependency["name"]
            if dependency["kind"] == "dev":
                continue
            if target.startswith("lapidary-") and target not in ALLOWED[name]:
                faults.append(f"{name} must not depend on {target}")
            if name not in RESERVED.get(target, {name}):
                faults.append(f"{name} must not depend on {target}: only {sorted(RESERVED[target])} may")

    for package_id, package in packages.items():
        licence = package.get("license")
        if package_id not in members and not (licence and licence_is_allowed(licence)):
            faults.append(f"{package['name']} {package['version']}: licence {licence!r} is not in the list")

    for path in subprocess.check_output(["git", "ls-files", "*.rs", "*.py", "*.mjs"], text=True).splitlines():
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
        if len(lines) > MAX_FILE_LINES:
            faults.append(f"{path}: {len(lines)} lines, the limit is {MAX_FILE_LINES}")
        if path != ".ci/check_workspace.py":
            faults += [f"{path}:{n}: {line.strip()}" for n, line in enumerate(lines, 1) if LEFT_OVER.search(line)]

    print(f"{len(members)} crates of ours, {len(packages) - len(members)} dependencies: {len(faults)} faults")
    for fault in faults:
        print(f"  {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
