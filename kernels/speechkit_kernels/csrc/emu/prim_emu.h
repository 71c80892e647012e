// prim.h on the CPU: a kernel's text, compiled by a host compiler after this header, runs with one fiber a CUDA thread.
//
// Exact: which numbers ldmatrix, mma and shfl hand to which lane; what they round. Hostile, by a seed: the order of
// blocks, of lanes between the instructions that a warp does together, and of warps, some of which run far ahead;
// shared memory starts as NaN; an asynchronous copy turns its destination into NaN at once and lands anywhere between
// its issue and its wait. Refused, with a sentence: addresses outside the tensors or shared memory or not aligned, lanes
// of a warp at different instructions, barriers that not all threads reach.
#ifndef SPEECHKIT_PRIM
#define SPEECHKIT_PRIM
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#define DEVICE inline
#define KERNEL(threads) extern "C" void

template <int BYTES> struct alignas(BYTES) Piece { unsigned char at[BYTES]; };
struct alignas(8) Pair { float x, y; };

namespace emu {

struct Range { const char* from; long long bytes; int writable; };  // a tensor's memory
struct Copy { unsigned at; int bytes; char data[16]; };
struct Thread {
    ucontext_t context;
    std::vector<char> stack;
    bool ready = true, done = false;
    std::vector<std::vector<Copy>> groups;  // committed, oldest first; the last is still open
};
struct Warp { const char* name; std::vector<void*> lanes; int arrived = 0; };

inline uint64_t dice;
inline std::vector<Range> ranges;
inline std::vector<char> shared;
inline std::vector<Thread> threads;
inline std::vector<Warp> warps;
inline ucontext_t scheduler;
inline std::string trouble;
inline void (*kernel)(const void*);
inline const void* arguments;
inline int current, waiting, block[3], blocks[3];
inline bool early;  // copies land at once rather than at their wait

inline int roll(int sides) {
    dice = dice * 6364136223846793005u + 1442695040888963407u;
    return int((dice >> 33) % unsigned(sides));
}
inline void rest() { swapcontext(&threads[current].context, &scheduler); }
[[noreturn]] inline void fail(const std::string& what) {
    if (trouble.empty())
        trouble = what + " (block " + std::to_string(block[0]) + "," + std::to_string(block[1]) + "," +
                  std::to_string(block[2]) + " thread " + std::to_string(current) + ")";
    for (;;) rest();
}

inline char* at_shared(unsigned at, int bytes) {
    if (at % bytes) fail("shared address " + std::to_string(at) + " is not aligned to " + std::to_string(bytes));
    if (at + bytes > shared.size())
        fail("shared address " + std::to_string(at) + " is past the " + std::to_string(shared.size()) + " bytes asked for");
    return shared.data() + at;
}
inline void check_global(const void* at, int bytes, bool write) {
    const char* p = static_cast<const char*>(at);
    if (reinterpret_cast<uintptr_t>(p) % bytes) fail("a global address is not aligned to " + std::to_string(bytes));
    for (const Range& r : ranges)
        if (p >= r.from && p + bytes <= r.from + r.bytes && (r.writable || !write)) return;
    fail(std::string("a global ") + (write ? "store" : "load") + " outside the tensors");
}

// What a warp does together: every lane leaves its operands, the last to come works for all.
template <class T> void together(const char* name, T& mine, void (*work)(T** lanes)) {
    Warp& warp = warps[current / 32];
    if (warp.arrived == 0) warp.name = name;
    if (warp.name != name) fail(std::string("lanes part: one is at ") + name + ", another at " + warp.name);
    warp.lanes[current % 32] = &mine;
    if (++warp.arrived < 32) {
        threads[current].ready = false;
        return rest();
    }
    warp.arrived = 0;
    work(reinterpret_cast<T**>(warp.lanes.data()));
    for (int l = 0; l < 32; l++) threads[current / 32 * 32 + l].ready = true;
}

inline float half_float(uint16_t x) { _Float16 h; std::memcpy(&h, &x, 2); return float(h); }
inline uint16_t float_half(float x) { _Float16 h = _Float16(x); uint16_t y; std::memcpy(&y, &h, 2); return y; }
inline float bits(uint32_t x) { float y; std::memcpy(&y, &x, 4); return y; }
inline uint32_t bits(float x) { uint32_t y; std::memcpy(&y, &x, 4); return y; }
inline float tf32(float x) { return bits(bits(x) & 0xffffe000u); }
template <int FORMAT> float narrow_float(uint16_t x) { return FORMAT == 1 ? bits(uint32_t(x) << 16) : half_float(x); }
template <int FORMAT> uint16_t float_narrow(float x) {
    if (FORMAT == 2) return float_half(x);
    if (std::isnan(x)) return 0x7fff;
    const uint32_t b = bits(x);
    return uint16_t((b + 0x7fffu + (b >> 16 & 1)) >> 16);  // to nearest, ties to even
}

inline void enter() {
    kernel(arguments);
    threads[current].done = true;
    for (;;) rest();
}

// Lanes of one warp go on, each until it has to wait for others; false when none can.
inline bool go_on(int warp) {
    bool went = false;
    const int first = roll(32);
    for (int l = 0; l < 32 && trouble.empty(); l++) {
        current = warp * 32 + (first + l) % 32;
        if (!threads[current].ready || threads[current].done) continue;
        swapcontext(&scheduler, &threads[current].context);
        went = true;
    }
    return went;
}

inline void run_block(int count, int shared_bytes) {
    shared.assign(shared_bytes, char(0xff));  // NaN in every format
    threads.clear();
    threads.resize(count);
    warps.assign(count / 32, Warp{nullptr, std::vector<void*>(32), 0});
    waiting = 0;
    early = roll(2);
    for (Thread& t : threads) {
        t.groups.resize(1);
        t.stack.resize(1 << 16);
        getcontext(&t.context);
        t.context.uc_stack.ss_sp = t.stack.data();
        t.context.uc_stack.ss_size = t.stack.size();
        t.context.uc_link = &scheduler;
        makecontext(&t.context, enter, 0);
    }
    std::vector<int> haste;  // warps named more often are chosen more often
    for (size_t w = 0; w < warps.size(); w++) haste.insert(haste.end(), 1 << (4 * roll(3)), int(w));
    int idle = 0;
    while (trouble.empty()) {
        bool done = true;
        for (const Thread& t : threads) done = done && t.done;
        if (done) return;
        if (go_on(haste[roll(int(haste.size()))])) idle = 0;
        else if (++idle > 64) {
            bool went = false;
            for (size_t w = 0; w < warps.size(); w++) went = go_on(int(w)) || went;
            if (!went) trouble = "some threads wait for others that do not come";
            idle = 0;
        }
    }
}

// All blocks of a launch in an order drawn from the seed; what went wrong, or an empty string.
inline const char* launch(void (*text)(const void*), const void* args, const int* grid, int threads, int shared_bytes,
                          unsigned seed, const Range* tensors, int count) {
    dice = seed * 0x9e3779b97f4a7c15u + 1;
    trouble.clear();
    kernel = text, arguments = args;
    ranges.assign(tensors, tensors + count);
    std::vector<int> order(grid[0] * grid[1] * grid[2]);
    for (int i = 0; i < int(order.size()); i++) order[i] = i, std::swap(order[i], order[roll(i + 1)]);
    for (int d = 0; d < 3; d++) blocks[d] = grid[d];
    for (int i : order) {
        block[0] = i % grid[0], block[1] = i / grid[0] % grid[1], block[2] = i / grid[0] / grid[1];
        if (trouble.empty()) run_block(threads, shared_bytes);
    }
    return trouble.c_str();
}
}  // namespace emu

