// Attention of the new frames of many streams over their ring caches, which the same launch appends to. What it computes
// is said in plain.py. A variant defines:
//   TYPE        0 float32, 1 bfloat16, 2 float16         WIDTH  numbers a head, 1..128, padded to 16s in shared memory
//   ROW_WARPS   x 16 queries a block                     VEC    bytes that every row is copied by: 16, 8, 4, 2
//   KEY_WARPS   parts that the keys are split into       KEYS   keys a part and stage, 16s
//   STAGES      stages in flight                         TABLE  of positions: 0 none, 1 a slab stays in shared memory,
//   Q_POS       1: the positions have their own query           2 its rows come with the keys of each stage
//
// A block owns one head and 16 ROW_WARPS of the call's frames, and walks over streams. Keys are numbered from 0, the
// frame of time pos - left; key `left` is the call's first frame. Warp (part, strip) takes the part's keys sixteen at a
// time. How keys are parted depends on (C, left, WIDTH) alone, so a stream's output is the same bits at any load.
//
// The append is safe although other blocks of the launch may still read: all read the ring at times [pos - left, pos)
// and write it at [pos, pos + C), at most left + C <= W consecutive times, which are different places of the ring.
#include "prim.h"
#include "common.h"

using Args = StreamAttnArgs;

constexpr int SIZE = TYPE == 0 ? 4 : 2;
constexpr int PADDED = (WIDTH + 15) / 16 * 16;
constexpr int PITCH = (PADDED * SIZE / 16 | 1) * 16;  // an odd number of 16 bytes: eight rows of a matrix hit all banks
constexpr int PIECES = WIDTH * SIZE / VEC;   // of a row in global memory
constexpr int FILLED = PADDED * SIZE / VEC;  // of a row in shared memory: the rest is zeros
constexpr int ROWS = 16 * ROW_WARPS;
constexpr int STEP = KEY_WARPS * KEYS;
constexpr int WARPS = ROW_WARPS * KEY_WARPS;
constexpr int THREADS = 32 * WARPS;
constexpr int BAND = KEYS + ROWS;  // table rows that a part's keys of one stage meet
#define NOTHING bits_float(0xff800000u)  // -inf

constexpr unsigned VALUES = STEP * PITCH;  // within a stage, after its keys
constexpr unsigned BANDS = 2 * VALUES;
constexpr unsigned SCORES = BANDS + (TABLE == 2 ? KEY_WARPS * BAND * PITCH : 0);
constexpr unsigned SUMS_PITCH = (PADDED + 8) * 4;
constexpr unsigned SUMS = WARPS * 16 * SUMS_PITCH;  // float32 [WARPS, 16, PADDED + 8], where a stage was
constexpr unsigned STAGE = SCORES + STEP * 4 > SUMS ? SCORES + STEP * 4 : SUMS;
constexpr unsigned QUERY = (1 + Q_POS) * ROWS * PITCH;
constexpr unsigned QUERIES = STAGES * STAGE;
constexpr unsigned BIASES = QUERIES + STAGES * QUERY;  // float32 [2, PADDED]
constexpr unsigned TOTALS = BIASES + 2 * PADDED * 4;   // float32 [WARPS, 16, 2]: greatest score, sum of weights
constexpr unsigned SLAB = TOTALS + WARPS * 16 * 8;

struct Stream {
    long long slot;
    int b, ring;        // row of the call; where key 0 lies in the ring
    int first, last;    // keys that some query sees
    int qlen, keep;
};

DEVICE float real(const Reals& reals, int head, int column) {
    const char* at = reals.at + head * reals.head + column * reals.column;
    if constexpr (TYPE != 0)
        if (reals.narrow) return unpack<TYPE>(load_global<unsigned short>(at)).x;
    return load_global<float>(at);
}

