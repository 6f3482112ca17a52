// CUDA's words for a C++ compiler: every thread of a block is a fibre, and they run in turn from one barrier to the next.
// What a GPU would forgive or corrupt in silence ends the program: reading outside a tensor (the sanitizers see it, for
// each tensor is an allocation of its own), and threads of a block that wait at different barriers.

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static // blocks run one after the other
#define __restrict__
#define __launch_bounds__(...)

struct Index {
    unsigned x, y, z;
};
static Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr size_t STACK = 64 << 10;

struct Fibre {
    ucontext_t context;
    // The barrier at which it waits; 0: it has ended.
    int line = 0;
};

inline std::vector<Fibre> fibres;
inline ucontext_t scheduler;
inline unsigned current;
inline void (*body)(void *);
inline void *body_argument;
inline std::vector<uint64_t> slots;

[[noreturn]] inline void stop(const char *what, long a = 0, long b = 0) {
    std::fprintf(stderr, "%s (%ld, %ld)\n", what, a, b);
    std::exit(3);
}

// Waits until every thread of the block stands at this line.
inline void barrier(int line) {
    Index mine = threadIdx;
    fibres[current].line = line;
    swapcontext(&fibres[current].context, &scheduler);
    threadIdx = mine;
}

inline void start() {
    body(body_argument);
    fibres[current].line = 0;
    swapcontext(&fibres[current].context, &scheduler);
}

inline void run_block(unsigned threads) {
    static std::vector<char> stacks;
    stacks.resize(threads * STACK);
    fibres.assign(threads, Fibre{});
    slots.assign(threads, 0);
    for (unsigned thread = 0; thread < threads; thread++) {
        ucontext_t &context = fibres[thread].context;
        getcontext(&context);
        context.uc_stack.ss_sp = stacks.data() + thread * STACK;
        context.uc_stack.ss_size = STACK;
        context.uc_link = &scheduler;
        makecontext(&context, start, 0);
    }
    do {
        for (current = 0; current < threads; current++) {
            threadIdx = {current, 0, 0};
            swapcontext(&scheduler, &fibres[current].context);
        }
        for (unsigned thread = 1; thread < threads; thread++)
            if (fibres[thread].line != fibres[0].line)
                stop("threads of a block wait at different barriers: lines", fibres[0].line, fibres[thread].line);
    } while (fibres[0].line != 0);
}

template <class T> T exchange(T value, unsigned with, int line) {
    static_assert(sizeof(T) <= 8);
    std::memcpy(&slots[current], &value, sizeof(T));
    barrier(line);
    if (with >= fibres.size())
        stop("a thread exchanges with one that is not there", current, with);
    T other;
    std::memcpy(&other, &slots[with], sizeof(T));
    barrier(line);
    return other;
}

} // namespace emulator

#define __syncthreads() emulator::barrier(__LINE__)
#define __shfl_xor_sync(mask, value, lanes)                                                                               \
    emulator::exchange(value, (emulator::current & ~31u) | ((emulator::current & 31u) ^ unsigned(lanes)), __LINE__)

inline float __uint_as_float(unsigned bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline unsigned __float_as_uint(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline float __expf(float x) { return expf(x); }

// One launch as the command line tells it: kernel, grid, block, then each argument.
struct Call {
    std::vector<std::string> words;
};

namespace emulator {

// A tensor in memory of its own, as far off a multiple of 16 as it was, read from a file and written back if it may be.
struct Tensor {
    std::string file;
    std::vector<char> bytes;
    char *memory = nullptr, *start = nullptr;

    explicit Tensor(const std::string &word) {
        if (word == "absent")
            return;
        size_t colon = word.find(':'), place = std::stoul(word.substr(0, colon));
        file = word.substr(colon + 1);
        std::ifstream in(file, std::ios::binary);
        bytes.assign(std::istreambuf_iterator<char>(in), {});
        // malloc gives multiples of 16; the end is the allocation's, so that the sanitizer sees the first byte beyond.
        memory = static_cast<char *>(std::malloc(place + bytes.size()));
        start = memory + place;
        std::memcpy(start, bytes.data(), bytes.size());
    }
    void write_back() const {
        std::ofstream out(file, std::ios::binary);
        out.write(start, std::streamsize(bytes.size()));
    }
};

template <class T> struct Holder {
    T value;
    explicit Holder(const std::string &word) {
        if constexpr (std::is_floating_point_v<T>)
            value = T(std::stod(word));
        else
            value = T(std::stoll(word));
    }
    T get() { return value; }
    void end() {}
};
template <class T> struct Holder<T *> {
    Tensor tensor;
    explicit Holder(const std::string &word) : tensor(word) {}
    T *get() { return reinterpret_cast<T *>(tensor.start); }
    void end() {
        if (!std::is_const_v<T> && tensor.start)
            tensor.write_back();
        std::free(tensor.memory);
    }
};

template <class... T, size_t... I> void launch_with(void (*kernel)(T...), const Call &call, std::index_sequence<I...>) {
    if (call.words.size() != 5 + sizeof...(T))
        stop("arguments given, and parameters", long(call.words.size()) - 5, sizeof...(T));
    std::tuple<Holder<T>...> holders(Holder<T>(call.words[5 + I])...);
    auto once = [&] { kernel(std::get<I>(holders).get()...); };
    body = [](void *it) { (*static_cast<decltype(once) *>(it))(); };
    body_argument = &once;
    gridDim = {unsigned(std::stoul(call.words[2])), unsigned(std::stoul(call.words[3])), 1};
    blockDim = {unsigned(std::stoul(call.words[4])), 1, 1};
    for (unsigned y = 0; y < gridDim.y; y++)
        for (unsigned x = 0; x < gridDim.x; x++) {
            blockIdx = {x, y, 0};
            run_block(blockDim.x);
        }
    (std::get<I>(holders).end(), ...);
}

} // namespace emulator

template <class... T> void launch(void (*kernel)(T...), const Call &call) {
    emulator::launch_with(kernel, call, std::index_sequence_for<T...>{});
}

extern const std::map<std::string, void (*)(const Call &)> KERNELS;

int main(int count, char **words) {
    Call call{{words, words + count}};
    auto kernel = KERNELS.find(call.words.at(1));
    if (kernel == KERNELS.end())
        emulator::stop(("there is no kernel " + call.words[1]).c_str());
    kernel->second(call);
}
