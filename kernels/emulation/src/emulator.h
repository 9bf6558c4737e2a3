// Runs CUDA kernels on the host: every lane is a fiber, and one thread runs the lanes of all grids,
// so that a test sees what a kernel does between any two of its waits.
//
// A warp's turn takes each of its lanes from where it stopped to where it stops next: a collective
// of the warp, a barrier, a poll. What lanes do in one turn nobody else sees the half of, which is
// what a store of eight lanes to one line is taken for. Warps take turns in an order that is drawn,
// and now and then a block is left out for a long time.
//
// Memory is as all see it at once: what the kernels' orders and scopes are for is not tested here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace emu {

struct Dim {
  unsigned x = 1, y = 1, z = 1;
};

// Runs a grid of `threads` (a multiple of 32) a block, each with `shared` bytes of dynamic shared
// memory, among the grids that other threads run. Returns once all its lanes have ended.
void run(unsigned blocks, unsigned threads, size_t shared, const std::function<void()>& body);

// The running block's dynamic shared memory.
uint8_t* dynamic_shared();

// The running block's variable of this number, of which it has one for each that it asks for.
unsigned new_variable();
void* variable(unsigned id, size_t bytes);

// What a warp does together. All 32 lanes have to come to the same one, at the same line.
enum class Collective { kSync, kShuffle, kShuffleXor, kBallot, kMatch, kAdd, kOr, kMin, kMax };
// Of kShuffle `argument` is the lane to read, of kShuffleXor what its number differs by.
uint32_t collective(Collective kind, uint32_t value, uint32_t argument, int line);

// Barrier `id` of `threads` threads of the block; 0: of all.
bool barrier(uint32_t id, uint32_t threads, bool predicate);

// A barrier object: completions of as many arrivals as it was made for, counted by parity.
void mbarrier_init(uint64_t* object, uint32_t count);
void mbarrier_arrive(uint64_t* object);
bool mbarrier_test(const uint64_t* object, uint32_t parity);
void mbarrier_wait(const uint64_t* object, uint32_t parity);

// Ends the lane's part in the warp's turn.
void yield();

// The device's clock.
uint64_t now_ns();

unsigned multiprocessors();

}  // namespace emu

// What a lane is told of itself.
extern emu::Dim threadIdx, blockIdx, gridDim;
