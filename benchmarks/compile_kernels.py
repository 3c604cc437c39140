"""Compile every shipped kernel configuration for GPUs that need not be here; a table of registers and shared memory.

    python benchmarks/compile_kernels.py [--targets sm_80 sm_90 sm_100 sm_120 gfx942] [--csv FILE]

Bare: V = 128256 without options. Every option: an odd V and several targets a row as well. Each is compiled as a launch
compiles it: one target a row is a constant, sizes and strides that are multiples of 16 are known to be, but for a
number of rows.

Exit status 1 if a configuration does not compile, spills more than is known of this Triton, asks for more shared memory
than the target has, lacks an instruction that it is there for, or feeds a wgmma from registers.
"""

import argparse
import csv
import itertools
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from var_kernels.kernels import forward_triton, labels_triton, pairs_triton, rows_triton, weights_triton
from var_kernels.kernels.pairs import KINDS

KIB = 1024
TARGETS = {
    # Of sm_86 and sm_89, which run the same code; sm_80 has 163 KiB.
    "sm_80": (GPUTarget("cuda", 80, 32), 99 * KIB),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * KIB),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * KIB),
    "sm_120": (GPUTarget("cuda", 120, 32), 99 * KIB),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * KIB),
}
# Bytes a thread on the stack, none on a hot path: (Triton, target, configuration). What is not listed keeps none.
_SMALL_TILE = "fused_forward bf16, 64x128x16 (small), every option"
KNOWN_SPILLS = {
    ("3.8", "sm_80", _SMALL_TILE): 64,
    ("3.8", "sm_100", _SMALL_TILE): 16,
    ("3.8", "sm_90", "var_weights batch of 32, packed tokens"): 8,
    ("3.9", "sm_80", _SMALL_TILE): 64,
    ("3.6", "sm_120", "fused_forward bf16, 64x128x16 (small), bare"): 16,
    ("3.7", "sm_120", "fused_forward bf16, 64x128x16 (small), bare"): 8,
}
TRITON = ".".join(triton.__version__.split(".")[:2])
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Configuration:
    name: str
    kernel: triton.JITFunction
    types: dict[str, str]  # of the arguments that are no constexpr
    constants: dict[str, object]
    num_warps: int
    num_stages: int = 3
    multiples_of_16: tuple[str, ...] = ()  # integers that are, beside the addresses
    targets: tuple[str, ...] = tuple(TARGETS)
    instructions: dict[str, tuple[str, ...]] = field(default_factory=dict)  # of a target, that must be there

    def __post_init__(self):
        missing = set(self.kernel.arg_names) - set(self.types) - set(self.constants)
        assert not missing, f"{self.name}: no type for {sorted(missing)}"
        assert not set(rows_triton.ROW_COUNTS) & set(self.multiples_of_16), f"{self.name}: of any number of rows"

    def compile(self, target: GPUTarget):
        signature = {arg: self.types.get(arg, "constexpr") for arg in self.kernel.arg_names}
        constants = {(self.kernel.arg_names.index(arg),): value for arg, value in self.constants.items()}
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, arg in enumerate(self.kernel.arg_names)
            if signature[arg].startswith("*") or arg in self.multiples_of_16
        }
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=aligned)
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, **rows_triton.LAUNCH_OPTIONS}
        return triton.compile(source, target=target, options=options)


def configurations() -> list[Configuration]:
    heads = [*row_configurations(), *pair_configurations(), *label_configurations(), *forward_configurations()]
    return [*heads, *weight_configurations()]


# A thread's loads and stores of a row, odd vocabularies' too.
MOVES_16_BYTES = ("ld.global.v4", "st.global.v4")
# Triton compiles an integer that is a multiple of 16 as one, and 1 as a constant. Rows of a tile begin at multiples of
# 64 bytes, slices at multiples of 64 columns.
ALIGNED_ROWS = ("row_stride", "out_stride", "v_start")
CASES = {
    # name: (every option, multiples of 16, constants)
    "bare": (False, (*ALIGNED_ROWS, "C"), {"K": 1}),
    "bare, odd V": (False, ALIGNED_ROWS, {"K": 1}),
    "every option": (True, ALIGNED_ROWS, {}),  # an odd V, several targets a row
}


