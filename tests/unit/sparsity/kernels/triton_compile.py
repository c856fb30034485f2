"""Compile Triton kernels for GPUs that are not here, and compare what the compiler made of them
with ``compiled.json``: registers and bytes of local memory a thread, and the static instructions of
the whole program, what comes before the first group included, over the groups that a thread of a
big layer holds at once, or times the threads of a group.

Every helper that a kernel calls is watched as well (``LookAlikes``).

python -m tests.unit.sparsity.kernels.triton_compile            2:4, for sm_90
python -m tests.unit.sparsity.kernels.triton_compile --all      1:4, 2:4, 4:8 and 8:16, for sm_80,
                                                                sm_90 and sm_100
python -m tests.unit.sparsity.kernels.triton_compile --write    the same, and write compiled.json
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.code_generator import CodeGenerator

from megamask.learn.maskpro import score_triton
from megamask.learn.maskpro.score import MAX_SET
from megamask.sparsity.categorical.categorical import CATEGORICAL
from megamask.sparsity.draw import Site
from megamask.sparsity.kernels import triton_host
from megamask.sparsity.kernels.triton_tiles import Kernels
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.shard import Placement
from megamask.sparsity.subset.subset import SUBSET

CPU = torch.device("cpu")
RECORD = Path(__file__).with_name("compiled.json")
POINTERS = {
    **{"masked": "*i64", "weight": "*i64", "grad": "*i64", "codes": "*i64"},
    **{"sums": "*fp32", "coefficients": "*fp32"},
}
HARD_CODES = {torch.uint8: "*u8", torch.int16: "*i16", torch.int32: "*i32"}
WHOLE = Placement.whole(1, 1)
FEW = [Site(Pattern(2, 4), WHOLE, one) for one in (CATEGORICAL, SUBSET)]
ALL = [
    *FEW,
    Site(Pattern(1, 4), WHOLE, CATEGORICAL),
    Site(Pattern(4, 8), WHOLE, CATEGORICAL),
    Site(Pattern(4, 8), WHOLE, SUBSET),
]
WIDE = [Site(Pattern(8, 16), WHOLE, SUBSET)]
CAPABILITIES = (80, 90, 100)
GROWTH = 1.1  # of registers or instructions that is a failure
# Bytes of local memory a thread, by M: kernels of four weights keep everything in registers.
MOST_SPILLED = {4: 0, 8: 16, 16: 16}
# Registers a thread, by M, for kernels and versions of Triton without a record: a third more than
# the most that Triton 3.7.1 gives (96 and 120). With 128, four programs fit a multiprocessor.
MOST_REGISTERS = {4: 128, 8: 160, 16: 248}
# The score of a set of 4 of 8 keeps four numbers of each of its 16 subsets.
MOST_REGISTERS_OF_A_SET = 248


@dataclass(frozen=True)
class Variant:
    """One kernel as it is launched in a big layer with bf16 weights.

    Attributes:
        site: distribution and pattern.
        kernel: forward, backward or mask_statistics.
        logits: fp32, or bf16.
        flag: HARD, STATISTICS and ADD together.
        noise: NOISE.
        capability: 90 for sm_90.
    """

    site: Site
    kernel: str
    logits: str
    flag: bool
    noise: bool
    capability: int

    @property
    def name(self) -> str:
        """As in ``compiled.json``."""
        what = f"{self.site.distribution.name} {self.site.pattern} {self.kernel}"
        how = f"{self.logits}{' flags' if self.flag else ''}{'' if self.noise else ' quiet'}"
        return f"{what} {how} sm_{self.capability}"

    def measure(self) -> dict[str, float]:
        """Compile; the figures of the module's docstring by name. A kernel that draws has
        logarithms, and no other kernel has any.
        """
        options = triton_host.OPTIONS
        target = GPUTarget("cuda", self.capability, 32)
        compiled = triton.compile(self.source(), target=target, options=options)
        draws = self.noise and self.kernel != "mask_statistics"
        assert ("lg2." in compiled.asm["ptx"]) == draws, f"{self.name}: logarithms"
        registers, spilled, instructions = resources(compiled.asm["cubin"])
        per_group = round(instructions / self.cut.rows / self.cut.cols * triton_host.THREADS)
        return {"registers": registers, "spilled": spilled, "instructions": per_group}

    @property
    def kernels(self) -> Kernels:
        """The kernels of this distribution and pattern."""
        assert self.site.distribution.triton is not None
        module = import_module(self.site.distribution.triton)
        return cast(Kernels, module.kernels_of(self.site.pattern, CPU))

    @property
    def cut(self) -> triton_host.Cut:
        """The tiles of a big layer."""
        return triton_host.Cut.of(1 << 20, 1024, *self.kernels.sharing)

    def chosen(self) -> tuple[Any, dict[str, Any]]:
        """The kernel, and its constants but those of the tiles."""
        kernels = self.kernels
        constants = {
            **kernels.constants,
            "BITS": 16,
            "GRAD_BITS": 16,
            **dict.fromkeys(("HARD", "STATISTICS", "ADD"), self.flag),
            "NOISE": self.noise,
        }
        return getattr(kernels, self.kernel), constants

    @property
    def most_registers(self) -> int:
        """Registers that it may take where there is no record."""
        return MOST_REGISTERS[self.site.pattern.m]

    def source(self) -> ASTSource:
        """The kernel as triton_host launches it: pointers are aligned, and 16 divides G."""
        kernel, given = self.chosen()
        constants = {**given, **self.cut.constants}
        pointers = {
            **POINTERS,
            "hard_codes": HARD_CODES[self.site.code_dtype],
            "logits": f"*{self.logits}",
            "dlogits": f"*{self.logits}",
        }
        signature, aligned = {}, {}
        for position, parameter in enumerate(kernel.params):
            if parameter.is_constexpr:
                signature[parameter.name] = "constexpr"
            else:
                signature[parameter.name] = (
                    pointers.get(parameter.name) or parameter.annotation_type or "fp32"
                )
            if parameter.name in (*pointers, "groups"):
                aligned[(position,)] = [["tt.divisibility", 16]]
        used = {key: value for key, value in constants.items() if signature.get(key) == "constexpr"}
        return ASTSource(kernel, signature, used, aligned)


class ScoreVariant(Variant):
    """MaskPro's update: ``kernel`` is ordered or set."""

    @property
    def name(self) -> str:
        """As in ``compiled.json``."""
        return f"maskpro {self.site.pattern} {self.kernel} sm_{self.capability}"

    @property
    def cut(self) -> triton_host.Cut:
        """The tiles of a big layer."""
        return triton_host.Cut.of(1 << 20, 1024)

    def chosen(self) -> tuple[Any, dict[str, Any]]:
        """The kernel, and its constants but those of the tiles."""
        pattern = self.site.pattern
        constants = {"N": pattern.n, "M": pattern.m, "IS_SET": self.kernel == "set"}
        return score_triton.add_scores_kernel, constants

    @property
    def most_registers(self) -> int:
        """Registers that it may take where there is no record."""
        is_large = self.kernel == "set" and self.site.pattern.n == 4
        return MOST_REGISTERS_OF_A_SET if is_large else super().most_registers


