// Tests of Hopper's instructions, with the kernels of hopper.cu.

#include "test.h"

#include <array>
#include <chrono>
#include <cmath>

struct alignas(64) Map {
    uint64_t opaque[16];
};

static constexpr int BF16 = 9, FLOAT = 7, BYTE = 0, SWIZZLE_128 = 3;

/// All that a tensor map is made of; strides of dimensions 1 and up, in bytes.
struct Encode {
    uint64_t address;
    std::vector<uint64_t> size, stride;
    std::vector<unsigned> box;
    int type = BF16, swizzle = SWIZZLE_128;
    std::vector<unsigned> step = {1, 1, 1, 1, 1, 1};
    int interleave = 0, promotion = 2, fill = 0;
    unsigned rank() const { return unsigned(size.size()); }
    int operator()(void* map) const {
        return call("cuTensorMapEncodeTiled", map, type, rank(), reinterpret_cast<void*>(address), size.data(), stride.data(),
                    box.data(), step.data(), interleave, swizzle, promotion, fill);
    }
    Map map() const {
        Map m;
        EXPECT((*this)(&m) == 0);
        return m;
    }
};

/// A matrix of bf16 as a tensor of `rank` dimensions.
static Encode matrix(const Array<uint16_t>& x, uint64_t rows, uint64_t columns, unsigned box_rows, unsigned rank = 3) {
    Encode e{x.address, {columns, rows}, {columns * 2}, {64, box_rows}};
    if (rank == 3) e.size.push_back(1), e.stride.push_back(rows * columns * 2), e.box.push_back(1);
    return e;
}

static std::vector<uint16_t> bf16s(size_t n, float shift = 0) {
    std::vector<uint16_t> v;
    for (float x : numbers(n)) v.push_back(to_bf16(x + shift));
    return v;
}

/// More than the free 48 KiB.
template <class... A>
int launch_large(const char* name, unsigned grid, unsigned block, unsigned shared, A... arguments) {
    EXPECT(call("cuFuncSetAttribute", function(name), 8, int(shared)) == 0);
    return launch(name, grid, block, shared, arguments...);
}

static std::vector<uint8_t> load(const Map& map, int bytes, int x, int y, int z, int wait = 1) {
    Array<uint8_t> out{size_t(bytes)};
    EXPECT(launch("test_load", 1, 64, unsigned(bytes) + 1024 + 8, map, out.address, bytes, x, y, z, wait) == 0);
    return out.get();
}

static void loads() {
    // Tensors of 3 x 20 x 80 numbers, of which boxes stick out on all sides.
    constexpr int X = 80, Y = 20, Z = 3;
    std::vector<uint16_t> x(X * Y * Z);
    for (size_t i = 0; i < x.size(); i++) x[i] = uint16_t(i + 1);
    Array<uint16_t> a(x);
    Encode e{a.address, {X, Y, Z}, {X * 2, X * Y * 2}, {64, 16, 2}};
    for (int swizzle : {0, 3}) {
        e.swizzle = swizzle;
        for (auto [x0, y0, z0] : {std::array<int, 3>{0, 0, 0}, {-8, -5, -1}, {48, 10, 2}, {104, 0, 0}, {8, 4, 1}}) {
            auto box = load(e.map(), 64 * 16 * 2 * 2, x0, y0, z0);
            for (int i = 0; i < 64 * 16 * 2; i++) {
                int px = x0 + i % 64, py = y0 + i / 64 % 16, pz = z0 + i / 64 / 16;
                bool in = px >= 0 && px < X && py >= 0 && py < Y && pz >= 0 && pz < Z;
                uint16_t want = in ? uint16_t((pz * Y + py) * X + px + 1) : 0, got;
                int at = i * 2;
                if (swizzle) at = i / 64 * 128 + ((i % 64 / 8) ^ (i / 64 % 8)) * 16 + i % 8 * 2;
                memcpy(&got, &box[size_t(at)], 2);
                EXPECT(got == want);
            }
        }
    }
    // By hand: the chunks of line 1 are swapped in pairs, those of line 2 in pairs of pairs; line 7 is turned round.
    e.swizzle = 3;
    auto box = load(e.map(), 64 * 16 * 2 * 2, 0, 0, 0);
    auto chunk = [&](int line, int c) {
        uint16_t v;
        memcpy(&v, &box[size_t(line * 128 + c * 16)], 2);
        return (v - 1 - line * X) / 8;
    };
    const int table[][8] = {{0, 1, 2, 3, 4, 5, 6, 7}, {1, 0, 3, 2, 5, 4, 7, 6}, {2, 3, 0, 1, 6, 7, 4, 5}};
    for (int line = 0; line < 3; line++) {
        for (int c = 0; c < 8; c++) EXPECT(chunk(line, c) == table[line][c] && chunk(line + 8, c) == table[line][c]);
    }
    for (int c = 0; c < 8; c++) EXPECT(chunk(7, c) == 7 - c);
}

