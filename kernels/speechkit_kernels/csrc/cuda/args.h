// What a launch passes to the kernels: read by their compilers and by the host's. Pointers are to the device's memory,
// strides are bytes, numbers of TYPE, unless said otherwise.
#ifndef SPEECHKIT_ARGS
#define SPEECHKIT_ARGS

struct Counts { const char* at; long long wide; };                            // wide: int64, else int32

struct Rows { const char* at; long long batch, head; int frame; };
struct Ring { char* at; long long slot, part, head; int frame; };
struct Table { const char* at; long long head, row; int rows, zero; };
struct Reals { const char* at; long long head, column; long long narrow; };   // narrow: of TYPE, else float32

struct StreamAttnArgs {
    Rows q, k, v, q_pos, out, key_bias;
    Ring ring, ring_bias;
    Table rel;
    Reals bias_u, bias_v, slopes;
    Counts slots, pos, qlen, keep;
    int streams, frames, group, W, chunk, left;
    int places;     // of the ring: a row that names another one is as one without frames
    int range;      // keys a part, a multiple of KEYS
    float scale;    // times log2(e)
};

struct Frames { char* at; long long row, frame; };                            // channels side by side
struct Channels { const char* at; long long channel, tap; };

struct ConvStepArgs {
    Frames x, cache, out;
    Channels weight, bias, norm_weight, norm_bias;
    Counts slots, qlen;
    int frames, width;
    int places;     // of the cache, as above
    float eps;
};
#endif
