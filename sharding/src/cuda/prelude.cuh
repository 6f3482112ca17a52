// What every file of kernels begins with: element types, wide loads, sums over a block. No header of CUDA's is needed,
// so that NVRTC compiles it wherever NVRTC is. Arithmetic is in f32 whatever the elements are.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// The compiler uses no more registers than blocks of 1,024 threads may have.
#define KERNEL extern "C" __global__ __launch_bounds__(1024) void

__device__ __forceinline__ float infinite() { return __uint_as_float(0x7f800000u); }

// The upper half of an f32.
struct bf16 {
    unsigned short bits;
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __uint_as_float(u32(x.bits) << 16); }

template <class E> __device__ __forceinline__ E rounded(float x);
template <> __device__ __forceinline__ float rounded<float>(float x) { return x; }
// To nearest, ties to even.
template <> __device__ __forceinline__ bf16 rounded<bf16>(float x) {
    bf16 y;
#ifdef __CUDA_ARCH__
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
    u32 bits = __float_as_uint(x);
    y.bits = (unsigned short)(x != x ? 0x7fff : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
#endif
    return y;
}

// The largest number of elements that one load moves.
template <class E> constexpr int WIDE = 16 / sizeof(E);

// N elements that are moved as one.
template <class E, int N> struct alignas(N * sizeof(E)) Pack {
    E at[N];
};

template <int N, class E> __device__ __forceinline__ Pack<E, N> load(const E *from) {
    return *reinterpret_cast<const Pack<E, N> *>(from);
}
template <int N, class E> __device__ __forceinline__ void store(E *to, Pack<E, N> pack) {
    *reinterpret_cast<Pack<E, N> *>(to) = pack;
}

// A number that is known when the kernel is compiled.
template <int N> struct Count {
    static constexpr int value = N;
};

__device__ __forceinline__ bool aligned(const void *memory) { return (u64)memory % 16 == 0; }

// f(Count<N>, i) for stretches of N elements from i on that together are 0 … n − 1, dealt to `threads` of which this is
// number `thread`: wide ones and a rest if `wide`, else single elements.
template <class E, class F>
__device__ __forceinline__ void each(i64 n, bool wide, i64 thread, i64 threads, F f) {
    constexpr int N = WIDE<E>;
    i64 in_packs = wide ? n / N * N : 0;
    for (i64 i = thread * N; i < in_packs; i += threads * N)
        f(Count<N>{}, i);
    for (i64 i = in_packs + thread; i < n; i += threads)
        f(Count<1>{}, i);
}

// How two values become one, over all threads of a block.
struct Plus {
    __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
    __device__ __forceinline__ double operator()(double a, double b) const { return a + b; }
    __device__ __forceinline__ u64 operator()(u64 a, u64 b) const { return a + b; }
};
struct Larger {
    // What is no number stays.
    __device__ __forceinline__ float operator()(float a, float b) const { return a >= b || a != a ? a : b; }
};

// `value` of all threads of the block combined, the same in every thread and in a fixed order. Blocks are multiples of 32
// threads; `none` changes nothing it is combined with. May be called again at once.
template <class T, class How> __device__ __forceinline__ T over_block(T value, T none, How how) {
    __shared__ T of_warp[32];
    for (int lanes = 16; lanes > 0; lanes /= 2)
        value = how(value, __shfl_xor_sync(0xffffffffu, value, lanes));
    __syncthreads();
    if (threadIdx.x % 32 == 0)
        of_warp[threadIdx.x / 32] = value;
    __syncthreads();
    value = threadIdx.x % 32 < blockDim.x / 32 ? of_warp[threadIdx.x % 32] : none;
    for (int lanes = 16; lanes > 0; lanes /= 2)
        value = how(value, __shfl_xor_sync(0xffffffffu, value, lanes));
    return value;
}
