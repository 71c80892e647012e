// Gate, causal depthwise convolution over remembered frames, norm, SiLU. What it computes is said in plain.py. A variant
// defines:
//   TYPE     0 float32, 1 bfloat16, 2 float16          TAPS     of a filter
//   GATED    1: x is two halves, value and gate        NORM     1: layer norm over all channels, which one block has
//   EACH     channels a thread, side by side           FRAMES   computed at a time
//   THREADS  a block, whole warps
//
// A block owns one row and THREADS x EACH channels. A thread keeps the frames that its sums meet in registers, the
// remembered ones first, and moves them along; so the memory is read before and written after everything else, by the
// same thread. An element of the result is the same sum in the same order wherever its frame and row stand in the call:
// EACH and THREADS, which the norm's sums go by, depend on the model alone.
#include "prim.h"
#include "common.h"

using Args = ConvStepArgs;

constexpr int SIZE = TYPE == 0 ? 4 : 2;
constexpr int PAST = TAPS - 1;
constexpr int SEEN = PAST + FRAMES;
constexpr int WARPS = THREADS / 32;

// ---- EACH numbers of TYPE -----------------------------------------------------------------------------------------

DEVICE void load(float (&to)[EACH], const char* from) {
    if constexpr (SIZE * EACH == 2) {
        to[0] = unpack<TYPE>(load_global<unsigned short>(from)).x;
    } else {
        const auto piece = load_global<Piece<SIZE * EACH>>(from);
        const unsigned* words = reinterpret_cast<const unsigned*>(&piece);
        UNROLLED for (int e = 0; e < EACH; e += 4 / SIZE)
            if constexpr (TYPE == 0) {
                to[e] = bits_float(words[e]);
            } else {
                const Pair two = unpack<TYPE>(words[e / 2]);
                to[e] = two.x, to[e + 1] = two.y;
            }
    }
}

DEVICE void store(char* to, const float (&from)[EACH]) {
    if constexpr (SIZE * EACH == 2) {
        store_global(to, (unsigned short)pack<TYPE>(from[0], 0.f));
    } else {
        Piece<SIZE * EACH> piece;
        unsigned* words = reinterpret_cast<unsigned*>(&piece);
        UNROLLED for (int e = 0; e < EACH; e += 4 / SIZE)
            if constexpr (TYPE == 0)
                words[e] = float_bits(from[e]);
            else
                words[e / 2] = pack<TYPE>(from[e], from[e + 1]);
        store_global(to, piece);
    }
}

DEVICE float single(const char* at) {
    if constexpr (TYPE == 0)
        return load_global<float>(at);
    else
        return unpack<TYPE>(load_global<unsigned short>(at)).x;
}

DEVICE float rounded(float x) {
    if constexpr (TYPE == 0)
        return x;
    else
        return unpack<TYPE>(pack<TYPE>(x, 0.f)).x;
}

DEVICE float silu(float x, float gate) { return x * reciprocal(1.f + exp2_of(-LOG2E * gate)); }

// ---- one block ----------------------------------------------------------------------------------------------------

struct Block {
    int b, channel, qlen;
    bool mine;     // this thread has channels; where not, it computes the first ones and writes nothing
    char* memory;  // of these channels
};

DEVICE Block begin(const Args& a) {
    Block s;
    s.b = block_x(), s.channel = (block_y() * THREADS + thread()) * EACH;
    s.mine = s.channel < a.width;
    if (!s.mine) s.channel = 0;
    const long long slot = count(a.slots, s.b);
    const bool there = slot >= 0 && slot < a.places;
    s.qlen = there ? most(0, least((int)count(a.qlen, s.b), a.frames)) : 0;
    s.memory = a.cache.at + (there ? slot : 0) * a.cache.row + s.channel * SIZE;
    return s;
}

// Rounded as the memory rounds them: a frame counts the same in the call that brings it and in later ones.
DEVICE void gate(const Args& a, const Block& s, int first, int real, float (&seen)[SEEN][EACH]) {
    const char* from = a.x.at + s.b * a.x.row + first * a.x.frame + s.channel * SIZE;
    UNROLLED for (int f = 0; f < FRAMES; f++) {
        float value[EACH] = {}, by[EACH] = {};
        if (f < real) {
            load(value, from + f * a.x.frame);
            if constexpr (GATED) load(by, from + f * a.x.frame + a.width * SIZE);
        }
        UNROLLED for (int e = 0; e < EACH; e++)
            seen[PAST + f][e] = rounded(silu(value[e], GATED ? by[e] : value[e]));
    }
}

DEVICE void filter(const Args& a, const Block& s, const float (&seen)[SEEN][EACH], float (&y)[FRAMES][EACH]) {
    UNROLLED for (int e = 0; e < EACH; e++) {
        const float start = a.bias.at ? single(a.bias.at + (s.channel + e) * a.bias.channel) : 0.f;
        UNROLLED for (int f = 0; f < FRAMES; f++) y[f][e] = start;
    }
    // Where a tap lies is found anew for each tile: kept, the addresses of all would fill the registers.
    const char* at = unforeseen(a.weight.at + s.channel * a.weight.channel);
    UNROLLED for (int k = 0; k < TAPS; k++, at += a.weight.tap)
        UNROLLED for (int e = 0; e < EACH; e++) {
            const float tap = single(at + e * a.weight.channel);
            UNROLLED for (int f = 0; f < FRAMES; f++) y[f][e] = multiply_add(tap, seen[k + f][e], y[f][e]);
        }
}

