// The model's kernels: what norms, SwiGLU, rotary positions, cross-entropy and dropout are on a GPU. The formulas and their
// sources are in cpu.rs, whose functions these stand beside; mod.rs chooses.
// Axes: n position, d dim, f feed-forward dim, v vocabulary. Rows are dense, one behind the other.

// ---- RMSNorm: a block a row

// The row of this block, at which wide loads may be used if every array is at a multiple of 16 bytes.
template <class E> __device__ __forceinline__ bool wide_rows(i64 d) { return d % WIDE<E> == 0; }

template <class E> __device__ __forceinline__ float inverse_rms(const E *x_d, i64 d, bool wide, float epsilon) {
    float sum = 0;
    each<E>(d, wide, threadIdx.x, blockDim.x, [&](auto count, i64 i) {
        constexpr int N = decltype(count)::value;
        auto x = load<N>(x_d + i);
        for (int k = 0; k < N; k++)
            sum += widen(x.at[k]) * widen(x.at[k]);
    });
    return 1.0f / sqrtf(over_block(sum, 0.0f, Plus{}) / float(d) + epsilon);
}

template <class E>
__device__ __forceinline__ void rms_norm(const E *x_nd, const E *weight_d, E *y_nd, i64 d, float epsilon) {
    i64 row = i64(blockIdx.x) * d;
    bool wide = wide_rows<E>(d) && aligned(x_nd) && aligned(weight_d) && aligned(y_nd);
    float r = inverse_rms(x_nd + row, d, wide, epsilon);
    each<E>(d, wide, threadIdx.x, blockDim.x, [&](auto count, i64 i) {
        constexpr int N = decltype(count)::value;
        auto x = load<N>(x_nd + row + i), w = load<N>(weight_d + i);
        for (int k = 0; k < N; k++)
            x.at[k] = rounded<E>(widen(rounded<E>(widen(x.at[k]) * r)) * widen(w.at[k]));
        store(y_nd + row + i, x);
    });
}

// passed_by_nd may be null.
template <class E>
__device__ __forceinline__ void rms_norm_backward(const E *x_nd, const E *weight_d, const E *d_y_nd,
                                                  const E *passed_by_nd, E *d_x_nd, i64 d, float epsilon) {
    i64 row = i64(blockIdx.x) * d;
    bool wide = wide_rows<E>(d) && aligned(x_nd) && aligned(weight_d) && aligned(d_y_nd) && aligned(passed_by_nd) &&
                aligned(d_x_nd);
    float squares = 0, products = 0;
    each<E>(d, wide, threadIdx.x, blockDim.x, [&](auto count, i64 i) {
        constexpr int N = decltype(count)::value;
        auto x = load<N>(x_nd + row + i), w = load<N>(weight_d + i), d_y = load<N>(d_y_nd + row + i);
        for (int k = 0; k < N; k++) {
            squares += widen(x.at[k]) * widen(x.at[k]);
            products += widen(d_y.at[k]) * widen(w.at[k]) * widen(x.at[k]);
        }
    });
    float r = 1.0f / sqrtf(over_block(squares, 0.0f, Plus{}) / float(d) + epsilon);
    float projection = over_block(products, 0.0f, Plus{}) / float(d) * r * r * r;
    each<E>(d, wide, threadIdx.x, blockDim.x, [&](auto count, i64 i) {
        constexpr int N = decltype(count)::value;
        auto x = load<N>(x_nd + row + i), w = load<N>(weight_d + i), d_y = load<N>(d_y_nd + row + i);
        Pack<E, N> passed_by;
        if (passed_by_nd)
            passed_by = load<N>(passed_by_nd + row + i);
        for (int k = 0; k < N; k++) {
            float of_norm = widen(d_y.at[k]) * widen(w.at[k]) * r - widen(x.at[k]) * projection;
            // The sum is rounded once.
            x.at[k] = rounded<E>(passed_by_nd ? widen(passed_by.at[k]) + of_norm : of_norm);
        }
        store(d_x_nd + row + i, x);
    });
}

template <class E> __device__ __forceinline__ void inverse_rms_rows(const E *x_nd, float *r_n, i64 d, float epsilon) {
    bool wide = wide_rows<E>(d) && aligned(x_nd);
    float r = inverse_rms(x_nd + i64(blockIdx.x) * d, d, wide, epsilon);
    if (threadIdx.x == 0)
        r_n[blockIdx.x] = r;
}

