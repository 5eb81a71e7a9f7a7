// Products of warpgroups. They read shared memory at the wait that covers them, or earlier by chance; until then
// the accumulators are kept here, and are NaN in the threads' registers.

#include "worker.h"

#include <algorithm>
#include <cstring>

namespace emu {

// Sides in shared memory

/// Where dynamic shared memory starts in a device's addresses: the driver keeps 1 KiB for itself.
constexpr uint32_t ORIGIN = 1024;

uint32_t shared_address(const void* p) {
    const Running& block = running(self());
    const auto* at = static_cast<const unsigned char*>(p);
    if (at < block.origin || at > block.origin + SHARED_SLOT) fail("an address for a descriptor is outside the dynamic shared memory");
    return ORIGIN + uint32_t(at - block.origin);
}

/// A side of a product: `rows` of A or columns of B.
struct Side {
    uint32_t start, leading, stride;
    bool along_k;
    unsigned rows;
    Side(uint64_t bits, bool along_k, unsigned rows)
        : start((bits & 0x3fff) << 4), leading((bits >> 16 & 0x3fff) << 4), stride((bits >> 32 & 0x3fff) << 4),
          along_k(along_k), rows(rows) {
        // What lies between and above the fields, the base offset, and another swizzle than of 128 bytes.
        constexpr uint64_t OTHERS = ~(0x3fffull | 0x3fffull << 16 | 0x3fffull << 32);
        if ((bits & OTHERS) != 1ull << 62) fail("a descriptor is not of the 128-byte swizzle, or has bits outside its fields");
        if (!stride || (!along_k && rows > 64 && !leading)) fail("a descriptor has no stride");
    }
    /// The chunk of 16 bytes `column` of line `line`, for a side along k: k / 8 of a row; across: row / 8 of a k.
    uint32_t chunk(unsigned line, unsigned column) const {
        uint32_t at = start + line % 8 * 128 + line / 8 * stride + column % 8 * 16 + column / 8 * leading;
        return at ^ ((at >> 7 & 7) << 4);
    }
};

static void read_chunk(const Running& block, uint32_t address, float (&v)[8]) {
    const unsigned char* p = block.origin + (address - ORIGIN);
    uint16_t bits[8];
    memcpy(bits, p, 16);
    for (unsigned i = 0; i < 8; i++) {
        uint32_t word = uint32_t(bits[i]) << 16;
        memcpy(&v[i], &word, 4);
    }
}

/// to[k][row], or to[row][k] where `ROWS_FIRST`.
template <bool ROWS_FIRST>
static void read_side(const Running& block, const Side& s, float* to) {
    unsigned lines = s.along_k ? s.rows : 16, columns = s.along_k ? 2 : s.rows / 8;
    // All lies between these two.
    uint32_t first = s.start & ~127u, last = first + (lines - 1) / 8 * s.stride + 8 * 128 + (columns - 1) / 8 * s.leading;
    uint32_t begin = ORIGIN + uint32_t(block.dynamic - block.origin), end = begin + self().worker->launch->dynamic;
    if (first < begin || last > end) fail("a descriptor's side is not within the dynamic shared memory");
    for (unsigned line = 0; line < lines; line++) {
        for (unsigned column = 0; column < columns; column++) {
            float v[8];
            read_chunk(block, s.chunk(line, column), v);
            // A chunk is 8 k of a row, or 8 rows of a k.
            bool together = s.along_k == ROWS_FIRST;
            unsigned pitch = ROWS_FIRST ? 16 : s.rows;
            float* at = together ? to + line * pitch + column * 8 : to + column * 8 * pitch + line;
            for (unsigned i = 0; i < 8; i++) at[together ? i : i * pitch] = v[i];
        }
    }
}

// Sums

/// d (64 x columns) += a (64 x 16) b (16 x columns), for every element in the order of k, without contraction: the same
/// bits with whatever instructions there are. A macro, since vectors in a function that is inlined keep its target.
#define HYWU_SUM(NAME, TARGET, LANES)                                                                                     \
    typedef float NAME##_vector __attribute__((vector_size(LANES * 4), aligned(4)));                                      \
    TARGET static void NAME(float* d, const float* a, const float* b, unsigned columns) {                                 \
        using Lanes = NAME##_vector;                                                                                      \
        constexpr unsigned ROWS = 4;                                                                                      \
        for (unsigned n = 0; n < columns; n += 2 * LANES) {                                                               \
            for (unsigned m = 0; m < 64; m += ROWS) {                                                                     \
                Lanes s[ROWS][2];                                                                                         \
                float* to = d + m * columns + n;                                                                          \
                _Pragma("GCC unroll 8") for (unsigned i = 0; i < 2 * ROWS; i++) {                                         \
                    s[i / 2][i % 2] = *reinterpret_cast<const Lanes*>(to + i / 2 * columns + i % 2 * LANES);              \
                }                                                                                                         \
                for (unsigned k = 0; k < 16; k++) {                                                                       \
                    const Lanes* right = reinterpret_cast<const Lanes*>(b + k * columns + n);                             \
                    _Pragma("GCC unroll 8") for (unsigned i = 0; i < 2 * ROWS; i++) {                                     \
                        s[i / 2][i % 2] += a[(m + i / 2) * 16 + k] * right[i % 2];                                        \
                    }                                                                                                     \
                }                                                                                                         \
                _Pragma("GCC unroll 8") for (unsigned i = 0; i < 2 * ROWS; i++) {                                         \
                    *reinterpret_cast<Lanes*>(to + i / 2 * columns + i % 2 * LANES) = s[i / 2][i % 2];                    \
                }                                                                                                         \
            }                                                                                                             \
        }                                                                                                                 \
    }
HYWU_SUM(sum_512, __attribute__((target("avx512f"))), 16)
HYWU_SUM(sum_256, __attribute__((target("avx2"))), 8)
HYWU_SUM(sum_128, , 4)
#undef HYWU_SUM

static void run(const Running& block, const Product& p) {
    static const bool has_512 = __builtin_cpu_supports("avx512f"), has_256 = __builtin_cpu_supports("avx2");
    const auto best = has_512 && p.columns % 32 == 0 ? sum_512 : has_256 && p.columns % 16 == 0 ? sum_256 : sum_128;
    alignas(64) float a[64 * 16], b[16 * 256];
    if (p.rows.empty()) read_side<true>(block, Side(p.a, p.a_along_k, 64), a);
    else std::copy(p.rows.begin(), p.rows.end(), a);
    read_side<false>(block, Side(p.b, p.b_along_k, p.columns), b);
    float* d = p.tile->values;
    if (!p.add) std::fill_n(d, 64 * p.columns, 0.0f);
    best(d, a, b, p.columns);
}

/// Does the products before this number, as far as all threads have come to them.
static bool run_until(const Running& block, Warpgroup& g, uint64_t end) {
    while (g.done < end) {
        if (g.products.empty() || g.products.front().issued < WARPGROUP) return false;
        run(block, g.products.front());
        g.products.pop_front();
        g.done++;
    }
    return true;
}

// Accumulators

/// Calls f(element of the tile, register) for the registers of a thread, in pairs.
template <class F>
static void for_each_register(Tile& tile, unsigned thread, float* d, F f) {
    unsigned row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
    for (unsigned i = 0; i < tile.columns / 2; i += 2) {
        f(tile.values + (row + i % 4 * 4) * tile.columns + i / 4 * 8 + column, d + i);
    }
}

void Warpgroup::clear() {
    products.clear();
    waiting.clear();
    done = 0;
    for (auto& tile : tiles) {
        memset(tile->d, 0, sizeof tile->d);
        tile->holders = 0;
    }
}

static void take(Tile& tile, unsigned thread, float* d, bool add) {
    constexpr size_t PAIR = 2 * sizeof(float);
    if (add) for_each_register(tile, thread, d, [](float* to, float* from) { memcpy(to, from, PAIR); });
    memset(d, 0xff, tile.columns / 2 * sizeof(float));
    tile.d[thread] = d;
    tile.holders++;
}

static void give_back(Tile& tile, unsigned thread) {
    constexpr size_t PAIR = 2 * sizeof(float);
    float* d = tile.d[thread];
    for_each_register(tile, thread, d, [](float* from, float* to) {
        uint64_t now;
        memcpy(&now, to, PAIR);
        if (~now) fail("accumulators were written while products added to them");
        memcpy(to, from, PAIR);
    });
    tile.d[thread] = nullptr;
    tile.holders--;
}

/// The tile that has these registers of the thread, or else an unused one.
static Tile* find_tile(Warpgroup& g, unsigned thread, const float* d) {
    for (auto& tile : g.tiles) {
        if (tile->d[thread] == d) return tile.get();
    }
    for (auto& tile : g.tiles) {
        if (!tile->holders) return tile.get();
    }
    auto* made = new Tile;
    memset(made->d, 0, sizeof made->d);
    made->holders = 0;
    g.tiles.emplace_back(made);
    return made;
}

// By threads

static Warpgroup& warpgroup(unsigned& thread) {
    Thread& t = self();
    Running& block = running(t);
    unsigned number = t.number / WARPGROUP, count = t.worker->block_threads / WARPGROUP;
    if (number >= count) fail("a product by threads that are no whole warpgroup");
    thread = t.number % WARPGROUP;
    return block.warpgroups[number];
}

/// Puts a thread's registers of A among the rows: those of mma_m16n8k16, in the warp's 16 rows.
static void put_rows(Product& product, unsigned thread, const uint32_t* words) {
    unsigned row = thread / 32 * 16 + thread % 32 / 4, k = thread % 4 * 2;
    for (unsigned i = 0; i < 4; i++) {
        float* to = &product.rows[(row + i % 2 * 8) * 16 + k + i / 2 * 8];
        uint32_t low = words[i] << 16, high = words[i] & 0xffff0000;
        memcpy(to, &low, 4), memcpy(to + 1, &high, 4);
    }
}

/// `words`: A where it is in registers, in place of `a`.
static void issue(float* d, unsigned columns, bool a_along_k, bool b_along_k, uint64_t a, const uint32_t* words, uint64_t b, bool add) {
    Pending& p = pending();
    unsigned thread;
    Warpgroup& g = warpgroup(thread);
    uint64_t number = p.products++;
    if (number - g.done == g.products.size()) {
        Tile* tile = find_tile(g, thread, d);
        if (!tile->holders) tile->columns = columns;
        g.products.push_back({a, b, columns, a_along_k, b_along_k, add, 0, tile, std::vector<float>(words ? 64 * 16 : 0)});
    }
    Product& product = g.products[number - g.done];
    if (product.a != a || product.b != b || product.columns != columns || product.a_along_k != a_along_k ||
        product.b_along_k != b_along_k || product.add != add || product.rows.empty() != !words) {
        fail("threads of a warpgroup give different operands of a product");
    }
    if (words) {
        put_rows(product, thread, words);
        p.readings.push_back({words, {words[0], words[1], words[2], words[3]}, number});
    }
    Tile& tile = *product.tile;
    if (!tile.d[thread]) take(tile, thread, d, add);
    if (tile.d[thread] != d || tile.columns != columns) fail("products under way overlap in their accumulators");
    tile.last[thread] = number + 1;
    if (++product.issued < WARPGROUP) return;
    for (size_t i = 0; i < g.waiting.size();) {
        Thread* other = g.waiting[i];
        if (other->worker->pending[size_t(other - other->worker->thread.data())].wanted > number + 1) {
            i++;
            continue;
        }
        wake(*other);
        g.waiting[i] = g.waiting.back();
        g.waiting.pop_back();
    }
    if (chance(*self().worker, 4)) run_until(running(self()), g, number + 1);
}

void multiply(float* d, unsigned columns, bool a_along_k, bool b_along_k, uint64_t a, uint64_t b, bool add) {
    issue(d, columns, a_along_k, b_along_k, a, nullptr, b, add);
}

void multiply(float* d, unsigned columns, bool b_along_k, const uint32_t* a, uint64_t b, bool add) {
    issue(d, columns, true, b_along_k, 0, a, b, add);
}

void multiply_commit() {
    Pending& p = pending();
    p.product_groups.push_back(p.products);
    maybe_yield();
}

void multiply_wait(unsigned left) {
    Thread& t = self();
    Pending& p = pending();
    unsigned thread;
    Warpgroup& g = warpgroup(thread);
    if (p.product_groups.size() <= left) return;
    auto last = p.product_groups.end() - std::ptrdiff_t(left);
    p.wanted = last[-1];
    p.product_groups.erase(p.product_groups.begin(), last);
    maybe_yield();
    if (!run_until(running(t), g, p.wanted)) {
        g.waiting.push_back(&t);
        t.state = State::Products;
        yield(t);
        run_until(running(t), g, p.wanted);
    }
    for (auto& tile : g.tiles) {
        if (tile->d[thread] && tile->last[thread] <= p.wanted) give_back(*tile, thread);
    }
    auto& r = p.readings;
    auto end = std::find_if(r.begin(), r.end(), [&](const Reading& x) { return x.product >= p.wanted; });
    for (auto i = r.begin(); i != end; ++i) {
        if (memcmp(i->at, i->words, sizeof i->words) != 0) fail("registers of A were written while products read them");
    }
    r.erase(r.begin(), end);
}

} // namespace emu