// Sums over a warp of COUNT numbers a lane, in a fifth of the shuffles that one after the other would take: at each level
// half of the numbers go to one half of the lanes. Lane l is left with the sum of number l / (32 / COUNT). Which lanes
// are added to which goes by MASK alone, so that a sum does not depend on COUNT.
template <int COUNT, int MASK = 16> DEVICE float sum_lanes(float (&x)[FRAMES]) {
    if constexpr (MASK == 0) {
        return x[0];
    } else {
        constexpr int HALF = COUNT / 2;
        const bool upper = thread() & MASK;
        UNROLLED for (int i = 0; i < HALF; i++)
            x[i] = (upper ? x[i + HALF] : x[i]) + shuffle_xor(upper ? x[i] : x[i + HALF], MASK);
        if constexpr (COUNT == 1) x[0] += shuffle_xor(x[0], MASK);
        return sum_lanes<(COUNT > 1 ? HALF : 1), MASK / 2>(x);
    }
}

// Of each frame the sum over all channels, in every thread; `at` is shared memory, float32 [FRAMES, WARPS].
DEVICE void sum_channels(float (&sums)[FRAMES], unsigned at) {
    constexpr int SHARE = 32 / FRAMES;
    const int lane = thread() % 32;
    const float part = sum_lanes<FRAMES>(sums);
    if (lane % SHARE == 0) store_shared(at + (lane / SHARE * WARPS + thread() / 32) * 4, part);
    barrier();
    UNROLLED for (int f = 0; f < FRAMES; f++)
        sums[f] = lane < WARPS ? load_shared<float>(at + (f * WARPS + lane) * 4) : 0.f;
    const float whole = sum_lanes<FRAMES>(sums);
    UNROLLED for (int f = 0; f < FRAMES; f++) sums[f] = shuffle(whole, f * SHARE);
}

// The two sums have each their own memory, so what is read after a barrier is written again only after the next one.
DEVICE void normalise(const Args& a, const Block& s, float (&y)[FRAMES][EACH]) {
    float sums[FRAMES];
    UNROLLED for (int f = 0; f < FRAMES; f++) {
        sums[f] = 0.f;
        UNROLLED for (int e = 0; e < EACH; e++) sums[f] += s.mine ? y[f][e] : 0.f;
    }
    sum_channels(sums, 0);
    UNROLLED for (int f = 0; f < FRAMES; f++) {
        const float mean = sums[f] / a.width;
        sums[f] = 0.f;
        UNROLLED for (int e = 0; e < EACH; e++) {
            y[f][e] -= mean;
            sums[f] = s.mine ? multiply_add(y[f][e], y[f][e], sums[f]) : 0.f;
        }
    }
    sum_channels(sums, WARPS * FRAMES * 4);
    UNROLLED for (int e = 0; e < EACH; e++) {
        const float weight = single(a.norm_weight.at + (s.channel + e) * a.norm_weight.channel), bias = single(a.norm_bias.at + (s.channel + e) * a.norm_bias.channel);
        UNROLLED for (int f = 0; f < FRAMES; f++)
            y[f][e] = multiply_add(y[f][e] * inverse_root(sums[f] / a.width + a.eps), weight, bias);
    }
}

// Frames `count` on become the first; in steps that the compiler knows, so that all stay in registers.
template <int STEP = 1> DEVICE void advance(float (&seen)[SEEN][EACH], int count) {
    if constexpr (STEP <= FRAMES) {
        if (count & STEP)
            UNROLLED for (int i = 0; i < SEEN - STEP; i++)
                UNROLLED for (int e = 0; e < EACH; e++) seen[i][e] = seen[i + STEP][e];
        advance<2 * STEP>(seen, count);
    }
}

// ---- the launch: blocks [rows, channels / (THREADS x EACH)] -----------------------------------------------------------

KERNEL(THREADS) conv_step(const ConvStepArgs a) {
    const Block s = begin(a);
    float seen[SEEN][EACH] = {};
    UNROLLED for (int i = 0; i < PAST; i++)
        if (s.qlen) load(seen[i], s.memory + i * a.cache.frame);
    char* to = a.out.at + s.b * a.out.row + s.channel * SIZE;
    for (int first = 0; first < s.qlen; first += FRAMES) {
        const int real = least(FRAMES, s.qlen - first);
        float y[FRAMES][EACH];
        gate(a, s, first, real, seen);
        filter(a, s, seen, y);
        if constexpr (NORM) normalise(a, s, y);
        UNROLLED for (int f = 0; f < FRAMES; f++) {
            UNROLLED for (int e = 0; e < EACH; e++) y[f][e] = silu(y[f][e], y[f][e]);
            if (f < real && s.mine) store(to + (first + f) * a.out.frame, y[f]);
        }
        advance(seen, real);
    }
    if (!s.mine) return;
    UNROLLED for (int i = 0; i < PAST; i++)
        if (s.qlen) store(s.memory + i * a.cache.frame, seen[i]);
    const float nothing[EACH] = {};
    for (int f = s.qlen; f < a.frames; f++) store(to + f * a.out.frame, nothing);
}