/// Boxes of tensors of 3 x 2 x 20 x 4 x 72 numbers, copied from one to another.
static void five() {
    constexpr int SIZE[] = {72, 4, 20, 2, 3};
    std::vector<uint16_t> x(72 * 4 * 20 * 2 * 3);
    for (size_t i = 0; i < x.size(); i++) x[i] = uint16_t(i + 1);
    for (auto at : {std::array<int, 5>{0, 0, 0, 0, 0}, {64, 3, 16, 1, 2}, {0, 2, -3, 1, 1}, {64, 1, 5, 0, 2}, {0, 4, 0, 0, 0}}) {
        Array<uint16_t> a(x), b(std::vector<uint16_t>(x.size(), 0));
        Encode e{a.address, {72, 4, 20, 2, 3}, {144, 144 * 4, 144 * 80, 144 * 160}, {64, 1, 8, 1, 1}}, to = e;
        to.address = b.address;
        EXPECT(launch("test_five", 1, 32, 64 * 8 * 2 + 1024 + 8, e.map(), to.map(), 64 * 8 * 2, at[0], at[1], at[2], at[3], at[4]) == 0);
        auto got = b.get();
        bool right = true;
        for (size_t i = 0; i < x.size(); i++) {
            bool in = true;
            size_t rest = i;
            for (size_t d = 0; d < 5; d++) {
                int place = int(rest % size_t(SIZE[d])) - at[d], box = d == 0 ? 64 : d == 2 ? 8 : 1;
                rest /= size_t(SIZE[d]);
                in &= place >= 0 && place < box;
            }
            right &= got[i] == (in ? x[i] : 0);
        }
        EXPECT(right);
    }
}

/// What is read before the barrier is NaN, at least in part.
static void early_load() {
    Array<uint16_t> a(std::vector<uint16_t>(64 * 64, 0));
    auto box = load(matrix(a, 64, 64, 64).map(), 64 * 128, 0, 0, 0, 0);
    bool missing = false;
    for (auto byte : box) missing |= byte == 0xff;
    EXPECT(missing);
}

static bool store_is_right(int wait) {
    // 8 lines of 64, of which those inside a tensor of 20 x 100 are written.
    bool right = true;
    for (auto [x0, y0] : {std::array<int, 2>{0, 0}, {-8, -3}, {56, 16}, {64, 4}}) {
        Array<uint16_t> a(std::vector<uint16_t>(20 * 104, 0));
        Encode e{a.address, {100, 20}, {104 * 2}, {64, 8}};
        e.swizzle = 0;
        EXPECT(launch("test_store", 1, 64, 64 * 8 * 2 + 1024, e.map(), x0, y0, wait) == 0);
        auto got = a.get();
        for (int y = 0; y < 20; y++) {
            for (int x = 0; x < 104; x++) {
                int bx = x - x0, by = y - y0;
                bool in = bx >= 0 && bx < 64 && by >= 0 && by < 8 && x < 100;
                right &= got[size_t(y * 104 + x)] == (in ? to_bf16(float(by * 64 + bx)) : 0);
            }
        }
    }
    return right;
}
/// Whether blocks add to the same place one after the other: in another order sums are others.
static bool turns_of_blocks_are_right(int wait) {
    std::vector<float> values;
    for (int i = 0; i < 20; i++) values.push_back(i % 3 == 0 ? 1e8f : i % 3 == 1 ? 1.5f : -1e8f);
    Array<float> v(values), out{1024};
    Array<uint32_t> counters(std::vector<uint32_t>(2));
    EXPECT(launch("test_turns_of_blocks", 20, 64, 4096 + 4 + 1024, v.address, out.address, counters.address, wait) == 0);
    auto got = out.get();
    bool right = counters.get() == std::vector<uint32_t>{20, 20};
    for (int i = 0; i < 1024; i++) {
        float sum = values[0] + float(i);
        for (size_t j = 1; j < values.size(); j++) sum += values[j] + float(i);
        right &= got[size_t(i)] == sum;
    }
    return right;
}
static void turns_of_blocks() { EXPECT(turns_of_blocks_are_right(1)); }
static void early_turns() { EXPECT(!turns_of_blocks_are_right(0)); }

