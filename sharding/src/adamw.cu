// AdamW over flat slices, and the sum of squares of a slice. The formulas and their sources are in adamw.rs.

struct Constants {
    float decay, step_size, v_correction, beta1, beta2, epsilon, scale;
};

template <int N> __device__ __forceinline__ void adamw_pack(
    float *theta_n, float *m_n, float *v_n, const float *g_n, i64 i, Constants c) {
    auto theta = load<N>(theta_n + i), m = load<N>(m_n + i), v = load<N>(v_n + i), g = load<N>(g_n + i);
    for (int k = 0; k < N; k++) {
        float scaled = g.at[k] * c.scale;
        m.at[k] = c.beta1 * m.at[k] + (1.0f - c.beta1) * scaled;
        v.at[k] = c.beta2 * v.at[k] + (1.0f - c.beta2) * scaled * scaled;
        float denominator = sqrtf(v.at[k]) * c.v_correction + c.epsilon;
        theta.at[k] = theta.at[k] * c.decay - c.step_size * m.at[k] / denominator;
    }
    store(theta_n + i, theta);
    store(m_n + i, m);
    store(v_n + i, v);
}

// Elements start … start + n − 1 of each array.
KERNEL adamw_f32(float *theta, float *m, float *v, const float *g, i64 start, i64 n, float decay, float step_size,
                 float v_correction, float beta1, float beta2, float epsilon, float scale) {
    theta += start, m += start, v += start, g += start;
    Constants constants = {decay, step_size, v_correction, beta1, beta2, epsilon, scale};
    bool wide = aligned(theta) && aligned(m) && aligned(v) && aligned(g);
    i64 thread = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    each<float>(n, wide, thread, i64(gridDim.x) * blockDim.x, [&](auto count, i64 i) {
        adamw_pack<decltype(count)::value>(theta, m, v, g, i, constants);
    });
}

// Σ g² of each block's share into partial_b: the same shares and the same order whatever the GPU.
KERNEL squares_f32(const float *g, i64 n, double *partial_b) {
    double sum = 0;
    i64 thread = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    each<float>(n, aligned(g), thread, i64(gridDim.x) * blockDim.x, [&](auto count, i64 i) {
        constexpr int N = decltype(count)::value;
        auto pack = load<N>(g + i);
        for (int k = 0; k < N; k++)
            sum += double(pack.at[k]) * double(pack.at[k]);
    });
    sum = over_block(sum, 0.0, Plus{});
    if (threadIdx.x == 0)
        partial_b[blockIdx.x] = sum;
}

// Σ partial_b by one block.
KERNEL total_f32(const double *partial_b, i64 n, double *sum_1) {
    double sum = 0;
    for (i64 i = threadIdx.x; i < n; i += blockDim.x)
        sum += partial_b[i];
    sum = over_block(sum, 0.0, Plus{});
    if (threadIdx.x == 0)
        sum_1[0] = sum;
}