DEVICE Stream read_stream(const Args& a, int b) {
    const long long pos = count(a.pos, b);
    Stream s;
    s.b = b;
    s.slot = count(a.slots, b);
    s.qlen = s.slot < 0 || s.slot >= a.places || pos < 0 ? 0 : most(0, least((int)count(a.qlen, b), a.frames));
    s.keep = a.keep.at ? least((int)count(a.keep, b), s.qlen) : s.qlen;
    s.first = pos < a.left ? a.left - (int)pos : 0;
    s.last = s.qlen ? a.left + s.qlen : 0;
    const int behind = (int)(pos % a.W) - a.left % a.W;
    s.ring = behind < 0 ? behind + a.W : behind;
    return s;
}

DEVICE int ring_index(const Args& a, const Stream& s, int key) {
    const int at = s.ring + key;  // key < left + C <= W
    return at < a.W ? at : at - a.W;
}

DEVICE void copy_piece(unsigned to, const char* from, bool real) {
    if constexpr (VEC >= 4)
        copy_async<VEC>(to, from, real);
    else
        store_shared(to, real ? load_global<Piece<VEC>>(from) : Piece<VEC>{});
}

// Copies have no result to wait for, and unrolled they hold addresses in registers that attention needs.
#define ROLLED _Pragma("unroll 1")

// ---- loading ------------------------------------------------------------------------------------------------------

DEVICE int key_of(const Args& a, unsigned row, int stage) {
    return int(row / KEYS) * a.range + stage * KEYS + int(row % KEYS);
}

// `count` rows of the table; the first is the one that key `key` and the block's last query meet.
DEVICE void load_table(const Args& a, unsigned to, int key, unsigned count) {
    const int above = a.rel.zero - a.left - block_z() * ROWS - (ROWS - 1) + key;
    ROLLED for (unsigned p = thread(); p < count * FILLED; p += THREADS) {
        const unsigned piece = p % FILLED;
        const int row = above + int(p / FILLED);
        const bool inside = row >= 0 && row < a.rel.rows && piece < PIECES;
        const char* from = a.rel.at + block_y() * a.rel.head + row * a.rel.row + piece * VEC;
        copy_piece(to + p / FILLED * PITCH + piece * VEC, inside ? from : a.rel.at, inside);
    }
}

DEVICE void load_keys(const Args& a, const Stream& s, int stage, unsigned to) {
    const int head = block_y() / a.group;
    const char* ring = a.ring.at + s.slot * a.ring.slot + head * a.ring.head;
    const char* k = a.k.at + s.b * a.k.batch + head * a.k.head;
    const char* v = a.v.at + s.b * a.v.batch + head * a.v.head;
    ROLLED for (unsigned p = thread(); p < STEP * FILLED; p += THREADS) {
        const unsigned row = p / FILLED, piece = p % FILLED;
        const int key = key_of(a, row, stage), frame = key - a.left;
        const bool past = frame < 0;
        // What nobody sees is zeros: it may be NaN where it lies, and 0 x NaN is NaN.
        const bool seen = key >= s.first && key < s.last && piece < PIECES;
        const long long index = past ? ring_index(a, s, key) : frame;
        const char* each = (past ? ring : k) + index * (past ? a.ring.frame : a.k.frame);
        const char* value = (past ? ring + a.ring.part : v) + index * (past ? a.ring.frame : a.v.frame);
        const unsigned at = to + row * PITCH + piece * VEC;
        copy_piece(at, seen ? each + piece * VEC : a.k.at, seen);
        copy_piece(at + VALUES, seen ? value + piece * VEC : a.v.at, seen);
    }
}

DEVICE void load_scores(const Args& a, const Stream& s, int stage, unsigned to) {
    const int head = block_y();
    for (int row = thread(); row < STEP; row += THREADS) {
        const int key = key_of(a, row, stage);
        const bool seen = key >= s.first && key < s.last;
        const char* from =
            key < a.left
                ? a.ring_bias.at + s.slot * a.ring_bias.slot + head * a.ring_bias.head +
                      ring_index(a, s, key) * a.ring_bias.frame
                : a.key_bias.at + s.b * a.key_bias.batch + (key - a.left) * a.key_bias.frame + head * a.key_bias.head;
        copy_async<4>(to + row * 4, seen ? from : a.key_bias.at, seen);
    }
}