static void stores() { EXPECT(store_is_right(1)); }
static void early_store() { EXPECT(!store_is_right(0)); }

/// Whether out = a b, in float in the order of k. Sides of 128 of k.
static bool products_are_right(const char* name, int n, bool a_along_k, bool b_along_k, int mistake = 0) {
    constexpr int K = 128;
    auto a = bf16s(64 * K), b = bf16s(size_t(n * K), 0.25f);
    Array<uint16_t> da(a), db(b);
    Array<float> out{size_t(64 * n)};
    Map ma = (a_along_k ? matrix(da, 64, K, 64) : matrix(da, K, 64, 64)).map();
    Map mb = (b_along_k ? matrix(db, uint64_t(n), K, unsigned(n)) : matrix(db, K, uint64_t(n), 64)).map();
    unsigned shared = unsigned(2 * (64 + n) * 128 + 1024 + 8);
    EXPECT(launch_large(name, 1, 128, shared, ma, mb, out.address, mistake) == 0);
    auto c = out.get();
    for (int i = 0; i < 64; i++) {
        for (int j = 0; j < n; j++) {
            float sum = 0;
            for (int k = 0; k < K; k++) {
                float l = from_bf16(a[size_t(a_along_k ? i * K + k : k * 64 + i)]);
                float r = from_bf16(b[size_t(b_along_k ? j * K + k : k * n + j)]);
                float product = l * r;
                sum += product;
            }
            if (c[size_t(i * n + j)] != sum) return false;
        }
    }
    return true;
}

static void products() {
    EXPECT(products_are_right("test_products_64", 64, true, true));
    EXPECT(products_are_right("test_products_128", 128, true, false));
    EXPECT(products_are_right("test_products_176", 176, true, true));
    EXPECT(products_are_right("test_products_256", 256, false, true));
    EXPECT(products_are_right("test_products_across", 256, false, false));
}
static void early_products() { EXPECT(!products_are_right("test_products_64", 64, true, true, 1)); }

/// Whether out = a b with a from registers; 64 of k.
static bool registers_are_right(const char* name, int n, bool b_along_k, int mistake = 0) {
    auto a = bf16s(64 * 64), b = bf16s(size_t(n * 64), 0.25f);
    Array<uint16_t> da(a), db(b);
    Array<float> out{size_t(64 * n)};
    Map mb = (b_along_k ? matrix(db, uint64_t(n), 64, unsigned(n)) : matrix(db, 64, uint64_t(n), 64)).map();
    EXPECT(launch_large(name, 1, 128, unsigned(n * 128 + 1024 + 8), da.address, mb, out.address, mistake) == 0);
    auto c = out.get();
    for (int i = 0; i < 64; i++) {
        for (int j = 0; j < n; j++) {
            float sum = 0;
            for (int k = 0; k < 64; k++) {
                float product = from_bf16(a[size_t(i * 64 + k)]) * from_bf16(b[size_t(b_along_k ? j * 64 + k : k * n + j)]);
                sum += product;
            }
            if (c[size_t(i * n + j)] != sum) return false;
        }
    }
    return true;
}

