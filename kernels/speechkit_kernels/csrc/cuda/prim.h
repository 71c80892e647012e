// What the kernels ask of the machine, and all they ask: PTX of sm_80 and newer, no headers, so that nvcc and NVRTC take
// the same text. emu/prim_emu.h gives the same names on the CPU. Shared memory is addressed by its byte.
#ifndef SPEECHKIT_PRIM
#define SPEECHKIT_PRIM

#define DEVICE __device__ __forceinline__
#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)

template <int BYTES> struct alignas(BYTES) Piece { unsigned char at[BYTES]; };
template <> struct alignas(16) Piece<16> { unsigned at[4]; };
template <> struct alignas(8) Piece<8> { unsigned at[2]; };
template <> struct Piece<4> { unsigned at; };
template <> struct Piece<2> { unsigned short at; };
struct alignas(8) Pair { float x, y; };

DEVICE int thread() { return threadIdx.x; }
DEVICE int block_x() { return blockIdx.x; }
DEVICE int block_y() { return blockIdx.y; }
DEVICE int block_z() { return blockIdx.z; }
DEVICE int blocks_x() { return gridDim.x; }

DEVICE char* shared_memory() {
    extern __shared__ __align__(16) char memory[];
    return memory;
}
DEVICE unsigned shared_address(unsigned at) { return (unsigned)__cvta_generic_to_shared(shared_memory()) + at; }

template <class T> DEVICE T load_shared(unsigned at) { return *reinterpret_cast<const T*>(shared_memory() + at); }
template <class T> DEVICE void store_shared(unsigned at, T value) { *reinterpret_cast<T*>(shared_memory() + at) = value; }
template <class T> DEVICE T load_global(const void* at) { return *static_cast<const T*>(at); }
template <class T> DEVICE void store_global(void* at, T value) { *static_cast<T*>(at) = value; }

DEVICE void barrier() { asm volatile("bar.sync 0;" ::: "memory"); }

// An address that the compiler knows nothing about.
DEVICE const char* unforeseen(const char* at) {
    asm volatile("" : "+l"(at));
    return at;
}

// Bytes from global to shared memory, zeros where not `real`; there once copy_wait and then a barrier have passed.
template <int BYTES> DEVICE void copy_async(unsigned at, const void* from, bool real) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "what cp.async copies");
    const unsigned long long source = (unsigned long long)__cvta_generic_to_global(from);
    if constexpr (BYTES == 16)  // past L1: read once
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(at)), "l"(source), "r"(real ? 16 : 0) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(at)), "l"(source), "n"(BYTES), "r"(real ? BYTES : 0) : "memory");
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int YOUNGER> DEVICE void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(YOUNGER) : "memory"); }

DEVICE float shuffle(float value, int lane) {
    float out;
    asm volatile("shfl.sync.idx.b32 %0, %1, %2, 31, 0xffffffff;" : "=f"(out) : "f"(value), "r"(lane));
    return out;
}
DEVICE float shuffle_xor(float value, int mask) {
    float out;
    asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 31, 0xffffffff;" : "=f"(out) : "f"(value), "r"(mask));
    return out;
}

// Four 8 x 8 matrices of 16-bit numbers, lane l naming row l % 8 of matrix l / 8; lane l then holds of each matrix the
// two numbers at (l / 4, 2 (l % 4)), or of its transpose.
DEVICE void load_matrices(unsigned (&out)[4], unsigned at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(shared_address(at)) : "memory");
}
DEVICE void load_transposed(unsigned (&out)[4], unsigned at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(shared_address(at)) : "memory");
}

// c += a b: 16 x 16 times 16 x 8 of 16-bit numbers, and 16 x 8 times 8 x 8 of float32 cut to 11 significant bits.
template <int FORMAT> DEVICE void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    static_assert(FORMAT == 1 || FORMAT == 2, "bfloat16 or float16");
    if constexpr (FORMAT == 1)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE void mma_tf32(float (&c)[4], const float (&a)[4], float b0, float b1) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

DEVICE float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float inverse_root(float x) {
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE float bits_float(unsigned x) { return __uint_as_float(x); }
DEVICE unsigned float_bits(float x) { return __float_as_uint(x); }

// Two 16-bit numbers in a register, the first in the low half.
template <int FORMAT> DEVICE unsigned pack(float first, float second) {
    unsigned out;
    if constexpr (FORMAT == 1)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(second), "f"(first));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(second), "f"(first));
    return out;
}
template <int FORMAT> DEVICE Pair unpack(unsigned both) {
    if constexpr (FORMAT == 1) return {bits_float(both << 16), bits_float(both & 0xffff0000u)};
    Pair out;
    asm("{.reg .f16 lo, hi; mov.b32 {lo, hi}, %2; cvt.f32.f16 %0, lo; cvt.f32.f16 %1, hi;}" : "=f"(out.x), "=f"(out.y) : "r"(both));
    return out;
}
#endif
