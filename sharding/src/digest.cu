// The sum of a tensor's scattered words; digest.rs says what it is and makes the same on a CPU.

__device__ __forceinline__ u64 scatter(u64 number, u64 word) {
    u64 x = word + number * 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

__device__ __forceinline__ u64 bits(float x) { return __float_as_uint(x); }
__device__ __forceinline__ u64 bits(bf16 x) { return x.bits; }

// Each block's share into partial_b. Words of 8 bytes; what the last one lacks is 0.
template <class E> __device__ __forceinline__ void digest(const E *x, i64 n, u64 *partial_b) {
    constexpr int N = 8 / sizeof(E);
    bool wide = (u64)x % 8 == 0;
    i64 thread = i64(blockIdx.x) * blockDim.x + threadIdx.x, threads = i64(gridDim.x) * blockDim.x;
    u64 sum = 0;
    for (i64 number = thread; number * N < n; number += threads) {
        const E *from = x + number * N;
        u64 word = 0;
        if (wide && number * N + N <= n) {
            auto pack = load<N>(from);
            for (int k = 0; k < N; k++)
                word |= bits(pack.at[k]) << (8 * sizeof(E) * k);
        } else {
            for (int k = 0; k < N && number * N + k < n; k++)
                word |= bits(from[k]) << (8 * sizeof(E) * k);
        }
        sum += scatter(u64(number), word);
    }
    sum = over_block(sum, u64(0), Plus{});
    if (threadIdx.x == 0)
        partial_b[blockIdx.x] = sum;
}

KERNEL digest_f32(const float *x, i64 n, u64 *partial_b) { digest(x, n, partial_b); }
KERNEL digest_bf16(const bf16 *x, i64 n, u64 *partial_b) { digest(x, n, partial_b); }