inline int thread() { return emu::current; }
inline int block_x() { return emu::block[0]; }
inline int block_y() { return emu::block[1]; }
inline int block_z() { return emu::block[2]; }
inline int blocks_x() { return emu::blocks[0]; }

template <class T> T load_shared(unsigned at) { T out; std::memcpy(&out, emu::at_shared(at, sizeof(T)), sizeof(T)); return out; }
template <class T> void store_shared(unsigned at, T value) { std::memcpy(emu::at_shared(at, sizeof(T)), &value, sizeof(T)); }
template <class T> T load_global(const void* at) { emu::check_global(at, sizeof(T), false); T out; std::memcpy(&out, at, sizeof(T)); return out; }
template <class T> void store_global(void* at, T value) { emu::check_global(at, sizeof(T), true); std::memcpy(at, &value, sizeof(T)); }

inline void barrier() {
    using namespace emu;
    if (++waiting < int(threads.size())) {
        threads[current].ready = false;
        return rest();
    }
    waiting = 0;
    for (Thread& t : threads) t.ready = true;
}

template <int BYTES> void copy_async(unsigned at, const void* from, bool real) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "what cp.async copies");
    emu::Copy copy{at, BYTES, {}};
    if (real) emu::check_global(from, BYTES, false), std::memcpy(copy.data, from, BYTES);
    char* to = emu::at_shared(at, BYTES);
    if (emu::early) std::memcpy(to, copy.data, BYTES);
    else std::memset(to, 0xff, BYTES), emu::threads[emu::current].groups.back().push_back(copy);
}
inline void copy_commit() { emu::threads[emu::current].groups.emplace_back(); }
template <int YOUNGER> void copy_wait() {
    auto& groups = emu::threads[emu::current].groups;
    while (int(groups.size()) - 1 > YOUNGER) {
        for (const emu::Copy& c : groups.front()) std::memcpy(emu::at_shared(c.at, c.bytes), c.data, c.bytes);
        groups.erase(groups.begin());
    }
}