DEVICE void load_queries(const Args& a, const Stream& s, unsigned to) {
    ROLLED for (unsigned p = thread(); p < (1 + Q_POS) * ROWS * FILLED; p += THREADS) {
        const unsigned row = p / FILLED, piece = p % FILLED;
        const int frame = block_z() * ROWS + int(row % ROWS);
        const Rows& q = row < ROWS ? a.q : a.q_pos;
        const bool given = frame < s.qlen && piece < PIECES;
        const char* from = q.at + s.b * q.batch + (long long)frame * q.frame + block_y() * q.head + piece * VEC;
        copy_piece(to + row * PITCH + piece * VEC, given ? from : q.at, given);
    }
}

// What the launch keeps: the biases of this head, the slab of its table.
DEVICE void load_head(const Args& a) {
    for (int x = thread(); x < 2 * PADDED; x += THREADS) {
        const Reals& bias = x < PADDED ? a.bias_u : a.bias_v;
        const int column = x % PADDED;
        store_shared(BIASES + x * 4, bias.at && column < WIDTH ? real(bias, block_y(), column) : 0.f);
    }
    if constexpr (TABLE == 1) load_table(a, SLAB, 0, (a.left + a.frames + 15) / 16 * 16 + ROWS);
}

// ---- 16 x 16 products of a warp -------------------------------------------------------------------------------------
// Lane 4 g + t holds of 16 x 8 sums the rows g and g + 8, columns 2 t and 2 t + 1: [row g: two, row g + 8: two].

DEVICE int lane() { return thread() % 32; }

#if TYPE != 0
struct Fragment { unsigned x[4]; };

// Sixteen rows, columns column..column + 15, plus a bias for each column.
DEVICE Fragment fragment(unsigned rows, unsigned bias, int column, bool biased) {
    Fragment f;
    load_matrices(f.x, rows + lane() % 16 * PITCH + column * 2 + lane() / 16 * 16);
    if (biased)
        for (int j = 0; j < 4; j++) {
            const Pair each = unpack<TYPE>(f.x[j]);
            const Pair more = load_shared<Pair>(bias + (column + j / 2 * 8 + lane() % 4 * 2) * 4);
            f.x[j] = pack<TYPE>(each.x + more.x, each.y + more.y);
        }
    return f;
}

// sums[q, r] += queries[q, :] . rows[r, :] over sixteen columns.
DEVICE void multiply(float (*sums)[4], const Fragment& queries, unsigned rows, int column) {
    unsigned b[4];
    load_matrices(b, rows + (lane() / 16 * 8 + lane() % 8) * PITCH + column * 2 + lane() / 8 % 2 * 16);
    mma<TYPE>(sums[0], queries.x, b[0], b[1]);
    mma<TYPE>(sums[1], queries.x, b[2], b[3]);
}

// out[q, :] += weights[q, r] values[r, :] over sixteen keys.
DEVICE void weigh(float (&out)[PADDED / 8][4], const float (&weights)[2][4], unsigned values) {
    unsigned p[4], b[4];
    for (int j = 0; j < 4; j++) p[j] = pack<TYPE>(weights[j / 2][j % 2 * 2], weights[j / 2][j % 2 * 2 + 1]);
    for (int n = 0; n < PADDED / 8; n += 2) {
        load_transposed(b, values + lane() % 16 * PITCH + n * 16 + lane() / 16 * 16);
        mma<TYPE>(out[n], p, b[0], b[1]);
        mma<TYPE>(out[n + 1], p, b[2], b[3]);
    }
}
#else
// float32 by three products of tf32: x = high + low, each 11 bits, and low x low is left out (2^-22). The order of the
// eight summed columns is free, so a lane takes neighbours, 2 t and 2 t + 1, where the instruction says t and t + 4.
struct Fragment { float x[2][4]; };