static void registers() {
    EXPECT(registers_are_right("test_registers_64", 64, true));
    EXPECT(registers_are_right("test_registers_128", 128, false));
}
static void registers_written() { registers_are_right("test_registers_64", 64, true, 2); }

static void turns() {
    constexpr int ROUNDS = 5;
    Array<int> out{2 * ROUNDS};
    EXPECT(launch("test_turns", 1, 256, 1024 + 16, out.address, ROUNDS) == 0);
    auto got = out.get();
    for (int i = 0; i < 2 * ROUNDS; i++) EXPECT(got[size_t(i)] == i % 2);
}

/// Whether c = a b' by the pipeline, of 128 x 128 tiles, with ragged sizes.
static bool pipeline_is_right(const char* name, unsigned grid, int mistake = 0) {
    constexpr int ROWS = 500, COLUMNS = 200, K = 328;
    bool pair = !strcmp(name, "test_pair");
    auto a = bf16s(ROWS * K), b = bf16s(COLUMNS * K, 0.25f);
    Array<uint16_t> da(a), db(b), dc(ROWS * COLUMNS);
    Encode c = matrix(dc, ROWS, COLUMNS, 64, 2);
    c.swizzle = 0;
    constexpr unsigned shared = 1024 + 3 * 32768 + 32768 + 6 * 8;
    EXPECT(launch_large(name, grid, 384, shared, matrix(da, ROWS, K, 128).map(), matrix(db, COLUMNS, K, pair ? 64 : 128).map(),
                        c.map(), 4, 2, 6, mistake) == 0);
    auto got = dc.get();
    for (int i = 0; i < ROWS; i++) {
        for (int j = 0; j < COLUMNS; j++) {
            float sum = 0;
            for (int k = 0; k < K; k++) {
                float product = from_bf16(a[size_t(i * K + k)]) * from_bf16(b[size_t(j * K + k)]);
                sum += product;
            }
            if (got[size_t(i * COLUMNS + j)] != to_bf16(sum)) return false;
        }
    }
    return true;
}

static void pipelines() {
    for (unsigned grid : {1u, 3u, 8u}) EXPECT(pipeline_is_right("test_pipeline", grid));
    for (unsigned grid : {2u, 4u, 6u}) EXPECT(pipeline_is_right("test_pair", grid));
    Map m = {};
    EXPECT(launch_large("test_pair", 3, 384, 140000, m, m, m, 4, 2, 6, 0) == 1); // no whole pairs
}

// The enum Mistake of hopper.cu; wrong numbers give the status 3, what the emulator sees SIGABRT.
template <int MISTAKE>
static void pipeline_mistake() {
    bool right = pipeline_is_right("test_pipeline", 1, MISTAKE);
    exit(right ? 0 : 3);
}
template <int MISTAKE>
static void pair_mistake() {
    bool right = pipeline_is_right("test_pair", 2, MISTAKE);
    exit(right ? 0 : 3);
}
template <int WHAT>
static void no_arrival() {
    launch("test_no_arrival", 1, 32 * (1 + (WHAT == 1)), 1024 + 8, WHAT);
}

static void speed() {
    constexpr int N = 1024;
    Array<uint16_t> a(bf16s(N * N)), b(bf16s(N * N)), c(N * N);
    Encode out = matrix(c, N, N, 64, 2);
    out.swizzle = 0;
    Map ma = matrix(a, N, N, 128).map(), mb = matrix(b, N, N, 128).map(), mc = out.map();
    for (int i = 0; i < 2; i++) { // the first time allocates the stacks
        auto start = std::chrono::steady_clock::now();
        EXPECT(launch_large("test_pipeline", 8, 384, 1024 + 4 * 32768 + 48, ma, mb, mc, N / 128, N / 128, N / 64, 0) == 0);
        using ms = std::chrono::duration<double, std::milli>;
        if (i) printf("a product of 1024 x 1024 x 1024: %.0f ms\n", ms(std::chrono::steady_clock::now() - start).count());
    }
}