# Arguments that are None where a call has no use for them; the kernels are compiled without.
OPTIONAL = (
    *("bias_ptr", "ref_bias_ptr", "cap", "inner", "ref_cap", "ref_inner", "cap_slope", "shifted_ptr", "logit_sum_ptr"),
    *("argmax_ptr", "top_ptr", "logp_slope_ptr", "constant_ptr", "earlier_ptr", "left_ptr", "right_ptr"),
)


def row_configurations() -> list[Configuration]:
    """The row kernels: each storage dtype, bare, bare at a V that is a multiple of nothing, and with every option."""
    found = []
    integers = dict.fromkeys(("row_stride", "out_stride", "C", "K", "v_start"), "i32")
    scalars = dict.fromkeys(("scale", "cap", "inner", "cap_slope"), "fp32")
    for storage, (case, (everything, aligned, known)) in itertools.product(("fp32", "bf16", "fp16"), CASES.items()):
        suffix = f"{storage}, {case}"
        vectors = dict.fromkeys(("max_ptr", "sumexp_ptr", "label_logit_ptr", "shifted_ptr", "logit_sum_ptr"), "*fp32")
        known = known | ({} if everything else dict.fromkeys(OPTIONAL)) | {"PADDED": case != "bare"}
        common = {"bias_ptr": f"*{storage}", "labels_ptr": "*i64", **integers, **scalars}
        kernel = rows_triton._row_stats_kernel
        types = {"logits_ptr": f"*{storage}", "argmax_ptr": "*i64", **vectors, **common}
        constants = {"BLOCK": rows_triton.BLOCK_COLUMNS, **known}
        name = f"row_stats {suffix}"
        found.append(_configuration(name, kernel, types, constants, aligned, instructions=MOVES_16_BYTES[:1]))

        kernel = rows_triton._row_grad_kernel
        vectors = dict.fromkeys(
            ("max_ptr", "log_sum_ptr", "prob_ptr", "logp_slope_ptr", "constant_ptr", "label_ptr"), "*fp32"
        )
        for out in ("bf16", "fp16", "fp32") if storage == "fp32" else (storage,):
            types = {"logits_ptr": f"*{storage}", **vectors, **common, "bias_ptr": f"*{out}"}
            constants = {"BLOCK": rows_triton.BLOCK_COLUMNS, "OUT": getattr(tl, _LONG[out]), **known}
            name = f"row_grad {suffix}, to {out}"
            found.append(_configuration(name, kernel, types, constants, aligned, instructions=MOVES_16_BYTES))

        kernel = rows_triton._row_exp_kernel
        vectors = dict.fromkeys(("pivot_ptr", "others_ptr", "logit_sum_ptr", "top_ptr"), "*fp32")
        for out in {"fp32": ("bf16", "fp32"), "bf16": ("bf16",), "fp16": ()}[storage]:
            types = {"logits_ptr": f"*{storage}", "argmax_ptr": "*i64", **vectors, **common, "bias_ptr": f"*{out}"}
            types |= {"out_ptr": f"*{out}", "earlier_ptr": f"*{out}", "largest_sum": "fp32"}
            types |= {"earlier_stride": "i32", "earlier_columns": "i32"}
            block = rows_triton.EXP_BLOCK_COLUMNS // (2 if everything else 1)
            constants = {"BLOCK": block, **known}
            before = ("earlier_stride", "earlier_columns")
            name, aligned_too = f"row_exp {suffix}, to {out}", (*aligned, *before)
            needed = () if everything else MOVES_16_BYTES  # half a block: 8 bytes of bf16
            found.append(_configuration(name, kernel, types, constants, aligned_too, instructions=needed))
    return found