// Block (x, y) sums rows y, y + blocks, … of a thread's column; column_sums adds what the blocks found, in order.
template <class E>
__device__ __forceinline__ void rms_norm_weight(const E *x_nd, const E *d_y_nd, const float *r_n, float *partial_bd, i64 n,
                                                i64 d) {
    i64 column = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (column >= d)
        return;
    float sum = 0;
    for (i64 row = blockIdx.y; row < n; row += gridDim.y)
        sum += widen(d_y_nd[row * d + column]) * (widen(x_nd[row * d + column]) * r_n[row]);
    partial_bd[blockIdx.y * d + column] = sum;
}

KERNEL column_sums_f32(const float *partial_bd, float *sum_d, i64 b, i64 d) {
    i64 column = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (column >= d)
        return;
    float sum = 0;
    for (i64 row = 0; row < b; row++)
        sum += partial_bd[row * d + column];
    sum_d[column] = sum;
}

KERNEL rms_norm_f32(const float *x_nd, const float *weight_d, float *y_nd, i64 d, float epsilon) {
    rms_norm(x_nd, weight_d, y_nd, d, epsilon);
}
KERNEL rms_norm_bf16(const bf16 *x_nd, const bf16 *weight_d, bf16 *y_nd, i64 d, float epsilon) {
    rms_norm(x_nd, weight_d, y_nd, d, epsilon);
}
KERNEL rms_norm_backward_f32(const float *x_nd, const float *weight_d, const float *d_y_nd, const float *passed_by_nd,
                             float *d_x_nd, i64 d, float epsilon) {
    rms_norm_backward(x_nd, weight_d, d_y_nd, passed_by_nd, d_x_nd, d, epsilon);
}
KERNEL rms_norm_backward_bf16(const bf16 *x_nd, const bf16 *weight_d, const bf16 *d_y_nd, const bf16 *passed_by_nd,
                              bf16 *d_x_nd, i64 d, float epsilon) {
    rms_norm_backward(x_nd, weight_d, d_y_nd, passed_by_nd, d_x_nd, d, epsilon);
}
KERNEL inverse_rms_rows_f32(const float *x_nd, float *r_n, i64 d, float epsilon) {
    inverse_rms_rows(x_nd, r_n, d, epsilon);
}
KERNEL inverse_rms_rows_bf16(const bf16 *x_nd, float *r_n, i64 d, float epsilon) {
    inverse_rms_rows(x_nd, r_n, d, epsilon);
}
KERNEL rms_norm_weight_f32(const float *x_nd, const float *d_y_nd, const float *r_n, float *partial_bd, i64 n, i64 d) {
    rms_norm_weight(x_nd, d_y_nd, r_n, partial_bd, n, d);
}
KERNEL rms_norm_weight_bf16(const bf16 *x_nd, const bf16 *d_y_nd, const float *r_n, float *partial_bd, i64 n, i64 d) {
    rms_norm_weight(x_nd, d_y_nd, r_n, partial_bd, n, d);
}

// ---- LayerNorm: a block a row

struct Moments {
    float mean, r;
};

template <class E> __device__ __forceinline__ Moments moments(const E *x_d, i64 d, bool wide, float epsilon) {
    float sum = 0;
    each<E>(d, wide, threadIdx.x, blockDim.x, [&](auto count, i64 i) {
        constexpr int N = decltype(count)::value;
        auto x = load<N>(x_d + i);
        for (int k = 0; k < N; k++)
            sum += widen(x.at[k]);
    });
    float mean = over_block(sum, 0.0f, Plus{}) / float(d), squares = 0;
    each<E>(d, wide, threadIdx.x, blockDim.x, [&](auto count, i64 i) {
        constexpr int N = decltype(count)::value;
        auto x = load<N>(x_d + i);
        for (int k = 0; k < N; k++)
            squares += (widen(x.at[k]) - mean) * (widen(x.at[k]) - mean);
    });
    return {mean, 1.0f / sqrtf(over_block(squares, 0.0f, Plus{}) / float(d) + epsilon)};
}