DEVICE float high(float x) { return bits_float(float_bits(x) & 0xffffe000u); }

DEVICE void mma_exact(float (&c)[4], const float (&a)[4], float b0, float b1) {
    float top[4], rest[4];
    for (int j = 0; j < 4; j++) top[j] = high(a[j]), rest[j] = a[j] - top[j];
    mma_tf32(c, rest, high(b0), high(b1));
    mma_tf32(c, top, b0 - high(b0), b1 - high(b1));
    mma_tf32(c, top, high(b0), high(b1));
}

DEVICE Fragment fragment(unsigned rows, unsigned bias, int column, bool) {
    Fragment f;
    UNROLLED for (int k = 0; k < 2; k++) {
        const unsigned at = (column + 8 * k + lane() % 4 * 2) * 4;
        const Pair more = load_shared<Pair>(bias + at);
        for (int half = 0; half < 2; half++) {
            const Pair each = load_shared<Pair>(rows + (lane() / 4 + 8 * half) * PITCH + at);
            f.x[k][half] = each.x + more.x, f.x[k][half + 2] = each.y + more.y;
        }
    }
    return f;
}

DEVICE void multiply(float (*sums)[4], const Fragment& queries, unsigned rows, int column) {
    for (int n = 0; n < 2; n++)
        UNROLLED for (int k = 0; k < 2; k++) {
            const Pair b = load_shared<Pair>(rows + (8 * n + lane() / 4) * PITCH + (column + 8 * k + lane() % 4 * 2) * 4);
            mma_exact(sums[n], queries.x[k], b.x, b.y);
        }
}

DEVICE void weigh(float (&out)[PADDED / 8][4], const float (&weights)[2][4], unsigned values) {
    UNROLLED for (int k = 0; k < 2; k++) {
        const float p[4] = {weights[k][0], weights[k][2], weights[k][1], weights[k][3]};
        UNROLLED for (int n = 0; n < PADDED / 8; n++) {
            const unsigned at = values + (8 * k + lane() % 4 * 2) * PITCH + (8 * n + lane() / 4) * 4;
            mma_exact(out[n], p, load_shared<float>(at), load_shared<float>(at + PITCH));
        }
    }
}
#endif

// Scores of position from products with table rows. Query r and key c of 16 x 16 meet band column c + 15 - r, so row g
// wants columns shifted by 8 + (7 - g) and row g + 8 by 7 - g: whole groups of eight, known here, and the rest
// y = 2 t + e + 7 - g, from 0 to 14, within the four lanes that share the row. The giver lane stands at y mod 8 and can
// tell whether its taker is past 8: its own place is below 7 - g. One shuffle a score.
DEVICE void skew(float (&scores)[2][4], const float (&band)[4][4]) {
    const int g = lane() / 4, t = lane() % 4, shift = 7 - g;
    const bool odd = shift % 2;
    const bool wraps[2] = {2 * t < shift, 2 * t + 1 < shift};
    for (int n = 0; n < 2; n++)
        for (int half = 0; half < 2; half++) {
            const float(&low)[4] = band[n + 1 - half];
            const float(&next)[4] = band[n + 2 - half];
            const float even_place = wraps[0] ? next[2 * half] : low[2 * half];
            const float odd_place = wraps[1] ? next[2 * half + 1] : low[2 * half + 1];
            for (int e = 0; e < 2; e++) {
                const int giver = 4 * g + (2 * t + e + shift) % 8 / 2;
                scores[n][2 * half + e] = shuffle((e == 1) != odd ? odd_place : even_place, giver);
            }
        }
}

// ---- attention of one warp --------------------------------------------------------------------------------------------

constexpr bool KEPT = TYPE != 0 || WIDTH <= 64;  // queries stay in registers where there is room

