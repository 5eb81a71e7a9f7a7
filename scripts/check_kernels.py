"""The work of check_kernels.sh: python3 check_kernels.py NVCC FOLDER. Standard library only."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ARCHITECTURES = ["80", "90a"]
# As hywu-kernels/build.rs compiles them.
FLAGS = ["-std=c++17", "-O3", "-lineinfo"]
STRICT = ["-Werror", "all-warnings", "-Xptxas", "-v,-Werror"]

# Columns of the table: tensor cores of Ampere and of Hopper, 16-byte loads and stores, cp.async, TMA.
COUNTED = {
    "HMMA": r"HMMA\b",
    "HGMMA": r"HGMMA\b",
    "LDG.128": r"LDG\..*\b128\b",
    "STG.128": r"STG\..*\b128\b",
    "LDGSTS": r"LDGSTS\b",
    "UTMALDG": r"UTMALDG\b",
}
# What the machine code of some kernels must show, by their names: without it they would be on a slower path.
REQUIRED = [("90a", r"warpgroup_|ladder_[3-9]|attention_ladder_", ["HGMMA", "UTMALDG"])]
FUNCTION = re.compile(r"ptxas info\s*: Function properties for (\S+)")
ENTRY = re.compile(r"ptxas info\s*: Compiling entry function '(\S+)'")
MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
SECTION = re.compile(r"^\.text\.(\S+):")
# "/*00a0*/  @!P0 LDG.E.128 R4, [R2.64] ;": the predicate is optional.
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")


def run(*command):
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True, errors="replace")
    return result.returncode, result.stdout + result.stderr


def usage(text):
    """What ptxas says of each function: name -> registers, shared, stack, stores, loads; and which ones are kernels."""
    functions, entries, name = {}, set(), None
    for line in text.splitlines():
        if found := ENTRY.search(line):
            entries.add(found[1])
        elif found := FUNCTION.search(line):
            name = found[1]
            functions[name] = dict(registers=0, shared=0)
        elif name and (found := MEMORY.search(line)):
            functions[name].update(zip(("stack", "stores", "loads"), map(int, found.groups())))
        elif name and (found := REGISTERS.search(line)):
            functions[name]["registers"] = int(found[1])
            functions[name]["shared"] = int(shared[1]) if (shared := SHARED.search(line)) else 0
    return functions, entries


def opcodes(text):
    """function -> its opcodes, from nvdisasm's listing."""
    functions, current = {}, []
    for line in text.splitlines():
        if found := SECTION.match(line):
            current = functions.setdefault(found[1], [])
        elif found := INSTRUCTION.search(line):
            current.append(found[1])
    return functions


def plain_name(name):
    """rms_norm<float, 4> for a mangled name, where binutils are there."""
    if not name.startswith("_Z") or not shutil.which("c++filt"):
        return name
    text = run("c++filt", "-p", name)[1].strip()
    return text.removeprefix("void ")


def check(nvcc, root, source, arch, work):
    """One source for one architecture: rows of the table, and what is wrong with it."""
    op = source.stem
    cubin = work / f"{op}.{arch}.cubin"
    code, text = run(
        nvcc, "-cubin", *FLAGS, *STRICT, f"-gencode=arch=compute_{arch},code=sm_{arch}",
        "-I", root, "-I", root / "common", "-o", cubin, source,
    )  # fmt: skip
    if code != 0:
        return [], [f"{op} sm_{arch}: does not compile without warnings\n{text}"]
    # Some come through -Werror as mere words: the preprocessor's, and what ptxas says of wgmma (as "info").
    problems = [
        f"{op} sm_{arch}: {line.strip()}"
        for line in text.splitlines()
        if re.search(r"\bwarning\b|Potential Performance Loss", line)
    ]
    code, listing = run(nvcc.with_name("nvdisasm"), "-c", cubin)
    if code != 0:
        return [], problems + [f"{op} sm_{arch}: nvdisasm failed\n{listing}"]

    functions, entries = usage(text)
    code_of = opcodes(listing)
    if not entries:
        problems.append(f"{op} sm_{arch}: holds no kernel")
    rows = []
    for name, used in sorted(functions.items()):
        label = f"{op} sm_{arch} {plain_name(name)}"
        # A function that is called and not inlined has no section of its own: its code is in its caller's.
        code = code_of.get(name, [])
        if "stack" not in used or (name in entries and not code):
            problems.append(f"{label}: the compiler's listing is not as expected, this script needs a change\n{text}")
            continue
        if used["stores"] or used["loads"]:
            problems.append(f"{label}: spills {used['stores']} bytes of stores, {used['loads']} of loads")
        if used["stack"]:
            problems.append(f"{label}: {used['stack']} bytes of local memory")
        if local := sum(re.match(r"(LDL|STL)\b", opcode) is not None for opcode in code):
            problems.append(f"{label}: {local} loads or stores of local memory (LDL, STL)")
        if name in entries:
            counts = [sum(re.match(p, opcode) is not None for opcode in code) for p in COUNTED.values()]
            for where, names, needed in REQUIRED:
                for column in needed if where == arch and re.match(names, name) else []:
                    if counts[list(COUNTED).index(column)] == 0:
                        problems.append(f"{label}: no {column}")
            rows.append([op, plain_name(name), f"sm_{arch}", used["registers"], used["shared"], *counts])
    return rows, problems


def show(rows):
    head = ["op", "kernel", "arch", "registers", "shared", *COUNTED]
    rows = [[str(cell) for cell in row] for row in [head, *rows]]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = [cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        print("  ".join(cells).rstrip())


def main(nvcc, root):
    nvcc = Path(os.path.realpath(nvcc))  # nvcc looks for its parts beside its own path, not a link's target.
    root = Path(os.path.realpath(root))
    for tool in (nvcc, nvcc.with_name("nvdisasm")):
        if not os.access(tool, os.X_OK) or not tool.is_file():
            sys.exit(f"check_kernels: {tool} is not there")
    # As hywu-kernels/build.rs finds them.
    sources = sorted(source for source in root.glob("*/*.cu") if source.stem == source.parent.name)
    if not sources:
        sys.exit(f"check_kernels: no kernel in {root} (looked for OP/OP.cu)")

    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        jobs = [
            pool.submit(check, nvcc, root, source, arch, Path(work)) for source in sources for arch in ARCHITECTURES
        ]
        results = [job.result() for job in jobs]
    show(row for rows, _ in results for row in rows)
    problems = [problem for _, problems in results for problem in problems]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        sys.exit(f"check_kernels: {len(problems)} problems")


if __name__ == "__main__":
    main(*sys.argv[1:])