template <class E>
__device__ __forceinline__ void layer_norm(const E *x_nd, const E *weight_d, const E *bias_d, E *y_nd, i64 d, float epsilon) {
    i64 row = i64(blockIdx.x) * d;
    bool wide = wide_rows<E>(d) && aligned(x_nd) && aligned(weight_d) && aligned(bias_d) && aligned(y_nd);
    Moments m = moments(x_nd + row, d, wide, epsilon);
    each<E>(d, wide, threadIdx.x, blockDim.x, [&](auto count, i64 i) {
        constexpr int N = decltype(count)::value;
        auto x = load<N>(x_nd + row + i), w = load<N>(weight_d + i), b = load<N>(bias_d + i);
        for (int k = 0; k < N; k++)
            x.at[k] = rounded<E>((widen(x.at[k]) - m.mean) * m.r * widen(w.at[k]) + widen(b.at[k]));
        store(y_nd + row + i, x);
    });
}

// passed_by_nd may be null.
template <class E>
__device__ __forceinline__ void layer_norm_backward(const E *x_nd, const E *weight_d, const E *d_y_nd,
                                                    const E *passed_by_nd, E *d_x_nd, i64 d, float epsilon) {
    i64 row = i64(blockIdx.x) * d;
    bool wide = wide_rows<E>(d) && aligned(x_nd) && aligned(weight_d) && aligned(d_y_nd) && aligned(passed_by_nd) &&
                aligned(d_x_nd);
    Moments m = moments(x_nd + row, d, wide, epsilon);
    float sums = 0, products = 0;
    each<E>(d, wide, threadIdx.x, blockDim.x, [&](auto count, i64 i) {
        constexpr int N = decltype(count)::value;
        auto x = load<N>(x_nd + row + i), w = load<N>(weight_d + i), d_y = load<N>(d_y_nd + row + i);
        for (int k = 0; k < N; k++) {
            float g = widen(d_y.at[k]) * widen(w.at[k]);
            sums += g;
            products += g * ((widen(x.at[k]) - m.mean) * m.r);
        }
    });
    float mean_g = over_block(sums, 0.0f, Plus{}) / float(d);
    float projection = over_block(products, 0.0f, Plus{}) / float(d);
    each<E>(d, wide, threadIdx.x, blockDim.x, [&](auto count, i64 i) {
        constexpr int N = decltype(count)::value;
        auto x = load<N>(x_nd + row + i), w = load<N>(weight_d + i), d_y = load<N>(d_y_nd + row + i);
        Pack<E, N> passed_by;
        if (passed_by_nd)
            passed_by = load<N>(passed_by_nd + row + i);
        for (int k = 0; k < N; k++) {
            float z = (widen(x.at[k]) - m.mean) * m.r;
            float of_norm = (widen(d_y.at[k]) * widen(w.at[k]) - mean_g - z * projection) * m.r;
            // The sum is rounded once.
            x.at[k] = rounded<E>(passed_by_nd ? widen(passed_by.at[k]) + of_norm : of_norm);
        }
        store(d_x_nd + row + i, x);
    });
}

KERNEL layer_norm_f32(const float *x_nd, const float *weight_d, const float *bias_d, float *y_nd, i64 d, float epsilon) {
    layer_norm(x_nd, weight_d, bias_d, y_nd, d, epsilon);
}
KERNEL layer_norm_bf16(const bf16 *x_nd, const bf16 *weight_d, const bf16 *bias_d, bf16 *y_nd, i64 d, float epsilon) {
    layer_norm(x_nd, weight_d, bias_d, y_nd, d, epsilon);
}
KERNEL layer_norm_backward_f32(const float *x_nd, const float *weight_d, const float *d_y_nd, const float *passed_by_nd,
                               float *d_x_nd, i64 d, float epsilon) {
    layer_norm_backward(x_nd, weight_d, d_y_nd, passed_by_nd, d_x_nd, d, epsilon);
}
KERNEL layer_norm_backward_bf16(const bf16 *x_nd, const bf16 *weight_d, const bf16 *d_y_nd, const bf16 *passed_by_nd,
                                bf16 *d_x_nd, i64 d, float epsilon) {
    layer_norm_backward(x_nd, weight_d, d_y_nd, passed_by_nd, d_x_nd, d, epsilon);
}

// ---- SwiGLU: a thread a few elements

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