struct Warp {
    int part, strip;
    int from[2], to[2];              // keys that rows g and g + 8 see
    float greatest[2], total[2];     // of the scores so far, in powers of two; of the weights in this lane
    float out[PADDED / 8][4];
    float band[2][4];                // of the keys after `reached`, left by the sixteen before
    int reached;
    unsigned queries, positions;     // where they lie
    Fragment q[KEPT ? PADDED / 16 : 1], p[KEPT && TABLE ? PADDED / 16 : 1];
};

DEVICE void begin(const Args& a, const Stream& s, Warp& w, unsigned queries) {
    w.queries = queries + w.strip * 16 * PITCH;
    w.positions = w.queries + Q_POS * ROWS * PITCH;
    w.reached = -1;
    for (int half = 0; half < 2; half++) {
        const int frame = block_z() * ROWS + w.strip * 16 + lane() / 4 + 8 * half;
        const int chunk = a.chunk ? frame - frame % a.chunk : 0;  // pos stands at a border
        w.from[half] = most(chunk, s.first);
        w.to[half] = frame < s.qlen ? least(chunk + a.left + (a.chunk ? a.chunk : a.frames), s.last) : 0;
        w.greatest[half] = NOTHING;
        w.total[half] = 0.f;
    }
    for (int n = 0; n < PADDED / 8; n++)
        for (int j = 0; j < 4; j++) w.out[n][j] = 0.f;
    if constexpr (KEPT)
        for (int n = 0; n < PADDED / 16; n++) {
            w.q[n] = fragment(w.queries, BIASES, 16 * n, a.bias_u.at);
            if constexpr (TABLE) w.p[n] = fragment(w.positions, BIASES + PADDED * 4, 16 * n, a.bias_v.at);
        }
}

DEVICE void multiply_all(const Args& a, const Warp& w, float (*sums)[4], unsigned rows, bool positions) {
    for (int j = 0; j < 8; j++) sums[j / 4][j % 4] = 0.f;
    UNROLLED for (int n = 0; n < PADDED / 16; n++)
        if constexpr (KEPT)
            multiply(sums, positions ? w.p[TABLE ? n : 0] : w.q[n], rows, 16 * n);
        else
            multiply(sums, fragment(positions ? w.positions : w.queries, positions ? BIASES + PADDED * 4 : BIASES, 16 * n, true), rows, 16 * n);
}

// Sixteen keys: scores, softmax so far, values.
DEVICE void attend(const Args& a, Warp& w, int key, unsigned keys, unsigned band_rows, unsigned key_scores) {
    float scores[2][4], position[2][4];
    if constexpr (TABLE) {
        float band[4][4];
        if (w.reached == key)
            for (int j = 0; j < 8; j++) band[j / 4][j % 4] = w.band[j / 4][j % 4];
        else
            multiply_all(a, w, band, band_rows, true);
        multiply_all(a, w, band + 2, band_rows + 16 * PITCH, true);
        skew(position, band);
        for (int j = 0; j < 8; j++) w.band[j / 4][j % 4] = band[2 + j / 4][j % 4];
        w.reached = key + 16;
    }
    multiply_all(a, w, scores, keys, false);

    const float slope = a.slopes.at ? real(a.slopes, block_y(), 0) * LOG2E : 0.f;
    const int row = a.left + block_z() * ROWS + w.strip * 16 + lane() / 4;
    for (int n = 0; n < 2; n++)
        for (int j = 0; j < 4; j++) {
            const int column = 8 * n + lane() % 4 * 2 + j % 2, at = key + column, half = j / 2;
            float x = (TABLE ? scores[n][j] + position[n][j] : scores[n][j]) * a.scale;
            if (a.ring_bias.at) x += load_shared<float>(key_scores + column * 4) * LOG2E;
            if (a.slopes.at) x -= slope * most(at - row - 8 * half, row + 8 * half - at);
            scores[n][j] = at >= w.from[half] && at < w.to[half] ? x : NOTHING;
        }
    for (int half = 0; half < 2; half++) {
        const int j = 2 * half;
        float top = most(most(scores[0][j], scores[0][j + 1]), most(scores[1][j], scores[1][j + 1]));
        top = most(top, shuffle_xor(top, 1));
        top = most(w.greatest[half], most(top, shuffle_xor(top, 2)));
        const float level = top == NOTHING ? 0.f : top;  // nothing seen yet: all weights 0, not NaN
        const float fade = exp2_of(w.greatest[half] - level);
        w.greatest[half] = top;
        w.total[half] *= fade;
        for (int n = 0; n < PADDED / 8; n++) w.out[n][j] *= fade, w.out[n][j + 1] *= fade;
        for (int n = 0; n < 2; n++)
            for (int e = j; e < j + 2; e++) w.total[half] += scores[n][e] = exp2_of(scores[n][e] - level);
    }
    weigh(w.out, scores, keys + VALUES);
}