def pair_configurations() -> list[Configuration]:
    """The kernels over two models' logits: every divergence bare, at an odd V, and with every option."""
    found = []
    scalars = ("scale", "cap", "inner", "ref_scale", "ref_cap", "ref_inner", "cap_slope", "beta")
    strides = ("z_stride", "w_stride", "out_stride", "state_stride")
    for (case, (everything, _, _)), kind in itertools.product(CASES.items(), range(len(KINDS))):
        out = "fp32" if everything else "bf16"
        types = dict.fromkeys(("z_ptr", "w_ptr", "state_ptr", "upstream_ptr"), "*fp32")
        types |= dict.fromkeys(("out_ptr", "bias_ptr", "ref_bias_ptr"), f"*{out}")
        types |= dict.fromkeys((*strides, "C"), "i32") | dict.fromkeys(scalars, "fp32")
        constants = {"BLOCK": pairs_triton.BLOCK_COLUMNS, "KIND": kind, "OUT": getattr(tl, _LONG[out])}
        constants |= ({} if everything else dict.fromkeys(OPTIONAL)) | {"IN_PLACE": case != "bare"}
        aligned = (*strides[:3], "C") if case == "bare" else strides[:3]
        for name in ("stats", "grad", *(("mixture",) if KINDS[kind] == "jsd" else ())):
            kernel = getattr(pairs_triton, f"_pair_{name}_kernel")
            known = constants | {"BLOCK": constants["BLOCK"] // (2 if name == "mixture" else 1)}
            found.append(_configuration(f"pair_{name} {KINDS[kind]}, {case}", kernel, types, known, aligned))
    return found


def label_configurations() -> list[Configuration]:
    """The label kernels: bf16 operands of a D that is a multiple of 16, bare; fp32 ones of any D with every option."""
    found = []
    strides = [
        f"{t}_stride_{axis}"
        for t in ("hidden", "weight", "out", "sums", "matrix", "total", "vectors")
        for axis in "nvd"
    ]
    strides += ["left_stride_n", "left_stride_r", "right_stride_v", "right_stride_r"]
    sizes = ("V", "D", "R", "C", "size")
    for everything, operand in ((False, "bf16"), (True, "fp32")):
        operands = ("hidden_ptr", "weight_ptr", "bias_ptr", "matrix_ptr", "vectors_ptr", "values_ptr", "out_ptr")
        types = dict.fromkeys(operands, f"*{operand}") | dict.fromkeys((*sizes, *strides, "n"), "i32")
        types |= dict.fromkeys(("labels_ptr", "sorted_ptr", "order_ptr", "argmax_ptr"), "*i64")
        types |= dict.fromkeys(("scale", "cap", "inner", "slope", "cap_slope"), "fp32")
        constants: dict = {"BLOCK_R": 16} | ({} if everything else dict.fromkeys(OPTIONAL))
        constants |= dict.fromkeys([name for name in strides if name[-1] in "dr"], 1)
        for name, block, num_warps in (
            ("start_rows", labels_triton.BLOCK_DEPTH, labels_triton.NUM_WARPS),
            ("finish_rows", labels_triton.BLOCK_ROWS, labels_triton.NUM_WARPS),
            ("row_scales", labels_triton.BLOCK_ROWS, labels_triton.NUM_WARPS),
            ("combine_rows", labels_triton.BLOCK_DEPTH, labels_triton.NUM_WARPS),
            ("label_rows", labels_triton.LABEL_DEPTH, labels_triton.NUM_WARPS),
            ("scale", labels_triton.SCALE_ELEMENTS, labels_triton.SCALE_WARPS),
        ):
            kernel = getattr(labels_triton, f"_{name}_kernel")
            given = dict.fromkeys(kernel.arg_names, "*fp32") | types
            if name == "label_rows":
                given["total_ptr"] = f"*{operand}"
            known = constants | {"BLOCK": block, "ROWS": labels_triton.LABEL_ROWS}
            title = f"labels: {name} {operand}, {'every option' if everything else 'bare'}"
            aligned = () if everything else (*sizes, *strides)
            found.append(_configuration(title, kernel, given, known, aligned, num_warps))
    return found


_LONG = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def _configuration(
    name, kernel, types, constants, aligned, num_warps=rows_triton.NUM_WARPS, instructions=()
) -> Configuration:
    constants = {arg: value for arg, value in constants.items() if arg in kernel.arg_names}
    types = {arg: kind for arg, kind in types.items() if arg in kernel.arg_names and arg not in constants}
    needed = {target: instructions for target in TARGETS if target.startswith("sm_")}
    return Configuration(name, kernel, types, constants, num_warps, multiples_of_16=aligned, instructions=needed)


FORWARD_TARGETS = {
    "descriptors": ("sm_90", "sm_100"),
    "descriptors, small": ("sm_90", "sm_100"),
    "pointers": ("sm_80", "sm_90", "sm_100", "sm_120"),
    "rocm": ("gfx942",),
    "small": tuple(TARGETS),
}
MATRIX_INSTRUCTIONS = {
    **dict.fromkeys(("sm_80", "sm_120"), ("mma.sync",)),
    "sm_90": ("wgmma.mma_async",),
    "sm_100": ("tcgen05.mma",),
}


def forward_configurations() -> list[Configuration]:
    """The fused forward: each tile where it is chosen, bare and with every option; the small one for rows that are
    multiples of nothing.
    """
    found = []
    integers = ("N", "V", "D", "K", "S", "hidden_stride_n", "weight_stride_v", "split_columns")
    statistics = ("label_logit_ptr", "max_ptr", "sumexp_ptr", "shifted_ptr", "logit_sum_ptr")
    for (name, tile), everything in itertools.product(forward_triton.TILES.items(), (False, True)):
        aligned = name != "small"
        constants = {
            "ROWS": tile.rows,
            "COLUMNS": tile.columns,
            "DEPTH": tile.depth,
            "PART": tile.part,
            "GROUP": forward_triton.GROUP_BLOCKS,
            "DESCRIPTORS": tile.descriptors,
            "EVEN_D": not everything,
            "hidden_stride_d": 1,
            "weight_stride_d": 1,
            **({} if everything else {"K": 1, **dict.fromkeys(OPTIONAL)}),
        }
        for operand in ("bf16", "fp32") if name == "small" else ("bf16", "fp16") if everything else ("bf16",):
            hidden, weight = f"*{operand}", f"*{operand}"
            if tile.descriptors:
                hidden, weight = (f"tensordesc<{operand}[{n}, {tile.depth}]>" for n in (tile.rows, tile.columns))
            types = {
                "hidden": hidden,
                "weight": weight,
                "bias_ptr": f"*{operand}",
                "labels_ptr": "*i64",
                "argmax_ptr": "*i32",
                **dict.fromkeys(statistics, "*fp32"),
                **dict.fromkeys(integers, "i32"),
                **dict.fromkeys(("scale", "cap", "inner"), "fp32"),
            }
            kernel = forward_triton._fused_forward_kernel
            constants = {arg: value for arg, value in constants.items() if arg in kernel.arg_names}
            types = {arg: kind for arg, kind in types.items() if arg not in constants}
            shape = f"{tile.rows}x{tile.columns}x{tile.depth}"
            instructions = {} if operand == "fp32" else dict(MATRIX_INSTRUCTIONS)
            if tile.descriptors:
                instructions = {target: (*found, "cp.async.bulk.tensor") for target, found in instructions.items()}
            found.append(
                Configuration(
                    f"fused_forward {operand}, {shape} ({name}), {'every option' if everything else 'bare'}",
                    kernel,
                    types,
                    constants,
                    tile.num_warps,
                    tile.num_stages,
                    _aligned_arguments(aligned, odd=everything),
                    FORWARD_TARGETS[name],
                    instructions,
                )
            )
    kernel = forward_triton._merge_splits_kernel
    vectors = {arg: "*fp32" for arg in kernel.arg_names if arg.endswith("_ptr")}
    types = {**vectors, "split_argmax_ptr": "*i32", "argmax_ptr": "*i64", **dict.fromkeys(("N", "S", "V"), "i32")}
    for splits in (8, forward_triton.MAX_SPLITS):
        constants = {"ROWS": forward_triton.MERGE_ELEMENTS // splits, "SPLITS": splits}
        name = f"merge_splits {splits}, every option"
        found.append(Configuration(name, kernel, types, constants, 4, multiples_of_16=("V",)))
    return found


def _aligned_arguments(rows: bool, odd: bool) -> tuple[str, ...]:
    """Of the fused forward. rows: contiguous, of a length that is a multiple of 16; odd: V is a multiple of nothing."""
    found = ("split_columns",) if odd else ("split_columns", "V")
    return (*found, "D", "hidden_stride_n", "weight_stride_v") if rows else found


def weight_configurations() -> list[Configuration]:
    """VAR's weights: from the tokens of a small batch, and from the sums of the largest."""
    few, largest = weights_triton.TOKEN_SEQUENCES, weights_triton.MAX_SEQUENCES
    kernel = weights_triton._batch_weights_kernel
    inputs = {
        **dict.fromkeys(("rewards_ptr", "ref_ptr", "weight_ptr", "log_z_ptr", "ess_ptr", "token_weight_ptr"), "*fp32"),
        **dict.fromkeys(("lengths_ptr", "labels_ptr"), "*i64"),
        **dict.fromkeys(("B", "T", "ignore_index"), "i32"),
        "cu_seqlens_ptr": "*i32",
        "inverse_lam_bits": "i64",
    }
    from_tokens = {"TOKEN_REF": True, "lengths_ptr": None, "ROWS": few, "TIME": weights_triton.TOKEN_TILE // few}
    from_sums = {"TOKEN_REF": False, **dict.fromkeys(("labels_ptr", "cu_seqlens_ptr", "token_weight_ptr"))}
    from_sums |= {"ROWS": largest, "TIME": 1}
    every = {"MEAN": True, "REFERENCE": "mean"}
    return [
        _configuration(name, kernel, inputs, form | every, (), num_warps)
        for name, form, num_warps in (
            (f"var_weights batch of {few}, packed tokens", from_tokens, weights_triton.NUM_WARPS),
            (f"var_weights batch of {largest}", from_sums, weights_triton.LARGE_BATCH_WARPS),
        )
    ]


def resources(compiled, target: GPUTarget) -> tuple[int, int]:
    """(registers a thread, bytes of spill or stack)."""
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        numbers = {
            key: int(re.search(rf"\.{key}:\s+(\d+)", text)[1])
            for key in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
        }
        return numbers["vgpr_count"], 4 * (numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [NVIDIA_TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", text).groups()
    return int(registers), int(stack) + int(local)


def spills_too_much(version: str, target: str, name: str, spill: int) -> bool:
    return spill > KNOWN_SPILLS.get((version, target, name), 0)


def register_operands(compiled) -> int:
    """wgmma instructions whose left operand is a list of registers, no descriptor of shared memory (%rd...): the
    assembler that Triton bundles is known to get some of them wrong.
    """
    ptx = compiled.asm.get("ptx", "")
    return len(re.findall(r"wgmma\.mma_async[^{;]*\{[^}]*\},\s*\{", ptx))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--csv", type=Path, help="write the table here, as benchmarks/results/computed/kernels.csv")
    args = parser.parse_args()
    lines, failures = [], []
    for configuration in configurations():
        cells = []
        for name in args.targets:
            if name not in configuration.targets:
                cells.append("")
                continue
            target, limit = TARGETS[name]
            try:
                compiled = configuration.compile(target)
                registers, spill = resources(compiled, target)
            except Exception as error:
                failures.append(f"{configuration.name} on {name}: {type(error).__name__}: {error}")
                cells.append("failed")
                continue
            shared = compiled.metadata.shared
            if spills_too_much(TRITON, name, configuration.name, spill) or shared > limit:
                failures.append(f"{configuration.name} on {name}: spill {spill} B, shared {shared} of {limit} B")
            if from_registers := register_operands(compiled):
                failures.append(f"{configuration.name} on {name}: {from_registers} wgmma with an operand in registers")
            missing = [i for i in configuration.instructions.get(name, ()) if i not in compiled.asm["ptx"]]
            if missing:
                failures.append(f"{configuration.name} on {name}: no {', '.join(missing)}")
            cells.append(f"{registers} / {shared}" + (f" / spills {spill}" if spill else ""))
        lines.append([configuration.name, *cells])
        print(" | ".join(lines[-1]), flush=True)
    if args.csv and not failures:
        with args.csv.open("w", newline="") as out:
            print(f"# registers a thread / bytes of shared memory a program, Triton {triton.__version__}", file=out)
            csv.writer(out).writerows([["kernel", *args.targets], *lines])
    for failure in failures:
        print("FAILED", failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
