"""The GPU's arithmetic without a GPU: its source runs on the CPU, and compiles for GPUs."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ctypes.util import find_library
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mpiddl.devices.cuda.kernels import DTYPES, OPS, SOURCE, Call, Kernels, instances, launch
from mpiddl.devices.host import HostDevice

FLOATS = ["float64", "float32", "float16", "bfloat16"]
COUNTS = [1, 2, 3, 4, 5, 8, 9, 16]
LENGTHS = [0, 1, 7, 8, 1000, 4099]
NAN = float("nan")
GUARD, GUARD_BYTES = 42, 8192  # more than the threads of one grid read at once

# Python's argument is C++'s.
LAYOUT = f'static_assert(sizeof(Call) == {ctypes.sizeof(Call)}, "");' + "".join(
    f'static_assert(__builtin_offsetof(Call, {name}) == {getattr(Call, name).offset}, "");'
    for name, _ in Call._fields_
)

# A grid of threads, one after the other.
SHIM = r"""
struct Dim { unsigned int x; };
static Dim gridDim, blockDim, blockIdx, threadIdx;
#define __device__
#define __global__
#define __launch_bounds__(...)
"""
RUN = r"""
extern "C" int bfloat16_of(unsigned int bits) {
    Float wide;
    wide.bits = bits;
    BFloat16 narrowed;
    narrow(wide.value, narrowed);
    return narrowed.bits;
}
extern "C" void run(void (*kernel)(const Call), const Call* call, int blocks, int threads) {
    gridDim.x = blocks;
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++)
        for (threadIdx.x = 0; threadIdx.x < blockDim.x; threadIdx.x++) kernel(*call);
}
"""


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """All kernels, for the CPU."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if not compiler:
        pytest.skip("no C++ compiler")
    probe = [compiler, "-fsyntax-only", "-x", "c++", "-"]
    if subprocess.run(probe, input=b"_Float16 half;", capture_output=True).returncode:
        pytest.skip("this C++ compiler has no _Float16")
    folder = tmp_path_factory.mktemp("kernels")
    kernels = "".join(instances(op, dtype) for op in OPS for dtype in DTYPES)
    (folder / "kernels.cc").write_text(SHIM + SOURCE + LAYOUT + kernels + RUN)
    # Each access is of the type that the kernels say, whatever the memory was made as.
    options = ["-std=c++11", "-O0", "-w", "-fno-strict-aliasing", "-ffp-contract=off"]
    done = subprocess.run(
        [compiler, *options, "-shared", "-fPIC", "kernels.cc", "-o", "kernels.so"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(folder / "kernels.so"))


@pytest.fixture(scope="session")
def combine(library):
    """``Kernels.combine`` of tensors, on the CPU."""

    def combine(op, sources, weights, targets):
        pointers = [[buffer.data_ptr() for buffer in buffers] for buffers in (sources, targets)]
        name, call, grid = launch(
            op, dtype_of(sources[0]), pointers[0], weights, pointers[1], len(sources[0]), 3
        )
        library.run(getattr(library, name), ctypes.byref(call), grid, 32)

    return combine


def dtype_of(buffer: torch.Tensor) -> str:
    return str(buffer.dtype).removeprefix("torch.")


def placed(values: torch.Tensor, offset: int) -> torch.Tensor:
    """The same, ``offset`` elements behind a 16-byte boundary, with guards on both sides."""
    guards = GUARD_BYTES // values.itemsize
    memory = torch.full((len(values) + 2 * guards,), GUARD, dtype=values.dtype)
    start = (memory.data_ptr() + GUARD_BYTES) // 16 * 16 - memory.data_ptr()
    start = start // values.itemsize + offset
    buffer = memory[start : start + len(values)]
    buffer.copy_(values)
    return buffer


def guarded(buffer: torch.Tensor) -> bool:
    start = buffer.storage_offset()
    memory = torch.tensor([], dtype=buffer.dtype).set_(buffer.untyped_storage())
    return all((part == GUARD).all() for part in (memory[:start], memory[start + len(buffer) :]))


def sources_of(dtype: str, op: str, count: int, length: int) -> list[torch.Tensor]:
    """Floats whose sums and products are exact, or any integers: those wrap around."""
    generator = torch.Generator().manual_seed(length * 100 + count)
    kind = getattr(torch, dtype)
    shape = (count, length)
    if kind.is_floating_point:
        values = torch.randint(1, 3 if op == "prod" else 9, shape, generator=generator)
        sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
        return list((values * sign).to(kind))
    limits = torch.iinfo(kind)
    return list(torch.randint(limits.min, limits.max, shape, dtype=kind, generator=generator))


def on_host(op, sources, weights=None):
    target = torch.empty_like(sources[0])
    HostDevice().combine(op, [source.clone() for source in sources], weights, [target])
    return target


def same(buffer: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.equal(buffer, expected) or torch.allclose(
        buffer, expected, rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_there_is_a_kernel_for_any_number_of_sources(op, dtype):
    made = re.findall(r"^(\w+)\(const Call call\)$", instances(op, dtype), flags=re.MULTILINE)
    assert set(made) == names_of(op, dtype)


def test_nan_does_not_carry_over(library):
    for bits in (0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001):  # the first is a GPU's own
        assert library.bfloat16_of(bits) & 0x7FFF > 0x7F80


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_as_on_the_host(combine, op, dtype, count):
    for length in LENGTHS:
        values = sources_of(dtype, op, count, length)
        expected = on_host(op, values)
        for num_targets, offset, spread in [(1, 0, 0), (2, 3, 0), (3, 1, 1)]:
            # Aligned, misaligned alike, and each in its own way.
            sources = [placed(v, offset + spread * n) for n, v in enumerate(values)]
            targets = [placed(torch.zeros_like(expected), offset) for _ in range(num_targets)]
            combine(op, sources, None, targets)
            for target in targets:
                assert same(target, expected), (length, offset)
                assert guarded(target), (length, offset)
            assert all(map(same, sources, values))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_target_may_be_a_source(combine, dtype, count):
    for length in (8, 1000, 4099):
        values = sources_of(dtype, "sum", count, length)
        expected = on_host("sum", values)
        for offset, number in [(0, 0), (1, count - 1), (2, count // 2)]:
            sources = [placed(value, offset) for value in values]
            combine("sum", sources, None, [sources[number]])
            assert torch.equal(sources.pop(number), expected)
            assert all(map(torch.equal, sources, values[:number] + values[number + 1 :]))
        sources = [placed(value, number) for number, value in enumerate(values)]
        combine("sum", sources, None, sources)
        assert all(torch.equal(source, expected) for source in sources)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("weights", [[0.5], [0.25, 2], [1, 0.5, 0.125], [0.5] * 8, [0.25] * 16])
def test_weights_that_are_exact(combine, dtype, weights):
    values = sources_of(dtype, "sum", len(weights), 1000)
    target = torch.empty_like(values[0])
    combine("sum", values, weights, [target])
    assert torch.equal(target, on_host("sum", values, weights))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count", COUNTS)
def test_weights_are_rounded_less_than_elements(combine, dtype, count):
    generator = torch.Generator().manual_seed(count)
    kind = getattr(torch, dtype)
    values = list(torch.randn(count, 1000, generator=generator).to(kind))
    weights = [1 / (3 + number) for number in range(count)]
    target = torch.empty_like(values[0])

    combine("sum", values, weights, [target])

    parts = [value.double() * weight for value, weight in zip(values, weights, strict=True)]
    wide = torch.finfo(torch.float64 if dtype == "float64" else torch.float32).eps
    bound = wide * (count + 1) * sum(part.abs() for part in parts)
    for exact in (sum(parts), on_host("sum", values, weights).double()):
        assert (
            (target.double() - exact).abs() <= bound + torch.finfo(kind).eps * exact.abs()
        ).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("left_out", [[0], [1], [0, 2], [0, 1, 2], list(range(12))])
def test_weight_zero_forgets_even_nan(combine, dtype, left_out):
    values = sources_of(dtype, "sum", 12, 1000)
    weights = [0.5] * 12
    for number in left_out:
        values[number][:] = NAN
        weights[number] = 0.0
    target = torch.full_like(values[0], NAN)
    combine("sum", values, weights, [target])
    assert torch.equal(target, on_host("sum", values, weights))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count", [2, 3, 9])
@pytest.mark.parametrize("op", ["min", "max"])
def test_nan_spreads(combine, dtype, count, op):
    values = sources_of(dtype, op, count, 64)
    for number, value in enumerate(values):
        value[number] = NAN  # in one source, at the edge and elsewhere
        value[32 + number % 2] = NAN  # in some, or in all
        value[40] = float("inf")
        value[41] = -float("inf") if number else 1
    target = torch.empty_like(values[0])
    combine(op, [placed(value, 1) for value in values], None, [target])
    assert same(target, on_host(op, values))
    assert target[:count].isnan().all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("op", ["sum", "prod", "min", "max"])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 9])
def test_narrow_floats_are_rounded_once_to_nearest_even(combine, dtype, op, count):
    generator = torch.Generator().manual_seed(count)
    kind = getattr(torch, dtype)
    values = list((torch.randn(count, 20_000, generator=generator) * 4).to(kind))
    wide = values[0].float()
    for value in values[1:]:
        wide = {"sum": torch.add, "prod": torch.mul, "min": torch.minimum, "max": torch.maximum}[
            op
        ](wide, value.float())
    target = torch.empty_like(values[0])
    combine(op, values, None, [target])
    assert torch.equal(target.view(torch.int16), wide.to(kind).view(torch.int16))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("weight", [1.0, 0.5, 0.375, 1 / 3, 3.0])
def test_every_narrow_float(combine, dtype, weight):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(getattr(torch, dtype))
    target = torch.zeros_like(every)
    combine("sum", [every], [weight], [target])
    expected = (every.float() * weight).to(every.dtype)  # ties, subnormals, overflow, NaN
    assert torch.equal(target.isnan(), every.isnan())
    numbers = ~every.isnan()
    assert torch.equal(target.view(torch.int16)[numbers], expected.view(torch.int16)[numbers])
    if weight == 1:
        assert torch.equal(target.view(torch.int16)[numbers], every.view(torch.int16)[numbers])


def test_float16_overflows_to_infinity(combine):
    large = torch.tensor([65504.0, 65504.0, -65504.0]).half()
    small = torch.tensor([15.0, 16.0, -16.0]).half()
    combine("sum", [large, small], None, [small])
    assert small.tolist() == [65504.0, float("inf"), -float("inf")]


@pytest.mark.parametrize("dtype", FLOATS)
def test_subnormals_stay(combine, dtype):
    least = torch.finfo(getattr(torch, dtype)).smallest_normal
    values = [torch.full((100,), least * part).to(getattr(torch, dtype)) for part in (0.5, 0.25)]
    target = torch.empty_like(values[0])
    for op, part in {"sum": 0.75, "min": 0.25, "max": 0.5}.items():
        combine(op, values, None, [target])
        assert torch.equal(target, torch.full((100,), least * part).to(target.dtype)), op


@pytest.mark.parametrize("dtype", ["float64", "float16", "int8"])
def test_vectors_begin_at_boundaries_and_all_is_covered(dtype):
    itemsize = DTYPES[dtype][1]
    for length in (1, 2, 7, 15, 16, 17, 1000, 4099):
        for start in range(4096, 4128, itemsize):
            _, call, grid = launch("sum", dtype, [start, start + 160], None, [start], length, 8)
            assert not call.vectors or (start + call.head * itemsize) % 16 == 0
            assert 0 <= call.head < 16 // itemsize
            tail = (length - call.head) * itemsize - 16 * call.vectors
            assert 0 <= tail < 16
            assert 1 <= grid <= 8
        _, call, grid = launch("sum", dtype, [4096], None, [4096 + itemsize], length, 8)
        assert (call.head, call.vectors) == ((0, 0) if itemsize < 16 else (0, length))
    assert launch("sum", "float32", [0], None, [0], 4 * 256 * 7 + 4, 8)[2] == 8
    assert launch("sum", "float32", [0], None, [0], 4 * 256 * 7, 8)[2] == 7
    assert launch("sum", "float32", [0], None, [4], 256 * 3, 8)[2] == 3
    assert launch("sum", "float32", [0], None, [0], 2**40, 8)[2] == 8


@pytest.mark.parametrize(
    ("op", "dtype", "sources", "weights", "targets"),
    [
        ("sum", "float32", [0] * 17, None, [0]),
        ("sum", "float32", [0], None, [0] * 17),
        ("sum", "float32", [], None, [0]),
        ("sum", "float32", [0], None, []),
        ("sum", "float32", [2], None, [0]),  # no float32 begins there: the GPU would stop
        ("min", "float32", [0], [0.5], [0]),
        ("sum", "int32", [0], [0.5], [0]),
    ],
)
def test_what_only_a_bug_asks_for(op, dtype, sources, weights, targets):
    with pytest.raises(AssertionError):
        launch(op, dtype, sources, weights, targets, 8, 8)


def test_kernels_hand_cupy_the_right_things(library, monkeypatch):
    compiled, launched = [], []

    def raw_module(code):
        compiled.append(code)

        def get_function(name):
            assert f"\n{name}(const Call call)\n" in code

            def kernel(grid, block, arguments, stream):
                (argument,) = arguments
                assert argument.size == 1  # what CuPy passes by value
                call = Call.from_buffer_copy(argument.tobytes())
                library.run(getattr(library, name), ctypes.byref(call), *grid, *block)
                launched.append((grid, block, stream.ptr))

            return kernel

        return SimpleNamespace(get_function=get_function)

    runtime = SimpleNamespace(
        cudaDevAttrMultiProcessorCount=16,
        getDevice=lambda: 3,
        deviceGetAttribute=lambda attribute, device: {(16, 3): 2}[attribute, device],
    )
    fake = SimpleNamespace(RawModule=raw_module, cuda=SimpleNamespace(runtime=runtime))
    monkeypatch.setitem(sys.modules, "cupy", fake)
    kernels = Kernels()
    one, two, target = torch.ones(10_000), torch.full((10_000,), 2.0), torch.zeros(10_000)

    for length, stream in [(0, 5), (10_000, 5), (100, 6)]:
        pointers = [one.data_ptr(), two.data_ptr()]
        kernels.combine("sum", "float32", pointers, [0.5, 4], [target.data_ptr()], length, stream)

    assert (target == 8.5).all()
    assert len(compiled) == 1
    assert launched == [((8,), (256,), 5), ((1,), (256,), 6)]


def nvcc(code: str, arch: int, folder: Path) -> str:
    source = folder / f"{hash(code)}.cu"
    source.write_text(code)
    command = ["nvcc", "-ptx", "-ftz=true", "-std=c++11", f"-arch=sm_{arch}", "-o", "-", source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def nvrtc(path: str) -> Callable[[str, int, Path], str]:
    """The compiler that CuPy uses."""
    library = ctypes.CDLL(path)

    def compile_ptx(code: str, arch: int, _: Path) -> str:
        program, nbytes = ctypes.c_void_p(), ctypes.c_size_t()
        library.nvrtcCreateProgram(ctypes.byref(program), code.encode(), b"", 0, None, None)
        options = [f"-arch=compute_{arch}", "-ftz=true", "--device-as-default-execution-space"]
        texts = (ctypes.c_char_p * len(options))(*map(str.encode, options))
        failed = library.nvrtcCompileProgram(program, len(options), texts)
        kind = "ProgramLog" if failed else "PTX"
        getattr(library, f"nvrtcGet{kind}Size")(program, ctypes.byref(nbytes))
        text = ctypes.create_string_buffer(nbytes.value)
        getattr(library, f"nvrtcGet{kind}")(program, text)
        assert not failed, text.value.decode()
        return text.value.decode()

    return compile_ptx


@pytest.fixture(scope="session")
def compile_ptx():
    if shutil.which("nvcc"):
        return nvcc
    found = importlib.util.find_spec("nvidia")  # where wheels put it
    for folder in found.submodule_search_locations or () if found else ():
        for path in Path(folder).glob("*/lib/libnvrtc.so.*"):
            return nvrtc(str(path))
    if path := find_library("nvrtc"):
        return nvrtc(path)
    pytest.skip("neither nvcc nor NVRTC")


def names_of(op: str, dtype: str) -> set[str]:
    """All that ``Kernels`` may ask for."""
    names = {launch(op, dtype, [16] * count, None, [16], 8, 8)[0] for count in range(1, 17)}
    if op == "sum" and dtype in FLOATS:
        names.add(launch(op, dtype, [16], [0.0], [16], 8, 8)[0])
    return names


def check_ptx(ptx: str, names: set[str]) -> None:
    assert set(re.findall(r"\.entry (\w+)\(", ptx)) == names
    assert "ld.global.v4.u32" in ptx
    stores = set(re.findall(r"st\.global\.(\S+)", ptx))
    assert "v4.u32" in stores
    assert len(stores) == 2, stores  # 16 bytes, or one element
    assert ".local" not in ptx  # no array that the registers do not hold
    assert ".nc" not in ptx  # a kernel may write its own sources
    # -ftz=true reaches no arithmetic, only the question what is NaN.
    assert set(re.findall(r"([\w.]+)\.ftz", ptx)) <= {"setp.nan"}


def test_kernels_compile(compile_ptx, tmp_path):
    def compiled(dtype):
        ops = OPS if dtype in ("bfloat16", "int64") else ["sum"]  # it takes its time
        code = SOURCE + "".join(instances(op, dtype) for op in ops)
        names = set().union(*(names_of(op, dtype) for op in ops))
        check_ptx(compile_ptx(code, 80, tmp_path), names)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compiled, DTYPES))


@pytest.mark.parametrize("arch", [70, 90])
def test_older_and_newer_gpus(compile_ptx, tmp_path, arch):
    try:
        compile_ptx("", arch, tmp_path)
    except AssertionError:
        pytest.skip(f"this compiler knows no sm_{arch}")
    code = SOURCE + instances("sum", "float16") + instances("min", "bfloat16")
    names = names_of("sum", "float16") | names_of("min", "bfloat16")
    check_ptx(compile_ptx(code, arch, tmp_path), names)
