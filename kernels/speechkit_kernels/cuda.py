"""`stream_attn` on NVIDIA GPUs: csrc/cuda/stream_attn.cu, compiled by NVRTC when first used and launched from here.

A variant of the kernel is a set of preprocessor constants. NVRTC, which every CUDA build of torch brings, makes a cubin
of it in about a second, kept on disk under the hash of source, variant, architecture and NVRTC's version. A launch
reads nothing from the device and allocates the output only, so it can be captured in a CUDA graph once `prepare` (or an
earlier call) has loaded its variant.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import math
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speechkit_kernels import plain

SOURCES = Path(__file__).parent / "csrc" / "cuda"
CHECKED: dict[str, Any] = dict.fromkeys(("keep", "q_pos", "rel"))  # options that check_attention takes, in its order
CHECKED |= {"rel_zero": 0, "cache_bias": None, "key_bias": None, "chunk": 0, "left": 0}
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
WIDEST = 128
RESERVED = 1024  # bytes of shared memory that a block costs beside what it asks for


@dataclass(frozen=True)
class Variant:
    """The constants stream_attn.cu is compiled with; said there."""

    TYPE: int
    WIDTH: int
    ROW_WARPS: int
    KEY_WARPS: int
    KEYS: int
    TABLE: int
    Q_POS: int
    VEC: int
    STAGES: int = 2

    @property
    def rows(self) -> int:
        return 16 * self.ROW_WARPS

    @property
    def threads(self) -> int:
        return 32 * self.ROW_WARPS * self.KEY_WARPS

    def defines(self) -> list[str]:
        return [f"-D{name}={value}" for name, value in asdict(self).items()]

    def keys_each(self, left: int, frames: int) -> int:
        """Keys of one part, whole stages of them."""
        return math.ceil((left + frames) / (self.KEY_WARPS * self.KEYS)) * self.KEYS

    def shared_bytes(self, left: int, frames: int) -> int:
        padded = math.ceil(self.WIDTH / 16) * 16
        pitch = (padded * (2 if self.TYPE else 4) // 16 | 1) * 16
        step, warps = self.KEY_WARPS * self.KEYS, self.ROW_WARPS * self.KEY_WARPS
        table_rows = self.KEY_WARPS * (self.KEYS + self.rows) if self.TABLE == 2 else 0
        sums = 16 * warps * 4 * (padded + 8)
        stage = max((2 * step + table_rows) * pitch + 4 * step, sums)
        query = (1 + self.Q_POS) * self.rows * pitch
        slab = (math.ceil((left + frames) / 16) * 16 + self.rows) * pitch if self.TABLE == 1 else 0
        return self.STAGES * (stage + query) + 8 * padded + 128 * warps + slab


@functools.cache
def choose(
    dtype: torch.dtype, width: int, frames: int, left: int, rel: bool, q_pos: bool, vec: int, limit: int
) -> Variant | None:
    """The variant of a call, or None where not even the smallest fits ``limit`` bytes of shared memory.

    First the fewest passes over the keys, then the most warps on a processor (8 keep its memory busy), then a table
    that stays, then long stages. None of it changes with the load: a stream gives the same bits whoever else is there.
    """
    sizes = [
        Variant(TYPES[dtype], width, row_warps, key_warps, keys, table, int(q_pos and rel), vec)
        for row_warps in (1, 2, 4)
        for key_warps in (1, 2, 4)
        for table in ((1, 2) if rel else (0,))
        for keys in (64, 32, 16)
        if row_warps * key_warps <= 4 and keys * key_warps <= 64
    ]

    def merit(variant: Variant) -> tuple[int, int, int, int]:
        blocks = (limit + RESERVED) // (variant.shared_bytes(left, frames) + RESERVED)
        passes = math.ceil(frames / variant.rows)
        warps = min(8, blocks * variant.KEY_WARPS * min(variant.ROW_WARPS, math.ceil(frames / 16)))
        return -passes, warps, -variant.TABLE, variant.KEYS * variant.KEY_WARPS

    return max((v for v in sizes if v.shared_bytes(left, frames) <= limit), key=merit, default=None)


# ---- arguments, laid out as struct Args of stream_attn.cu ------------------------------------------------------------


def _struct(name: str, **fields: Any) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


_P, _L, _I = ctypes.c_void_p, ctypes.c_longlong, ctypes.c_int
Rows = _struct("Rows", at=_P, batch=_L, head=_L, frame=_I)
Ring = _struct("Ring", at=_P, slot=_L, part=_L, head=_L, frame=_I)
Table = _struct("Table", at=_P, head=_L, row=_L, rows=_I, zero=_I)
Reals = _struct("Reals", at=_P, head=_L, column=_L, narrow=_L)
Counts = _struct("Counts", at=_P, wide=_L)
Args = _struct(
    "Args",
    **dict.fromkeys(("q", "k", "v", "q_pos", "out", "key_bias"), Rows),
    **dict.fromkeys(("ring", "ring_bias"), Ring),
    rel=Table,
    **dict.fromkeys(("bias_u", "bias_v", "slopes"), Reals),
    **dict.fromkeys(("slots", "pos", "qlen", "keep"), Counts),
    **dict.fromkeys(("streams", "frames", "group", "W", "chunk", "left", "range"), _I),
    scale=ctypes.c_float,
)


@dataclass(frozen=True)
class Call:
    """One call made ready: ``grid`` blocks at most (the first number may be lowered), and what it must keep alive."""

    variant: Variant
    args: ctypes.Structure
    grid: tuple[int, int, int]
    shared_bytes: int
    held: list[Tensor]


def describe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: Tensor,
    slots: Tensor,
    pos: Tensor,
    qlen: Tensor,
    *,
    out: Tensor,
    limit: int,
    keep: Tensor | None = None,
    q_pos: Tensor | None = None,
    bias_u: Tensor | None = None,
    bias_v: Tensor | None = None,
    rel: Tensor | None = None,
    rel_zero: int = 0,
    cache_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    slopes: Tensor | None = None,
    chunk: int = 0,
    left: int,
    scale: float,
) -> Call | str:
    """Variant and arguments for a GPU with ``limit`` bytes of shared memory a block, from shapes and strides alone; or
    why the kernel leaves such a call to plain PyTorch."""
    B, C, H, D = q.shape
    if q.dtype not in TYPES:
        return f"the kernel computes in {', '.join(map(str, TYPES))}, but q is {q.dtype}"
    if D > WIDEST:
        return f"the kernel serves heads up to {WIDEST} wide, but q's are {D}"
    if cache.stride(4) != 1:
        return f"the kernel needs the last dimension of cache to be contiguous, but its stride is {cache.stride(4)}"
    if rel is None:
        q_pos = bias_v = None
    inner = {"q": q, "k": k, "v": v, "q_pos": q_pos, "rel": rel}  # what is read by rows
    inner = {n: x if x is None or x.stride(-1) == 1 else x.contiguous() for n, x in inner.items()}
    vec = _common_piece([*inner.values(), cache, out])
    variant = choose(q.dtype, D, C, left, rel is not None, q_pos is not None, vec, limit)
    if variant is None:
        return f"a block of the kernel has {limit} bytes of shared memory, too few for {q.dtype} and heads {D} wide"
    rel = inner.pop("rel")
    outer = {"bias_u": bias_u, "bias_v": bias_v, "slopes": slopes}
    outer = {n: x if x is None or x.dtype in (q.dtype, torch.float32) else x.float() for n, x in outer.items()}
    counts = {"slots": slots, "pos": pos, "qlen": qlen, "keep": keep}
    counts = {n: None if x is None else x.contiguous() for n, x in counts.items()}
    key_bias = None if key_bias is None else key_bias.float()
    args = Args(
        **{n: _rows(x) for n, x in (inner | {"out": out, "key_bias": key_bias}).items()},
        ring=Ring(*_place(cache, 0, 1, 2, 3)),
        ring_bias=Ring() if cache_bias is None else Ring(*_place(cache_bias, 0, 0, 1, 2)),
        rel=Table() if rel is None else Table(*_place(rel, 0, 1), rel.shape[1], rel_zero),
        **{n: _reals(x) for n, x in outer.items()},
        **{n: Counts() if x is None else Counts(x.data_ptr(), x.dtype == torch.int64) for n, x in counts.items()},
        streams=B,
        frames=C,
        group=H // k.shape[2],
        W=cache.shape[3],
        chunk=chunk,
        left=left,
        range=variant.keys_each(left, C),
        scale=scale * math.log2(math.e),
    )
    held = [x for x in (*inner.values(), rel, *outer.values(), *counts.values(), key_bias) if x is not None]
    return Call(variant, args, (B, H, math.ceil(C / variant.rows)), variant.shared_bytes(left, C), held)


def _rows(x: Tensor | None) -> ctypes.Structure:
    return Rows() if x is None else Rows(*_place(x, 0, 2, 1))


def _reals(x: Tensor | None) -> ctypes.Structure:
    if x is None:
        return Reals()
    return Reals(*_place(x, *((0, 1) if x.dim() == 2 else (0, 0))), x.dtype != torch.float32)


def _place(x: Tensor, *dims: int) -> list[int]:
    size, strides = x.element_size(), x.stride()
    return [x.data_ptr(), *[strides[dim] * size for dim in dims]]


def _common_piece(tensors: list[Tensor | None]) -> int:
    """The most bytes, 16 at most, that divide every row, address and stride."""
    places = [number for x in tensors if x is not None for number in _place(x, *range(x.dim() - 1))]
    return math.gcd(16, *places, *(x.shape[-1] * x.element_size() for x in tensors if x is not None))


# ---- compilation --------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "speechkit" / "kernels"


def compile_variant(variant: Variant, arch: int) -> bytes:
    """The cubin of a variant for ``sm_<arch>``, from disk where it was made before. Needs NVRTC, but no GPU.

    Raises:
        RuntimeError: what NVRTC says, or that it was not found.
    """
    nvrtc = _bindings("nvrtc")
    header, source = (SOURCES / "prim.h").read_bytes(), (SOURCES / "stream_attn.cu").read_bytes()
    options = [f"--gpu-architecture=sm_{arch}", "-std=c++17", *variant.defines()]
    version = _checked(nvrtc, nvrtc.nvrtcVersion())
    key = hashlib.sha256(repr((header, source, options, version)).encode()).hexdigest()[:32]
    path = cache_folder() / f"stream_attn-{key}.cubin"
    if path.exists():
        return path.read_bytes()
    program = _checked(nvrtc, nvrtc.nvrtcCreateProgram(source, b"stream_attn.cu", 1, [header], [b"prim.h"]))[0]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = bytes(_checked(nvrtc, nvrtc.nvrtcGetProgramLogSize(program))[0])
        _checked(nvrtc, nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(
            f"stream_attn: NVRTC must compile the kernel for sm_{arch}, but says: {log.decode().strip(chr(0)).strip()}"
        )
    cubin = bytes(_checked(nvrtc, nvrtc.nvrtcGetCUBINSize(program))[0])
    _checked(nvrtc, nvrtc.nvrtcGetCUBIN(program, cubin))
    _checked(nvrtc, nvrtc.nvrtcDestroyProgram(program))
    _write(path, cubin)
    return cubin


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all, whoever else writes it; a folder that cannot be written costs a second a process."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(content)
        os.replace(file.name, path)
    except OSError:
        pass


def _bindings(name: str) -> Any:
    try:
        return importlib.import_module(f"cuda.bindings.{name}")
    except ImportError as error:
        raise RuntimeError(
            f"stream_attn: the CUDA kernel needs the package cuda-bindings, but it cannot be imported ({error}); "
            f"install the CUDA build of torch."
        ) from error


def _checked(module: Any, answer: tuple[Any, ...]) -> tuple[Any, ...]:
    status, *values = answer
    if status.value:
        raise RuntimeError(f"stream_attn: {module.__name__} must succeed, but answers {status.name}.")
    return tuple(values)


# ---- launch ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    function: Any
    context: Any  # torch's own: a thread in which torch has done nothing yet has none
    blocks: int  # that the device runs at a time


@functools.cache
def reason(device: int = 0) -> str | None:
    """Why a GPU's calls go to plain PyTorch, or None where the kernel serves them."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA GPU"
    if torch.version.hip:
        return "the kernel is written for NVIDIA GPUs"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the kernel needs a GPU of compute capability 8.0 or newer, but this one has {major}.{minor}"
    try:
        _bindings("driver").cuInit(0)
        nvrtc = _bindings("nvrtc")
        _checked(nvrtc, nvrtc.nvrtcVersion())
    except RuntimeError as error:  # cuda.pathfinder's errors of libraries not found are RuntimeErrors too
        return str(error)
    return None


