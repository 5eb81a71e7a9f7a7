// What is under way of Hopper's instructions: the state of barriers, copies and products.
#pragma once

#include "include/emulator_hopper.h"

#include <deque>
#include <memory>

namespace emu {

struct Running;

constexpr unsigned WARPGROUP = 128;

/// The 128 bytes of a CUtensorMap, as cuTensorMapEncodeTiled fills them.
struct TensorMap {
    uint64_t magic, address;
    /// Bytes from one to the next in dimensions 1 and up.
    uint64_t stride[4];
    /// Less one.
    uint32_t last[5];
    uint16_t box[5];
    uint8_t rank, element;
    /// Bytes of a line, in which chunks of 16 are swizzled; 0: none.
    uint8_t swizzle;
    uint64_t size(unsigned i) const { return uint64_t(last[i]) + 1; }
    size_t line() const { return size_t(box[0]) * element; }
    size_t box_bytes() const;
    /// From the first to the last byte of the tensor.
    uint64_t extent() const;
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap), "a map's bytes are given");

constexpr uint64_t TENSOR_MAP = 0x70616d726f736e74;

/// A memory barrier. Its 8 bytes in shared memory are its number in the block under a mark.
struct Mbarrier {
    uint64_t* address;
    unsigned expected, pending, phase;
    /// Announced, less those that came.
    int64_t bytes;
    std::vector<Thread*> waiting;
};

struct NamedBarrier {
    unsigned threads = 0;
    /// Those that have come, and which of them wait.
    std::vector<Thread*> arrived, waiting;
};

/// A box on its way to shared memory of one block.
struct Load {
    TensorMap map;
    int at[5];
    Thread* thread;
    Running* block;
    unsigned char* to;
    Mbarrier* barrier;
};

/// A box on its way to the tensor, or neighbours to `linear`: read from shared memory, and then written or added.
struct Store {
    TensorMap map;
    unsigned char* linear;
    bool adds;
    int at[5];
    Thread* thread;
    const unsigned char* from;
    unsigned group;
    bool read, waited;
    std::vector<unsigned char> bytes;
};

/// The accumulators of products under way: kept here, while the threads' registers are NaN.
struct Tile {
    unsigned columns, holders;
    /// Per thread: its registers if they are here, and the number of its last product, plus one.
    float* d[WARPGROUP];
    uint64_t last[WARPGROUP];
    alignas(64) float values[64 * 256];
};

struct Product {
    uint64_t a, b;
    unsigned columns;
    bool a_along_k, b_along_k, add;
    /// Threads that have come to it.
    unsigned issued;
    Tile* tile;
    /// A where it comes from registers: 64 rows of 16 k; empty where it is in shared memory.
    std::vector<float> rows;
};

/// Registers of A that a product under way reads.
struct Reading {
    const uint32_t* at;
    uint32_t words[4];
    /// The product's number.
    uint64_t product;
};

struct Warpgroup {
    /// Those not done, of which the first has the number `done`.
    std::deque<Product> products;
    uint64_t done = 0;
    std::vector<std::unique_ptr<Tile>> tiles;
    std::vector<Thread*> waiting;
    void clear();
};

/// What a thread has under way.
struct Pending {
    uint64_t products = 0;
    /// Ends of the groups of products that are not waited for.
    std::vector<uint64_t> product_groups;
    /// The products it waits for.
    uint64_t wanted = 0;
    std::vector<Reading> readings;
    /// The open group of stores.
    unsigned store_group = 0;
    /// What it waits for.
    Mbarrier* barrier = nullptr;
    unsigned phase = 0, number = 0;
    const uint32_t* counter = nullptr;
    uint32_t value = 0;
    /// Whether it goes on without it at last.
    bool once = false;
};

// For the scheduler

/// Lets some copies happen, by chance.
void drift(Worker& w);
/// What has to happen when no thread can go on: false if there is nothing.
bool advance(Worker& w);
void finish_asynchronous(Thread& t);
/// The end of a block, and of all that runs together.
void finish_asynchronous(Worker& w, Running& block);
void finish_asynchronous(Worker& w);
/// The other threads of the cluster are waited for, if they have not exited.
void release_cluster(Worker& w);

// Between its parts

/// The barrier at this place of the running block, in this or another block of the cluster.
Mbarrier& find_barrier(Running& block, uint64_t* address);
void complete_bytes(Mbarrier& barrier, size_t bytes);
/// Whether these bytes lie in the running block's shared memory.
bool is_shared(const void* address, size_t bytes);
/// The same place in another block of the cluster.
Running& peer(uint32_t rank, const char* what);
unsigned char* in_block(const Running& block, const void* address);
Pending& pending();

} // namespace emu
