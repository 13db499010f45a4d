"""Arithmetic on GPU memory: one kernel, for every op, dtype and number of buffers."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy

__all__ = ["DTYPES", "MOST_SOURCES", "OPS", "SOURCE", "Call", "Kernels", "instances", "launch"]

MOST_SOURCES = 16  # and targets
UNROLLED = 8  # for up to so many sources there is a kernel that has no loop over them
THREADS = 256
BLOCKS_PER_SM = 4  # enough reads under way for the memory's bandwidth, and room for backward
ACCESS_BYTES = 16  # the most that one instruction moves

OPS = {"sum": "Sum", "prod": "Prod", "min": "Min", "max": "Max"}
DTYPES = {  # the type in C++, and its bytes
    "float64": ("double", 8),
    "float32": ("float", 4),
    "float16": ("Float16", 2),
    "bfloat16": ("BFloat16", 2),
    "int64": ("long long", 8),
    "int32": ("int", 4),
    "int16": ("short", 2),
    "int8": ("signed char", 1),
    "uint8": ("unsigned char", 1),
}

SOURCE = r"""
#define DEVICE __device__ inline
#define EACH(i, number) _Pragma("unroll") for (int i = 0; i < number; i++)
typedef long long Index;

struct Call {
    const void* sources[16];
    void* targets[16];
    double weights[16];  // for narrower floats than float64 these are 16 floats
    Index length;        // elements of every source and target
    Index head;          // elements before the first 16-byte boundary
    Index vectors;       // 16-byte accesses from there
    int num_sources, num_targets;
};

struct Float16 { unsigned short bits; };
struct BFloat16 { unsigned short bits; };
struct alignas(16) Words { unsigned int a, b, c, d; };

#ifdef __CUDA_ARCH__
// CuPy compiles with -ftz=true, which would flush the subnormals of float32, and with them those
// of bfloat16: instructions that are spelt out keep them. Nor may the compiler choose what it
// fuses: a sum has the same bits in every kernel.
DEVICE float product(float a, float b) {
    float r; asm("mul.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b)); return r;
}
DEVICE float fused(float a, float b, float c) {
    float r; asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(r) : "f"(a), "f"(b), "f"(c)); return r;
}
DEVICE bool less(float a, float b) {
    int r; asm("{ .reg .pred p; setp.lt.f32 p, %1, %2; selp.s32 %0, 1, 0, p; }"
               : "=r"(r) : "f"(a), "f"(b)); return r;
}
DEVICE double fused(double a, double b, double c) { return __fma_rn(a, b, c); }
DEVICE float widened(Float16 x) {
    float r; asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x.bits)); return r;
}
DEVICE void narrow(float x, Float16& to) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
}
// Left to the compiler, 16 bytes are taken apart again before they are written.
DEVICE void read(const Words* from, Words& x) {
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.a), "=r"(x.b), "=r"(x.c), "=r"(x.d) : "l"(from));
}
DEVICE void write(const Words& x, Words* to) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
                 :: "l"(to), "r"(x.a), "r"(x.b), "r"(x.c), "r"(x.d) : "memory");
}
#else  // the same for a CPU, where tests run it
DEVICE float product(float a, float b) { return a * b; }
DEVICE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
DEVICE double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }
union Half { unsigned short bits; _Float16 value; };
DEVICE float widened(Float16 x) { Half half; half.bits = x.bits; return half.value; }
DEVICE void narrow(float x, Float16& to) { Half half; half.value = x; to.bits = half.bits; }
#endif
template <typename T> DEVICE void read(const T* from, T& x) { x = *from; }
template <typename T> DEVICE void write(const T& x, T* to) { *to = x; }

// An element as what it is computed in, and back.
template <typename T> DEVICE int widened(T x) { return x; }
DEVICE long long widened(long long x) { return x; }
DEVICE double widened(double x) { return x; }
DEVICE float widened(float x) { return x; }
template <typename T, typename W> DEVICE void narrow(W x, T& to) { to = (T) x; }
union Float { float value; unsigned int bits; };  // bfloat16 is the upper half of one
DEVICE float widened(BFloat16 x) { Float wide; wide.bits = x.bits * 65536u; return wide.value; }
DEVICE void narrow(float x, BFloat16& to) {
    Float wide; wide.value = x;
    // To the nearest, ties to even. A NaN could carry over to zero.
    to.bits = x != x ? 0x7fc0 : (wide.bits + 0x7fff + (wide.bits >> 16 & 1)) >> 16;
}

// Integers have no weights. They wrap around, which C++ defines for unsigned ones alone.
typedef unsigned long long Wrapping;
template <typename W> DEVICE W product(W a, W b) { return (W) ((Wrapping) a * (Wrapping) b); }
DEVICE double product(double a, double b) { return a * b; }
template <typename W> DEVICE W fused(W x, W, W t) { return (W) ((Wrapping) x + (Wrapping) t); }
template <typename W> DEVICE bool less(W a, W b) { return a < b; }
template <typename W> DEVICE W weighted(W x, W) { return x; }
DEVICE float weighted(float x, float weight) { return product(x, weight); }
DEVICE double weighted(double x, double weight) { return product(x, weight); }