DEVICE void attend_stage(const Args& a, const Stream& s, Warp& w, int stage, unsigned at) {
    for (int sub = 0; sub < KEYS; sub += 16) {
        const int row = w.part * KEYS + sub, key = key_of(a, row, stage);
        if (key >= s.last || key + 16 <= s.first) continue;
        const int above = ROWS - 16 - w.strip * 16;
        const unsigned band = TABLE == 1 ? SLAB + (key + above) * PITCH : at + BANDS + (w.part * BAND + sub + above) * PITCH;
        attend(a, w, key, at + row * PITCH, band, at + SCORES + row * 4);
    }
}

// ---- the call's frames into the ring ------------------------------------------------------------------------------------

DEVICE void append(const Args& a, const Stream& s, int stage, unsigned from) {
    const int head = block_y() / a.group;
    const bool first = block_y() % a.group == 0;  // of the heads that share these keys
    ROLLED for (unsigned p = thread(); first && p < 2 * STEP * PIECES; p += THREADS) {
        const unsigned part = p / (STEP * PIECES), row = p / PIECES % STEP, piece = p % PIECES * VEC;
        const int key = key_of(a, row, stage);
        if (key < a.left || key >= a.left + s.keep) continue;
        char* to = a.ring.at + s.slot * a.ring.slot + part * a.ring.part + head * a.ring.head +
                   ring_index(a, s, key) * a.ring.frame + piece;
        store_global(to, load_shared<Piece<VEC>>(from + part * VALUES + row * PITCH + piece));
    }
    for (int row = thread(); a.ring_bias.at && row < STEP; row += THREADS) {
        const int key = key_of(a, row, stage);
        if (key < a.left || key >= a.left + s.keep) continue;
        char* to = a.ring_bias.at + s.slot * a.ring_bias.slot + block_y() * a.ring_bias.head +
                   ring_index(a, s, key) * a.ring_bias.frame;
        store_global(to, load_shared<float>(from + SCORES + row * 4));
    }
}

// ---- parts of one stream together -----------------------------------------------------------------------------------------

DEVICE void hand_in(const Warp& w, int warp, unsigned sums) {
    for (int half = 0; half < 2; half++) {
        float total = w.total[half];
        total += shuffle_xor(total, 1);
        total += shuffle_xor(total, 2);
        const int row = warp * 16 + lane() / 4 + 8 * half;
        if (lane() % 4 == 0) store_shared(TOTALS + row * 8, Pair{w.greatest[half], total});
        for (int n = 0; n < PADDED / 8; n++)
            store_shared(sums + row * SUMS_PITCH + (8 * n + lane() % 4 * 2) * 4, Pair{w.out[n][2 * half], w.out[n][2 * half + 1]});
    }
}