__device__ __forceinline__ i64 thread_of_all() { return i64(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ __forceinline__ i64 all_threads() { return i64(gridDim.x) * blockDim.x; }

template <class E> __device__ __forceinline__ void swiglu(const E *gate_n, const E *up_n, E *y_n, i64 n) {
    bool wide = aligned(gate_n) && aligned(up_n) && aligned(y_n);
    each<E>(n, wide, thread_of_all(), all_threads(), [&](auto count, i64 i) {
        constexpr int N = decltype(count)::value;
        auto gate = load<N>(gate_n + i), up = load<N>(up_n + i);
        for (int k = 0; k < N; k++) {
            float x = widen(gate.at[k]);
            gate.at[k] = rounded<E>(x * sigmoid(x) * widen(up.at[k]));
        }
        store(y_n + i, gate);
    });
}

template <class E>
__device__ __forceinline__ void swiglu_backward(const E *gate_n, const E *up_n, const E *d_y_n, E *d_gate_n, E *d_up_n,
                                                i64 n) {
    bool wide = aligned(gate_n) && aligned(up_n) && aligned(d_y_n) && aligned(d_gate_n) && aligned(d_up_n);
    each<E>(n, wide, thread_of_all(), all_threads(), [&](auto count, i64 i) {
        constexpr int N = decltype(count)::value;
        auto gate = load<N>(gate_n + i), up = load<N>(up_n + i), d_y = load<N>(d_y_n + i);
        for (int k = 0; k < N; k++) {
            float x = widen(gate.at[k]), u = widen(up.at[k]), d = widen(d_y.at[k]);
            float s = sigmoid(x);
            gate.at[k] = rounded<E>(d * u * (s * (1.0f + x * (1.0f - s))));
            up.at[k] = rounded<E>(d * (x * s));
        }
        store(d_gate_n + i, gate);
        store(d_up_n + i, up);
    });
}

KERNEL swiglu_f32(const float *gate_n, const float *up_n, float *y_n, i64 n) { swiglu(gate_n, up_n, y_n, n); }
KERNEL swiglu_bf16(const bf16 *gate_n, const bf16 *up_n, bf16 *y_n, i64 n) { swiglu(gate_n, up_n, y_n, n); }
KERNEL swiglu_backward_f32(const float *gate_n, const float *up_n, const float *d_y_n, float *d_gate_n, float *d_up_n,
                           i64 n) {
    swiglu_backward(gate_n, up_n, d_y_n, d_gate_n, d_up_n, n);
}
KERNEL swiglu_backward_bf16(const bf16 *gate_n, const bf16 *up_n, const bf16 *d_y_n, bf16 *d_gate_n, bf16 *d_up_n, i64 n) {
    swiglu_backward(gate_n, up_n, d_y_n, d_gate_n, d_up_n, n);
}

// ---- Rotary positions: a thread a few pairs (i, i + half) of one head

template <class E>
__device__ __forceinline__ void rotate(E *x_nhd, const float *cos_th, const float *sin_th, i64 n, i64 time, i64 heads,
                                       i64 half, float direction) {
    // Of a head's first half, so many pairs at once.
    bool wide = half % WIDE<E> == 0 && aligned(x_nhd) && aligned(cos_th) && aligned(sin_th);
    i64 pairs = n * heads * half;
    each<E>(pairs, wide, thread_of_all(), all_threads(), [&](auto count, i64 i) {
        constexpr int N = decltype(count)::value;
        i64 head = i / half, pair = i % half, position = head / heads % time;
        E *first = x_nhd + head * 2 * half + pair, *second = first + half;
        auto a = load<N>(first), b = load<N>(second);
        for (int k = 0; k < N; k++) {
            float c = cos_th[position * half + pair + k], s = sin_th[position * half + pair + k] * direction;
            float x = widen(a.at[k]), y = widen(b.at[k]);
            a.at[k] = rounded<E>(x * c - y * s);
            b.at[k] = rounded<E>(y * c + x * s);
        }
        store(first, a);
        store(second, b);
    });
}

KERNEL rotate_f32(float *x_nhd, const float *cos_th, const float *sin_th, i64 n, i64 time, i64 heads, i64 half,
                  float direction) {
    rotate(x_nhd, cos_th, sin_th, n, time, heads, half, direction);
}
KERNEL rotate_bf16(bf16 *x_nhd, const float *cos_th, const float *sin_th, i64 n, i64 time, i64 heads, i64 half,
                   float direction) {
    rotate(x_nhd, cos_th, sin_th, n, time, heads, half, direction);
}

// ---- Cross-entropy: a block a row

// The largest x of a row and Σ exp(x − largest), kept up as the row is read.
struct Sum {
    float most = -infinite(), sum = 0;
    template <int N> __device__ __forceinline__ void add(const float (&x)[N]) {
        float larger = most;
        for (int k = 0; k < N; k++)
            larger = x[k] > larger ? x[k] : larger;
        if (larger > most) {
            sum *= expf(most - larger);
            most = larger;
        }
        for (int k = 0; k < N; k++)
            sum += __expf(x[k] - most);
    }
};

// As `each` over one row that may begin anywhere: single elements up to a multiple of 16 bytes, wide ones, a rest.
template <class E, class F> __device__ __forceinline__ void each_of_row(E *row, i64 v, F f) {
    i64 before = (16 - (u64)row % 16) % 16 / sizeof(E);
    if (before > v)
        before = v;
    if (threadIdx.x < before)
        f(Count<1>{}, threadIdx.x);
    each<E>(v - before, true, threadIdx.x, blockDim.x, [&](auto count, i64 i) { f(count, before + i); });
}

template <class E> __device__ __forceinline__ double log_sum_exp(const E *row, i64 v) {
    Sum mine;
    each_of_row(row, v, [&](auto count, i64 i) {
        constexpr int N = decltype(count)::value;
        auto pack = load<N>(row + i);
        float x[N];
        for (int k = 0; k < N; k++)
            x[k] = widen(pack.at[k]);
        mine.add(x);
    });
    float most = over_block(mine.most, -infinite(), Larger{});
    // A thread that read nothing has nothing to add: its exponential is 0, unless all are −∞.
    float share = mine.sum == 0 ? 0 : mine.sum * expf(mine.most - most);
    return double(most) + log(double(over_block(share, 0.0f, Plus{})));
}

// What cannot be computed must be seen: a target outside the row makes the loss no number.
template <class E> __device__ __forceinline__ float logit_at(const E *row, i64 target, i64 v) {
    return target >= 0 && target < v ? widen(row[target]) : infinite() - infinite();
}

// The first `v` of a row of `width` are logits, which become their gradient, softmax − onehot; the rest is padding and becomes 0.
template <class E>
__device__ __forceinline__ void cross_entropy(E *logits_nv, const i64 *target_n, double *nll_n, i64 v, i64 width) {
    E *row = logits_nv + i64(blockIdx.x) * width;
    i64 target = target_n[blockIdx.x];
    double logsumexp = log_sum_exp(row, v);
    float at = logit_at(row, target, v), shift = float(logsumexp);
    // Every thread has read the target's logit before one overwrites it.
    __syncthreads();
    each_of_row(row, v, [&](auto count, i64 i) {
        constexpr int N = decltype(count)::value;
        auto pack = load<N>(row + i);
        for (int k = 0; k < N; k++) {
            float p = __expf(widen(pack.at[k]) - shift);
            pack.at[k] = rounded<E>(i + k == target ? p - 1.0f : p);
        }
        store(row + i, pack);
    });
    for (i64 i = v + threadIdx.x; i < width; i += blockDim.x)
        row[i] = rounded<E>(0.0f);
    if (threadIdx.x == 0)
        nll_n[blockIdx.x] = logsumexp - double(at);
}

template <class E>
__device__ __forceinline__ void nll(const E *logits_nv, const i64 *target_n, double *nll_n, i64 v, i64 width) {
    const E *row = logits_nv + i64(blockIdx.x) * width;
    double logsumexp = log_sum_exp(row, v);
    if (threadIdx.x == 0)
        nll_n[blockIdx.x] = logsumexp - double(logit_at(row, target_n[blockIdx.x], v));
}

KERNEL cross_entropy_f32(float *logits_nv, const i64 *target_n, double *nll_n, i64 v, i64 width) {
    cross_entropy(logits_nv, target_n, nll_n, v, width);
}
KERNEL cross_entropy_bf16(bf16 *logits_nv, const i64 *target_n, double *nll_n, i64 v, i64 width) {
    cross_entropy(logits_nv, target_n, nll_n, v, width);
}
KERNEL nll_f32(const float *logits_nv, const i64 *target_n, double *nll_n, i64 v, i64 width) {
    nll(logits_nv, target_n, nll_n, v, width);
}
KERNEL nll_bf16(const bf16 *logits_nv, const i64 *target_n, double *nll_n, i64 v, i64 width) {
    nll(logits_nv, target_n, nll_n, v, width);
}

// ---- Dropout: a function of (key of the row, element), as random.rs computes it

__device__ __forceinline__ u64 mixed(u64 z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

// Elements start … start + d − 1: 0 where the random bits of (key, element) are below `threshold`, else `kept`.
template <class E>
__device__ __forceinline__ void dropout(E *mask, i64 start, i64 d, u64 key, u64 threshold, float kept) {
    mask += start;
    each<E>(d, aligned(mask), thread_of_all(), all_threads(), [&](auto count, i64 i) {
        constexpr int N = decltype(count)::value;
        Pack<E, N> pack;
        for (int k = 0; k < N; k++) {
            u64 bits = mixed(key + (u64(i + k) + 1) * 0x9e3779b97f4a7c15ull);
            pack.at[k] = rounded<E>(bits < threshold ? 0.0f : kept);
        }
        store(mask + i, pack);
    });
}

KERNEL dropout_f32(float *mask, i64 start, i64 d, i64 key, i64 threshold, float kept) {
    dropout(mask, start, d, u64(key), u64(threshold), kept);
}
KERNEL dropout_bf16(bf16 *mask, i64 start, i64 d, i64 key, i64 threshold, float kept) {
    dropout(mask, start, d, u64(key), u64(threshold), kept);
}

// ---- FP8 (E4M3: 4 bits of exponent, 3 of mantissa, no infinity): a block a row

// Rounded to nearest, ties to even; beyond 448 the largest; NaN stays.
__device__ __forceinline__ unsigned char to_e4m3(float x) {
    u32 bits = __float_as_uint(x), sign = bits >> 24 & 0x80, size = bits & 0x7fffffff;
    if (size > 0x7f800000)
        return 0x7f;
    if (size >= 0x43e80000) // 464, halfway between 448 and what would be next
        return sign | 0x7e;
    if (size < 0x3c800000) { // 2⁻⁶: below it steps are of 2⁻⁹. Adding 2¹⁴ leaves whole steps in the last bits.
        float whole = __uint_as_float(size) + 16384.0f;
        return sign | (__float_as_uint(whole) - 0x46800000);
    }
    u32 rounded_up = size + 0x7ffff + (size >> 20 & 1);
    return sign | ((rounded_up >> 20) - ((127 - 7) << 3));
}

// x_nd = scale_n · y_nd, with the largest of each row at 448.
template <class E>
__device__ __forceinline__ void quantize_rows(const E *x_nd, unsigned char *y_nd, float *scale_n, i64 d) {
    i64 row = i64(blockIdx.x) * d;
    // A pack of outputs is a quarter or a half as wide; rows are multiples of 16 bytes of it, as FP8's GEMMs ask for.
    bool wide = d % 16 == 0 && aligned(x_nd) && aligned(y_nd);
    float most = 0;
    each<E>(d, wide, threadIdx.x, blockDim.x, [&](auto count, i64 i) {
        constexpr int N = decltype(count)::value;
        auto x = load<N>(x_nd + row + i);
        for (int k = 0; k < N; k++)
            most = Larger{}(most, fabsf(widen(x.at[k])));
    });
    most = over_block(most, 0.0f, Larger{});
    float scale = most > 0 || most != most ? most / 448.0f : 1.0f;
    each<E>(d, wide, threadIdx.x, blockDim.x, [&](auto count, i64 i) {
        constexpr int N = decltype(count)::value;
        auto x = load<N>(x_nd + row + i);
        Pack<unsigned char, N> y;
        for (int k = 0; k < N; k++)
            y.at[k] = to_e4m3(widen(x.at[k]) / scale);
        store(y_nd + row + i, y);
    });
    if (threadIdx.x == 0)
        scale_n[blockIdx.x] = scale;
}

KERNEL quantize_rows_f32(const float *x_nd, unsigned char *y_nd, float *scale_n, i64 d) {
    quantize_rows(x_nd, y_nd, scale_n, d);
}
KERNEL quantize_rows_bf16(const bf16 *x_nd, unsigned char *y_nd, float *scale_n, i64 d) {
    quantize_rows(x_nd, y_nd, scale_n, d);
}