@dataclass
class LookAlikes:
    """Calls of a helper that Triton 3.6 cannot tell apart.

    That version names the code of a helper by the types of its arguments in a row, without the
    borders of tuples: a call with tuples of one and two gets the code made for two and one, and
    computes something else. On an H100, every soft mask of ``subset`` was wrong. Triton 3.7 keeps
    the borders, so this looks at the calls and not at the results.

    Attributes:
        found: what is wrong with which helper.
    """

    found: list[str] = field(default_factory=list)
    _seen: dict[Any, Any] = field(default_factory=dict)

    def see(self, helper: Any, arguments: dict[str, Any]) -> None:
        """Compare a call with the calls before it."""
        types: list[str] = []
        constants: list[Any] = []
        shape = [
            self._walk(one, (i,), types, constants) for i, one in enumerate(arguments.values())
        ]
        key = (helper, tuple(types), tuple(constants))
        if self._seen.setdefault(key, shape) != shape:
            self.found.append(f"{helper.fn.__name__}: tuples of {self._seen[key]} and of {shape}")

    def _walk(
        self, value: Any, path: tuple[int, ...], types: list[str], constants: list[Any]
    ) -> Any:
        if isinstance(value, (tuple, tl.tuple)):
            return [self._walk(one, (*path, i), types, constants) for i, one in enumerate(value)]
        if isinstance(value, tl.tensor):
            types.append(str(value.type))
            return 1
        constants.append((path, repr(value)))
        return 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch what is compiled inside the block."""
        plain = CodeGenerator.call_JitFunction

        def call(generator: Any, fn: Any, args: Any, kwargs: Any, *more: Any, **named: Any) -> Any:
            self.see(fn, inspect.getcallargs(fn.fn, *args, **kwargs))
            return plain(generator, fn, args, kwargs, *more, **named)

        with patch.object(CodeGenerator, "call_JitFunction", call):
            yield


def resources(cubin: bytes) -> tuple[int, int, int]:
    """(registers a thread, bytes of local memory a thread, instructions of the program)."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dump(what: str) -> str:
            command = [str(tool), what, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, code = dump("-res-usage"), dump("-sass")
    found = re.search(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", usage)
    assert found, usage
    lines = re.findall(r"/\*[0-9a-f]{4}\*/\s+(.*)", code)
    instructions = sum(not line.startswith("NOP") for line in lines)
    return int(found[1]), int(found[2]) + int(found[3]), instructions


def variants(
    sites: list[Site], capabilities: tuple[int, ...], quiet: bool = True
) -> Iterator[Variant]:
    """All kernels of ``sites``, plain with fp32 logits, with every flag with bf16 logits and, with
    ``quiet``, those that draw without noise with fp32 logits; and the update of MaskPro, which
    learns ``subset``, with the score that ``auto`` takes and, with ``quiet``, the other.
    """
    for capability in capabilities:
        for site in sites:
            if site.distribution is SUBSET:
                kinds = ("set", "ordered") if quiet else ("set",)
                for kind in kinds if site.pattern.n <= MAX_SET else ("ordered",):
                    yield ScoreVariant(site, kind, "fp32", False, True, capability)
            for kernel in ("forward", "backward", "mask_statistics"):
                for logits, flag in (("fp32", False), ("bf16", True)):
                    yield Variant(site, kernel, logits, flag, True, capability)
                if quiet and kernel != "mask_statistics":
                    yield Variant(site, kernel, "fp32", False, False, capability)


def grown(
    m: int, found: dict[str, float], known: dict[str, float] | None, most_registers: int
) -> list[str]:
    """What is larger than it may be.

    Args:
        m: weights of a group.
        found: what the compiler made of the kernel.
        most_registers: of a kernel without a record.
        known: what ``compiled.json`` says; None for a new variant or another version of Triton,
            whose compiler may choose otherwise.
    """
    wrong = [f"{found['spilled']} bytes spilled"] if found["spilled"] > MOST_SPILLED[m] else []
    if known is None and found["registers"] > most_registers:
        wrong.append(f"{found['registers']} registers, at most {most_registers}")
    for what, before in (known or {}).items():
        if found[what] > GROWTH * before:
            wrong.append(f"{found[what]} {what}, {before} before")
    return wrong


def main(arguments: list[str]) -> int:
    """1 when a kernel has grown by a tenth, spills, takes many registers without a record, or calls
    a helper in two ways that look alike.
    """
    everything = bool({"--all", "--write"} & set(arguments))
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    comparable = record.get("triton") == triton.__version__
    known, wrong, found = record.get("kernels", {}) if comparable else {}, [], {}
    every = chain(variants(ALL, CAPABILITIES), variants(WIDE, CAPABILITIES))
    chosen = every if everything else variants(FEW, (90,), quiet=False)
    look_alikes = LookAlikes()
    for variant in chosen:
        with look_alikes.watching():
            found[variant.name] = variant.measure()
        print(f"{variant.name}: {found[variant.name]}", flush=True)
        before, m = known.get(variant.name), variant.site.pattern.m
        larger = grown(m, found[variant.name], before, variant.most_registers)
        wrong += [f"{variant.name}: {one}" for one in larger]
    if "--write" in arguments:
        lines = [f'  "{name}": {json.dumps(one)}' for name, one in found.items()]
        body = ",\n".join(lines)
        RECORD.write_text(
            f'{{\n "triton": "{triton.__version__}",\n "kernels": {{\n{body}\n }}\n}}\n'
        )
        return 0
    if not comparable:
        print(f"not comparable: recorded with {record.get('triton')}, this is {triton.__version__}")
    wrong += dict.fromkeys(look_alikes.found)
    compared = len(found.keys() & known.keys())
    print(
        "\n".join(wrong)
        or f"{compared} kernels are as they were, {len(found) - compared} within the bounds"
    )
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