@functools.cache
def _limit(device: int) -> int:
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin


@functools.cache
def _loaded(variant: Variant, shared_bytes: int, device: int) -> Loaded:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "stream_attn: a variant must be loaded before a CUDA graph captures it, but this one is not; call "
            "speechkit_kernels.cuda.prepare with the same arguments first, or run the step once."
        )
    driver = _bindings("driver")
    major, minor = torch.cuda.get_device_capability(device)
    context = _checked(driver, driver.cuDevicePrimaryCtxRetain(device))[0]
    _checked(driver, driver.cuCtxSetCurrent(context))
    module = _checked(driver, driver.cuModuleLoadData(compile_variant(variant, 10 * major + minor)))[0]
    function = _checked(driver, driver.cuModuleGetFunction(module, b"stream_attn"))[0]
    dynamic = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _checked(driver, driver.cuFuncSetAttribute(function, dynamic, shared_bytes))
    each = driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(function, variant.threads, shared_bytes)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return Loaded(function, context, _checked(driver, each)[0] * processors)


def stream_attn(
    q: Tensor, k: Tensor, v: Tensor, cache: Tensor, slots: Tensor, pos: Tensor, qlen: Tensor, **options: Any
) -> Tensor:
    """As `plain.stream_attn`, on the current stream of the device of ``q``.

    Raises:
        ValueError: as there.
        RuntimeError: during capture, where the variant was not loaded before.
    """
    tensors = (q, k, v, cache, slots, pos, qlen)
    if reason(q.device.index):
        return plain.stream_attn(*tensors, **options)
    plain.check_attention(*tensors, *(options.get(name, default) for name, default in CHECKED.items()))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    with torch.cuda.device(q.device):
        call = describe(*tensors, out=out, limit=_limit(q.device.index), **options)
        if isinstance(call, str):
            return plain.stream_attn(*tensors, **options)
        _launch(call, _loaded(call.variant, call.shared_bytes, q.device.index), torch.cuda.current_stream().cuda_stream)
    return out