namespace emu {
struct Shuffle { float value; int lane; float out; };
inline float shuffled(const char* name, float value, int lane) {
    Shuffle mine{value, lane, 0};
    together<Shuffle>(name, mine, [](Shuffle** l) { for (int i = 0; i < 32; i++) l[i]->out = l[l[i]->lane & 31]->value; });
    return mine.out;
}

struct Matrices { unsigned at; unsigned out[4]; };
template <bool TRANSPOSED> void load(const char* name, unsigned (&out)[4], unsigned at) {
    Matrices mine{at, {}};
    together<Matrices>(name, mine, [](Matrices** l) {
        for (int i = 0; i < 32; i++)
            for (int m = 0; m < 4; m++) {
                uint16_t two[2];
                for (int e = 0; e < 2; e++) {
                    const int row = TRANSPOSED ? i % 4 * 2 + e : i / 4, column = TRANSPOSED ? i / 4 : i % 4 * 2 + e;
                    std::memcpy(two + e, at_shared(l[m * 8 + row]->at, 16) + 2 * column, 2);
                }
                std::memcpy(&l[i]->out[m], two, 4);
            }
    });
    std::memcpy(out, mine.out, sizeof(out));
}

struct Product { float* c; uint32_t a[4]; uint32_t b[2]; };

// 16 x 16 by 16 x 8: a register of A is row g + 8 (r % 2), columns 8 (r / 2) + 2 t and the next; of B rows 8 r + 2 t, column g.
template <int FORMAT> void multiply(Product** l) {
    float a[16][16], b[16][8];
    for (int i = 0; i < 32; i++) {
        const int g = i / 4, t = i % 4;
        for (int e = 0; e < 2; e++) {
            for (int r = 0; r < 4; r++) a[g + r % 2 * 8][r / 2 * 8 + 2 * t + e] = narrow_float<FORMAT>(uint16_t(l[i]->a[r] >> 16 * e));
            for (int r = 0; r < 2; r++) b[8 * r + 2 * t + e][g] = narrow_float<FORMAT>(uint16_t(l[i]->b[r] >> 16 * e));
        }
    }
    for (int i = 0; i < 32; i++)
        for (int j = 0; j < 4; j++)
            for (int k = 0; k < 16; k++) l[i]->c[j] += a[i / 4 + j / 2 * 8][k] * b[k][i % 4 * 2 + j % 2];
}

// 16 x 8 by 8 x 8: a register of A is row g + 8 (r % 2), column t + 4 (r / 2); of B row t + 4 r, column g.
inline void multiply_tf32(Product** l) {
    float a[16][8], b[8][8];
    for (int i = 0; i < 32; i++) {
        for (int r = 0; r < 4; r++) a[i / 4 + r % 2 * 8][i % 4 + r / 2 * 4] = tf32(bits(l[i]->a[r]));
        for (int r = 0; r < 2; r++) b[i % 4 + 4 * r][i / 4] = tf32(bits(l[i]->b[r]));
    }
    for (int i = 0; i < 32; i++)
        for (int j = 0; j < 4; j++)
            for (int k = 0; k < 8; k++) l[i]->c[j] += a[i / 4 + j / 2 * 8][k] * b[k][i % 4 * 2 + j % 2];
}
}  // namespace emu

inline float shuffle(float value, int lane) { return emu::shuffled("shfl.idx", value, lane); }
inline float shuffle_xor(float value, int mask) { return emu::shuffled("shfl.bfly", value, emu::current % 32 ^ mask); }
inline void load_matrices(unsigned (&out)[4], unsigned at) { emu::load<false>("ldmatrix", out, at); }
inline void load_transposed(unsigned (&out)[4], unsigned at) { emu::load<true>("ldmatrix.trans", out, at); }
template <int FORMAT> void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    emu::Product mine{c, {a[0], a[1], a[2], a[3]}, {b0, b1}};
    emu::together<emu::Product>("mma", mine, emu::multiply<FORMAT>);
}
inline void mma_tf32(float (&c)[4], const float (&a)[4], float b0, float b1) {
    using emu::bits;
    emu::Product mine{c, {bits(a[0]), bits(a[1]), bits(a[2]), bits(a[3])}, {bits(b0), bits(b1)}};
    emu::together<emu::Product>("mma.tf32", mine, emu::multiply_tf32);
}

inline const char* unforeseen(const char* at) { return at; }
inline float exp2_of(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1 / x; }
inline float inverse_root(float x) { return 1 / std::sqrt(x); }
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline float bits_float(unsigned x) { return emu::bits(uint32_t(x)); }
inline unsigned float_bits(float x) { return emu::bits(x); }
template <int FORMAT> unsigned pack(float first, float second) {
    return emu::float_narrow<FORMAT>(first) | unsigned(emu::float_narrow<FORMAT>(second)) << 16;
}
template <int FORMAT> Pair unpack(unsigned both) {
    return {emu::narrow_float<FORMAT>(uint16_t(both)), emu::narrow_float<FORMAT>(uint16_t(both >> 16))};
}
#endif
