"""What the Triton kernels become on a GPU, told without one: compiled for sm_80 and sm_90, read off PTX and cubin.

`python -m danceopd_kernels.resources` writes kernels/RESOURCES.md; with --check it compares instead.
"""

import argparse
import re
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

OPERATIONS = ("routed_velocity_mse", "output_head", "lora", "steps", "fp8", "adaln")
CAPABILITIES = (80, 90)
# Bytes of stack that a kernel may take, from each version of Triton on: the older ones spill one to four registers of
# kernels that 3.9 fits.
STACK = (((3, 9), 0), ((0, 0), 16))
EXECUTABLE, NOP = 4, 0x918  # ELF's flag of a section with code, and the first 12 bits of an instruction


@dataclass(frozen=True)
class Configuration:
    """One kernel as its launcher compiles it. types: of each parameter, as "*bf16", "i32" or "fp32"; constants: the
    constexpr ones; registers: at most so many a thread; streaming: 128-bit loads and stores are expected; product:
    tensor-core instructions are."""

    name: str
    kernel: object
    types: dict[str, str]
    constants: dict[str, object]
    num_warps: int
    registers: int
    num_stages: int = 3
    streaming: bool = False
    product: bool = False
    odd: frozenset[str] = field(default_factory=frozenset)  # integers that need not be multiples of 16


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on one GPU: the instructions of its machine code, registers a thread, bytes of stack and
    shared memory, loads and stores in PTX."""

    name: str
    capability: int
    instructions: int
    registers: int
    stack: int
    shared: int
    wide_loads: int
    loads: int
    wide_stores: int
    stores: int
    tensor_core: str


def configurations() -> list[Configuration]:
    """Every configuration of every operation, from the operations' own files."""
    return [c for name in OPERATIONS for c in import_module(f"danceopd_kernels.{name}").configurations()]


def compile_for(configuration: Configuration, capability: int) -> Resources:
    """Compile a kernel for sm_<capability>. Needs Triton, no GPU; not under TRITON_INTERPRET=1."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = [parameter.name for parameter in configuration.kernel.params]
    signature = {n: "constexpr" if n in configuration.constants else configuration.types[n] for n in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if signature[n].startswith("*") or (signature[n].startswith("i") and n not in configuration.odd)
    }
    source = ASTSource(configuration.kernel, signature, configuration.constants, aligned)
    options = {"num_warps": configuration.num_warps, "num_stages": configuration.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    instructions, registers, stack = _usage(compiled.asm["cubin"])
    count = lambda pattern: len(re.findall(pattern, ptx))  # noqa: E731
    wide = r"\.global[\w.:]*\.v(?:4\.[bf]32|2\.b64)"  # 16 bytes; or asynchronous copies of 16 bytes
    return Resources(
        configuration.name,
        capability,
        instructions,
        registers,
        stack,
        compiled.metadata.shared,
        count("ld" + wide) + count(r"cp\.async\.cg[^;]*0x10"),
        count(r"ld\.global") + count(r"cp\.async\.c[ag]"),
        count("st" + wide),
        count(r"st\.global"),
        "wgmma" if "wgmma.mma" in ptx else "mma" if "mma.sync" in ptx else "",
    )


def _usage(cubin: bytes) -> tuple[int, int, int]:
    """Instructions; registers and bytes of stack a thread, spills among them: by a tool in Triton's wheel."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return _instructions(cubin), int(registers), int(stack)


def _instructions(cubin: bytes) -> int:
    """Instructions of an ELF file's code but for NOP, which it is filled up with.

    Since Volta each takes 16 bytes and begins with 12 bits that say which it is; nvdisasm takes half a second to start.
    """
    (start,) = struct.unpack_from("<Q", cubin, 0x28)
    size, number = struct.unpack_from("<HH", cubin, 0x3A)
    found = 0
    for section in range(start, start + size * number, size):
        flags, _, offset, length = struct.unpack_from("<4Q", cubin, section + 8)
        if flags & EXECUTABLE:
            words = struct.iter_unpack("<H14x", cubin[offset : offset + length])
            found += sum(word & 0xFFF != NOP for (word,) in words)
    return found


def allowed_stack(version: str) -> int:
    """Bytes of stack that a kernel may take by this version of Triton."""
    major, minor = map(int, version.split(".")[:2])
    return next(most for since, most in STACK if (major, minor) >= since)


def problems(configuration: Configuration, resources: Resources, stack: int = 0) -> list[str]:
    """What a kernel's resources fall short of, with so many bytes of stack allowed; empty if nothing."""
    found = []
    if resources.stack > stack:
        found.append(f"{resources.stack} bytes of stack")
    if resources.registers > configuration.registers:
        found.append(f"{resources.registers} registers, {configuration.registers} allowed")
    if configuration.streaming and not (resources.wide_loads and resources.wide_stores):
        found.append("no 128-bit loads or stores")
    expected = "wgmma" if resources.capability >= 90 else "mma"
    if configuration.product and resources.tensor_core != expected:
        found.append(f"no {expected}")
    return [f"{resources.name} on sm_{resources.capability}: {problem}" for problem in found]


def triton_version() -> str:
    import triton

    return triton.__version__


def table(rows: list[Resources]) -> str:
    """RESOURCES.md."""
    columns = ("Kernel", "GPU", "Instructions", "Registers", "Stack", "Shared memory", "128-bit loads")
    lines = [
        "# Resources",
        "",
        "Every configuration of every Triton kernel, compiled ahead of time; nothing here was run. Made by",
        f"`python -m danceopd_kernels.resources` with Triton {triton_version()}. Instructions are of the machine",
        "code, each once, however often it runs; registers are of a thread; stack and shared memory are in bytes",
        "(stack 0: nothing spilled); loads and stores are instructions in PTX, and how many of them move 128 bits.",
        "",
        "| " + " | ".join((*columns, "128-bit stores", "Tensor core")) + " |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for r in rows:
        lines.append(
            f"| {r.name} | sm_{r.capability} | {r.instructions} | {r.registers} | {r.stack} | {r.shared} "
            f"| {r.wide_loads} of {r.loads} | {r.wide_stores} of {r.stores} | {r.tensor_core or '–'} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(__file__).parents[1] / "RESOURCES.md"
    parser.add_argument("--output", type=Path, default=default)
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    parser.add_argument("--only", default="", help="kernels whose name contains this; prints, writes nothing")
    args = parser.parse_args(argv)
    chosen = [c for c in configurations() if args.only in c.name]
    rows = [(c, compile_for(c, capability)) for c in chosen for capability in CAPABILITIES]
    found = [problem for c, r in rows for problem in problems(c, r, allowed_stack(triton_version()))]
    text = table([r for _, r in rows])
    if args.only:
        print(text)
    elif args.check:
        written, same = args.output.read_text(encoding="utf-8"), f"with Triton {triton_version()}."
        if written != text and same in written:  # another version may take other registers
            found.append(f"{args.output} is not what the kernels compile to now; run {__spec__.name} again")
    else:
        args.output.write_text(text, encoding="utf-8")
    print("\n".join(found), file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