def prepare(
    q: Tensor, k: Tensor, v: Tensor, cache: Tensor, slots: Tensor, pos: Tensor, qlen: Tensor, **options: Any
) -> None:
    """Compile and load what a call with such arguments needs, without running it."""
    if reason(q.device.index):
        return
    with torch.cuda.device(q.device):
        limit, out = _limit(q.device.index), torch.empty_like(q, memory_format=torch.contiguous_format)
        call = describe(q, k, v, cache, slots, pos, qlen, out=out, limit=limit, **options)
        if isinstance(call, Call):
            _loaded(call.variant, call.shared_bytes, q.device.index)


def _launch(call: Call, loaded: Loaded, stream: int) -> None:
    """Each block serves as many streams as every other, as far as the number divides, and all blocks run at once."""
    driver = _bindings("driver")
    streams, heads, strips = call.grid
    turns = math.ceil(streams / max(1, loaded.blocks // (heads * strips)))
    grid = (math.ceil(streams / turns), heads, strips)
    _checked(driver, driver.cuCtxSetCurrent(loaded.context))
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(call.args))
    threads = (call.variant.threads, 1, 1)
    _checked(
        driver,
        driver.cuLaunchKernel(
            loaded.function, *grid, *threads, call.shared_bytes, stream, ctypes.addressof(pointers), 0
        ),
    )


def register() -> None:
    """Serve ``torch.ops.speechkit.stream_attn`` on CUDA from here."""
    from speechkit_kernels.ops import LIBRARY

    LIBRARY.impl("stream_attn", stream_attn, "CUDA")
