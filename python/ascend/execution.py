"""A lowered program, run on the CPU.

MLIR's and LLVM's own tools take the program down to machine code: copies stay copies, buffers are
allocations. The grid is a loop over the program ids, which are arguments. Needs `mlir-opt`, `mlir-translate`,
`llc` of LLVM 22 and a C compiler to link.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

VERSION = 22
BUFFERIZE = ("--allow-unregistered-dialect", "--one-shot-bufferize=allow-unknown-ops")
LOWER = (
    "--convert-linalg-to-loops",
    "--expand-strided-metadata",
    "--lower-affine",
    "--convert-scf-to-cf",
    "--convert-arith-to-llvm",
    "--finalize-memref-to-llvm",
    "--convert-cf-to-llvm",
    "--convert-func-to-llvm",
    "--reconcile-unrealized-casts",
)


def tool(name: str) -> str:
    """The path of a tool of LLVM.

    Raises:
        FileNotFoundError: it is not installed.
    """
    for candidate in (f"{name}-{VERSION}", f"/usr/lib/llvm-{VERSION}/bin/{name}"):
        if found := shutil.which(candidate):
            return found
    raise FileNotFoundError(
        f"{name} of LLVM {VERSION}: Debian has it in mlir-{VERSION}-tools and llvm-{VERSION}"
    )


def upstream(mlir: str) -> str:
    """The program as upstream MLIR reads it: without Ascend's attributes, with the types it spells out."""
    mlir = re.sub(r" \{tt\.[^}]*\}", "", mlir)
    mlir = re.sub(r"\) attributes \{[^{}]*\} \{", ") {", mlir)
    mlir = re.sub(r"\} \{hivm\.[^}]*\}", "}", mlir)
    return re.sub(
        r"(bufferization\.to_tensor .*) : memref<([^,>]*)(, [^>]*>)?>",
        lambda m: f"{m[1]} : memref<{m[2]}{m[3] or ''}> to tensor<{m[2]}>",
        mlir,
    )


def build(mlir: str, folder: Path) -> Program:
    """Compiles a lowered program, into a new folder in `folder`."""
    folder = Path(tempfile.mkdtemp(dir=folder))  # the linker knows libraries by their path
    [name] = re.findall(r"func\.func @(\w+)\(", mlir)
    ends = ("mlir", "buffers.mlir", "loops.mlir", "llvm.mlir", "ll", "o", "so")
    source, buffers, loops, dialect, llvm, code, library = (folder / f"{name}.{end}" for end in ends)
    source.write_text(upstream(mlir))
    _run(tool("mlir-opt"), *BUFFERIZE, source, "-o", buffers)
    # Copies between strided views as loops: as they stand, MLIR would call its own library for them.
    copy = re.compile(r"memref\.copy (%\w+), (%\w+) : (.*) to (memref<.*)")
    loops.write_text(copy.sub(r"linalg.copy ins(\1 : \3) outs(\2 : \4)", buffers.read_text()))
    _run(tool("mlir-opt"), "--allow-unregistered-dialect", *LOWER, loops, "-o", dialect)
    _run(tool("mlir-translate"), "--mlir-to-llvmir", dialect, "-o", llvm)
    _run(tool("llc"), "-O1", "-filetype=obj", "-relocation-model=pic", llvm, "-o", code)
    _run("cc", "-shared", code, "-o", library)
    return Program(ctypes.CDLL(str(library))[name])


def _run(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {done.stderr[:2000]}")


class Program:
    """A compiled program with Triton's arguments, called once for each program id."""

    def __init__(self, function: ctypes._CFuncPtr) -> None:
        self.function = function
        function.restype = None

    def __call__(self, grid: int, pointers: list[int], numbers: list[tuple[int, str]]) -> None:
        """Runs the whole grid on tensors' addresses and the other arguments, which are `i32` or `i64`."""

        def memref(address: int) -> list[object]:
            # allocated and aligned pointer, offset, size, stride
            pointer = ctypes.c_void_p(address)
            return [pointer, pointer, ctypes.c_int64(0), ctypes.c_int64(1 << 62), ctypes.c_int64(1)]

        types = {"i32": ctypes.c_int32, "i64": ctypes.c_int64}
        # Two workspaces that Ascend's runtime hands over come first, the grid and the program's place in it
        # last.
        arguments = [*memref(0), *memref(0), *(part for address in pointers for part in memref(address))]
        arguments += [types[kind](number) for number, kind in numbers]
        for place in range(grid):
            self.function(*arguments, *(ctypes.c_int32(n) for n in (grid, 1, 1, place, 0, 0)))