DEVICE void write_out(const Args& a, const Stream& s, unsigned from) {
    constexpr int EACH = VEC / SIZE;
    for (unsigned p = thread(); p < ROWS * PIECES; p += THREADS) {
        const unsigned row = p / PIECES, column = p % PIECES * EACH;
        const int frame = block_z() * ROWS + int(row);
        if (frame >= a.frames) continue;
        float top = NOTHING, total = 0.f, sums[EACH] = {};
        for (int part = 0; part < KEY_WARPS; part++)
            top = most(top, load_shared<Pair>(TOTALS + (part * ROWS + row) * 8).x);
        for (int part = 0; part < KEY_WARPS; part++) {
            const Pair each = load_shared<Pair>(TOTALS + (part * ROWS + row) * 8);
            const float weight = each.x == NOTHING ? 0.f : exp2_of(each.x - top);
            total += weight * each.y;
            for (int e = 0; e < EACH; e++)
                sums[e] += weight * load_shared<float>(from + (part * ROWS + row) * SUMS_PITCH + (column + e) * 4);
        }
        const float share = frame < s.qlen && total != 0.f ? 1.f / total : 0.f;
        char* to = const_cast<char*>(a.out.at) + s.b * a.out.batch + frame * a.out.frame + block_y() * a.out.head + p % PIECES * VEC;
        if constexpr (TYPE == 0) {
            for (int e = 0; e < EACH; e++) store_global(to + 4 * e, sums[e] * share);
        } else if constexpr (VEC == 2) {
            store_global(to, (unsigned short)pack<TYPE>(sums[0] * share, 0.f));
        } else {
            Piece<VEC> both;
            for (int e = 0; e < EACH; e += 2)
                reinterpret_cast<unsigned*>(&both)[e / 2] = pack<TYPE>(sums[e] * share, sums[e + 1] * share);
            store_global(to, both);
        }
    }
}

// ---- the launch: blocks [streams, heads, frames / ROWS] -------------------------------------------------------------------

KERNEL(THREADS) stream_attn(const Args a) {
    const int stages = a.range / KEYS, stride = blocks_x(), warp = thread() / 32;
    Warp w;
    w.part = warp / ROW_WARPS, w.strip = warp % ROW_WARPS;
    load_head(a);

    int coming = block_x(), coming_stage = 0, slot = 0, turn = 0;  // what is loaded next, and where to
    Stream ahead = read_stream(a, coming);
    auto load_next = [&] {
        if (coming < a.streams) {
            const unsigned to = slot * STAGE;
            load_keys(a, ahead, coming_stage, to);
            if (a.ring_bias.at) load_scores(a, ahead, coming_stage, to + SCORES);
            if constexpr (TABLE == 2)
                for (int part = 0; part < KEY_WARPS; part++)
                    load_table(a, to + BANDS + part * BAND * PITCH, part * a.range + coming_stage * KEYS, BAND);
            if (coming_stage == 0) load_queries(a, ahead, QUERIES + turn * QUERY);
            if (++coming_stage == stages) {
                coming_stage = 0, coming += stride, turn = (turn + 1) % STAGES;
                if (coming < a.streams) ahead = read_stream(a, coming);
            }
        }
        slot = (slot + 1) % STAGES;
        copy_commit();
    };
    for (int n = 1; n < STAGES; n++) load_next();

    int here = 0, now = 0;
    for (int b = block_x(); b < a.streams; b += stride, now = (now + 1) % STAGES) {
        const Stream s = read_stream(a, b);
        for (int stage = 0; stage < stages; stage++, here = (here + 1) % STAGES) {
            copy_wait<STAGES - 2>();
            barrier();  // this stage is there for all, and all are done with the one before, whose place is free
            load_next();
            if (stage == 0) begin(a, s, w, QUERIES + now * QUERY);
            if (block_z() == 0) append(a, s, stage, here * STAGE);
            attend_stage(a, s, w, stage, here * STAGE);
        }
        const unsigned sums = (here + STAGES - 1) % STAGES * STAGE;  // of the last stage, the next to be loaded into
        barrier();  // all are done with it
        hand_in(w, warp, sums);
        barrier();
        write_out(a, s, sums);
    }
}