// The total t with one more, x. Where floats have no weights w is 1, which changes no bit.
#define OP(name, result) \
    struct name { template <typename W> DEVICE static W of(W t, W x, W w) { return result; } };
OP(Sum, fused(x, w, t))
OP(Prod, product(t, x))
OP(Min, less(t, x) || t != t ? t : x)  // NaN spreads: no comparison with it is true
OP(Max, less(x, t) || t != t ? t : x)

// What a thread reads or writes at once: 16 bytes, or one element.
template <typename T, int LANES> union Unit { typedef Words Access; Words access; T lanes[LANES]; };
template <typename T> union Unit<T, 1> { typedef T Access; T access; T lanes[1]; };

// Take COUNT sources into the totals of UNITS units, which are `step` elements apart.
template <typename Op, int COUNT, typename T, typename W, int LANES, int UNITS>
DEVICE void take(const Call& call, int first, Index start, Index step, W (&totals)[UNITS][LANES]) {
    typedef typename Unit<T, LANES>::Access Access;
    Unit<T, LANES> units[COUNT][UNITS];
    EACH(s, COUNT) EACH(u, UNITS) {  // all reads are under way before the first is waited for
        const T* from = (const T*) call.sources[first + s] + start + u * step;
        read((const Access*) from, units[s][u].access);
    }
    EACH(s, COUNT) EACH(u, UNITS) EACH(lane, LANES) {
        W x = widened(units[s][u].lanes[lane]), weight = ((const W*) call.weights)[first + s];
        W& total = totals[u][lane];
        total = first + s ? Op::of(total, x, weight) : weighted(x, weight);
    }
}

// A target may be a source: of these units, all is read before anything is written.
template <typename Op, typename T, int COUNT, int LANES, int UNITS>
DEVICE void combine_units(const Call& call, Index start, Index step) {
    typedef typename Unit<T, LANES>::Access Access;
    decltype(widened(T())) totals[UNITS][LANES] = {};  // zeros, where there is no source
    int s = 0;
    if (COUNT) take<Op, COUNT ? COUNT : 1, T>(call, 0, start, step, totals);
    else {
        for (; s + 4 <= call.num_sources; s += 4) take<Op, 4, T>(call, s, start, step, totals);
        for (; s < call.num_sources; s++) take<Op, 1, T>(call, s, start, step, totals);
    }
    Unit<T, LANES> units[UNITS];
    EACH(u, UNITS) EACH(lane, LANES) narrow(totals[u][lane], units[u].lanes[lane]);
    _Pragma("unroll 1") for (int t = 0; t < call.num_targets; t++) EACH(u, UNITS)
        write(units[u].access, (Access*) ((T*) call.targets[t] + start + u * step));
}

// The elements from `start` to `stop`, LANES at once, by all threads of the grid.
template <typename Op, typename T, int COUNT, int LANES>
DEVICE void combine_range(const Call& call, Index start, Index stop) {
    // Of few sources several units at a time, so that as many reads are under way.
    const int UNITS = COUNT == 0 || COUNT > 4 ? 1 : COUNT > 2 ? 2 : 4;
    const Index step = (Index) gridDim.x * blockDim.x * LANES;
    Index at = start + ((Index) blockIdx.x * blockDim.x + threadIdx.x) * LANES;
    if (UNITS > 1)
        for (; at + (UNITS - 1) * step < stop; at += UNITS * step)
            combine_units<Op, T, COUNT, LANES, UNITS>(call, at, step);
    for (; at < stop; at += step) combine_units<Op, T, COUNT, LANES, 1>(call, at, step);
}

// COUNT is the number of sources; 0 stands for any.
template <typename Op, typename T, int COUNT> DEVICE void combine(const Call& call) {
    const int LANES = 16 / sizeof(T);
    const Index end = call.head + call.vectors * LANES;
    combine_range<Op, T, COUNT, LANES>(call, call.head, end);
    _Pragma("unroll 1") for (int edge = 0; edge < 2; edge++)
        combine_range<Op, T, COUNT, 1>(call, edge ? end : 0, edge ? call.length : call.head);
}
"""


class Call(ctypes.Structure):
    """The kernels' only argument: ``Call`` of ``SOURCE``."""

    _fields_ = (
        ("sources", ctypes.c_void_p * MOST_SOURCES),
        ("targets", ctypes.c_void_p * MOST_SOURCES),
        ("weights", ctypes.c_double * MOST_SOURCES),
        ("length", ctypes.c_longlong),
        ("head", ctypes.c_longlong),
        ("vectors", ctypes.c_longlong),
        ("num_sources", ctypes.c_int),
        ("num_targets", ctypes.c_int),
    )