static void encode() {
    Array<uint16_t> x(64 * 64 * 4);
    Map m;
    const Encode good{x.address, {64, 64, 4}, {128, 8192}, {64, 64, 1}};
    EXPECT(good(&m) == 0);
    auto bad = [&](auto change) {
        Encode e = good;
        change(e);
        return e(&m) == 1;
    };
    EXPECT(good(reinterpret_cast<char*>(&m) + 8) == 1);
    EXPECT(bad([](Encode& e) { e.address += 8; }));
    EXPECT(bad([](Encode& e) { e.address = 0; }));
    EXPECT(bad([](Encode& e) { e.size = {}; }));
    EXPECT(bad([](Encode& e) { e.size = {64, 1, 1, 1, 1, 1}, e.stride.resize(5, 128), e.box.resize(6, 1); }));
    EXPECT(bad([](Encode& e) { e.size[2] = 0; }));
    EXPECT(bad([](Encode& e) { e.size[2] = (1ull << 32) + 1; }));
    EXPECT(bad([](Encode& e) { e.stride[0] = 136; }));
    EXPECT(bad([](Encode& e) { e.stride[1] = 1ull << 40; }));
    EXPECT(bad([](Encode& e) { e.stride[0] = 48; }));
    EXPECT(bad([](Encode& e) { e.box[1] = 0; }));
    EXPECT(bad([](Encode& e) { e.box[1] = 257; }));
    EXPECT(bad([](Encode& e) { e.box[0] = 128; }));                 // more than the swizzle's lines
    EXPECT(bad([](Encode& e) { e.box[0] = 4, e.swizzle = 0; }));    // 8 bytes
    EXPECT(bad([](Encode& e) { e.step[1] = 0; }));
    EXPECT(bad([](Encode& e) { e.step[1] = 9; }));
    EXPECT(bad([](Encode& e) { e.type = 16; }));
    EXPECT(bad([](Encode& e) { e.interleave = 3; }));
    EXPECT(bad([](Encode& e) { e.swizzle = 7; }));
    EXPECT(bad([](Encode& e) { e.promotion = 4; }));
    EXPECT(bad([](Encode& e) { e.type = BYTE, e.fill = 1; }));
    Encode floats = good;
    floats.type = FLOAT, floats.box[0] = 32, floats.size[0] = 32;
    EXPECT(floats(&m) == 0);
}

/// A map of memory that was freed.
static void freed() {
    Map m;
    {
        Array<uint16_t> x(64 * 64);
        m = matrix(x, 64, 64, 64).map();
    }
    load(m, 64 * 128, 0, 0, 0);
}
/// A tensor that is larger than its memory.
static void too_large() {
    Array<uint16_t> x(64 * 64);
    load(matrix(x, 65, 64, 64).map(), 64 * 128, 0, 0, 0);
}
/// A box that starts within 16 bytes of a line.
static void between() {
    Array<uint16_t> x(64 * 64);
    load(matrix(x, 64, 64, 64).map(), 64 * 128, 4, 0, 0);
}
static void no_map() { load({}, 64 * 128, 0, 0, 0); }

static void hopper() {
    for (auto test : {loads, five, early_load, stores, turns_of_blocks, products, early_products, registers, turns, pipelines, encode}) test();
}

const Cases HOPPER_CASES = {
    {"hopper", hopper},
    {"hopper_speed", speed},
    {"early_store", early_store},
    {"early_turns", early_turns},
    {"freed", freed},
    {"too_large", too_large},
    {"between", between},
    {"no_map", no_map},
    {"pipeline_full", pipeline_mistake<1>},
    {"pipeline_empty", pipeline_mistake<2>},
    {"pipeline_products", pipeline_mistake<3>},
    {"pipeline_bytes", pipeline_mistake<4>},
    {"pipeline_arrivals", pipeline_mistake<5>},
    {"pipeline_store", pipeline_mistake<6>},
    {"pair_full", pair_mistake<1>},
    {"pair_empty", pair_mistake<2>},
    {"pair_exit", pair_mistake<7>},
    {"no_arrival", no_arrival<0>},
    {"no_named", no_arrival<1>},
    {"registers_written", registers_written},
    {"no_init", no_arrival<2>},
    {"init_twice", no_arrival<3>},
    {"overwritten", no_arrival<4>},
    {"no_arrival_poll", no_arrival<5>},
};