def launch(
    op: str,
    dtype: str,
    sources: Sequence[int],
    weights: Sequence[float] | None,
    targets: Sequence[int],
    length: int,
    most_blocks: int,
) -> tuple[str, Call, int]:
    """The kernel's name, its argument and the number of blocks for ``Kernels.combine``."""
    assert all(0 < len(buffers) <= MOST_SOURCES for buffers in (sources, targets))
    assert weights is None or (op == "sum" and "float" in dtype)
    weights = [1.0] * len(sources) if weights is None else weights
    pairs = [(source, weight) for source, weight in zip(sources, weights, strict=True) if weight]
    call = Call(length=length, num_sources=len(pairs), num_targets=len(targets))
    kept = [source for source, _ in pairs]
    call.sources[: len(kept)], call.targets[: len(targets)] = kept, targets
    kind = ctypes.c_double if dtype == "float64" else ctypes.c_float
    (kind * MOST_SOURCES).from_buffer(call.weights)[: len(pairs)] = [weight for _, weight in pairs]

    itemsize = DTYPES[dtype][1]
    call.head, call.vectors = _split([*kept, *targets], itemsize, length)
    units = max(call.vectors, length - call.vectors * ACCESS_BYTES // itemsize)
    return _name(op, dtype, len(pairs)), call, min(most_blocks, -(-units // THREADS))


def _split(pointers: Sequence[int], itemsize: int, length: int) -> tuple[int, int]:
    """Elements before the first 16-byte boundary, and 16-byte accesses from there; (0, 0) unless
    all buffers have their boundaries at the same elements."""
    offsets = {pointer % ACCESS_BYTES for pointer in pointers}
    assert not any(offset % itemsize for offset in offsets)
    if len(offsets) > 1:
        return 0, 0
    head = min(length, -offsets.pop() % ACCESS_BYTES // itemsize)
    return head, (length - head) * itemsize // ACCESS_BYTES


def _name(op: str, dtype: str, num_sources: int) -> str:
    count = num_sources if 0 < num_sources <= UNROLLED else "any"
    return f"combine_{op}_{dtype}_{count}"


def instances(op: str, dtype: str) -> str:
    """C++ that makes the kernels of one op and dtype, to be put behind ``SOURCE``."""
    # Told how many blocks there will be, the compiler spends registers on reads under way; else it
    # saves them, and a thread waits for one read before it asks for the next.
    return "".join(
        f'extern "C" __global__ void __launch_bounds__({THREADS}, {BLOCKS_PER_SM})\n'
        f"{_name(op, dtype, count)}(const Call call)\n"
        f"{{ combine<{OPS[op]}, {DTYPES[dtype][0]}, {count}>(call); }}\n"
        for count in range(UNROLLED + 1)
    )


class Kernels:
    """The kernels, compiled when first asked for; CuPy keeps them on disk for the next process."""

    def __init__(self) -> None:
        import cupy

        self._cupy: Any = cupy
        self._kernels: dict[str, Any] = {}

    def combine(
        self,
        op: str,
        dtype: str,
        sources: Sequence[int],
        weights: Sequence[float] | None,
        targets: Sequence[int],
        length: int,
        stream: int,
    ) -> None:
        """Every target becomes ``op(w0 * source0, w1 * source1, ...)``, in that order.

        Does not wait for it. A target may be one of the sources, but not overlap one otherwise. It
        is fastest where all addresses have the same remainder modulo 16.

        Args:
            op: sum, prod, min or max. Integers wrap around, NaN spreads.
            dtype: As torch and numpy call it. 16-bit floats are computed in float32, rounded once.
            sources: Addresses that the current device can read.
            weights: For sums of floats. Of weight 0 a source is left out, whatever is there.
            targets: Addresses that the current device can write.
            length: Elements of each of them.
            stream: CUDA's own handle, of the current device.
        """
        if not length:
            return
        cuda = self._cupy.cuda.runtime
        sms = cuda.deviceGetAttribute(cuda.cudaDevAttrMultiProcessorCount, cuda.getDevice())
        most_blocks = sms * BLOCKS_PER_SM
        name, call, grid = launch(op, dtype, sources, weights, targets, length, most_blocks)
        if name not in self._kernels:
            module = self._cupy.RawModule(code=SOURCE + instances(op, dtype))
            self._kernels[name] = module.get_function(name)
        # CuPy passes an array of one item by value, and asks a stream for nothing but its ``ptr``:
        # its ExternalStream is deprecated since 14, and what replaces that is not there before.
        argument = numpy.frombuffer(memoryview(call), dtype=f"V{ctypes.sizeof(call)}")
        self._kernels[name]((grid,), (THREADS,), (argument,), stream=SimpleNamespace(ptr=stream))
