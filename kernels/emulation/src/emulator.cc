#include "emulator.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <time.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <list>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

emu::Dim threadIdx, blockIdx, gridDim;

namespace emu {
namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 64 * 1024;
constexpr unsigned kBarriers = 16;
// What shared memory holds when a block begins: not zero.
constexpr uint64_t kUnwritten = 0xa5a5a5a5a5a5a5a5;

std::atomic<unsigned> g_multiprocessors{1};

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "emulated kernel, block %u, thread %u: %s\n", blockIdx.x, threadIdx.x, what);
  std::abort();
}

struct Random {
  uint64_t state;
  uint64_t next() {
    state += 0x9e3779b97f4a7c15;
    uint64_t z = state;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  uint64_t below(uint64_t n) { return next() % n; }
};

enum class State : uint8_t { kReady, kCollective, kBarrier, kMbarrier, kEnded };

struct Lane {
  jmp_buf context;
  State state = State::kReady;
  bool begun = false;
  Collective kind{};
  int line = 0;
  uint32_t value = 0;
  uint32_t argument = 0;
  uint32_t result = 0;
  const uint64_t* object = nullptr;
  uint32_t parity = 0;
};

struct Warp {
  std::array<Lane, kWarp> lanes;
  unsigned arrived = 0;  // at a collective
  unsigned ended = 0;
  unsigned idle = 0;  // lanes that only a lane of another warp can wake
};

struct Barrier {
  uint32_t arrived = 0;
  bool any = false;  // of their predicates
  std::vector<std::pair<Warp*, Lane*>> waiting;
};

struct Grid;

struct Block {
  Grid* grid = nullptr;
  unsigned index = 0;
  std::vector<Warp> warps;
  std::array<Barrier, kBarriers> barriers;
  std::map<unsigned, std::vector<uint64_t>> variables;
  std::vector<uint64_t> dynamic;
  uint8_t* dynamic_begin = nullptr;
  unsigned ended = 0;     // warps
  uint64_t left_out = 0;  // turns for which it does not run
};

struct Grid {
  unsigned threads = 0;
  const std::function<void()>* body = nullptr;
  std::vector<Block> blocks;
  uint8_t* stacks = nullptr;
  unsigned ended = 0;  // blocks
  unsigned still = 0;  // rounds in a row in which no lane could go on
  bool done = false;
};

struct Device {
  std::mutex mutex;
  std::condition_variable wake;
  std::condition_variable done;
  std::list<Grid*> launched;
};

Device& device() {
  // Never destroyed: its thread runs until the process ends.
  static Device* const device = new Device;
  return *device;
}

// What runs now.
jmp_buf scheduler;
ucontext_t fiber;
std::atomic<uint64_t> device_ns{1};  // other threads read it, too
Grid* grid = nullptr;
Block* block = nullptr;
Warp* warp = nullptr;
Lane* lane = nullptr;

void stop(State state) {
  lane->state = state;
  if (_setjmp(lane->context) == 0) _longjmp(scheduler, 1);
}

void lane_main() {
  (*grid->body)();
  lane->state = State::kEnded;
  _longjmp(scheduler, 1);
}

// Runs a lane until it stops.
void resume(unsigned warp_index, unsigned index) {
  lane = &warp->lanes[index];
  threadIdx.x = warp_index * kWarp + index;
  if (_setjmp(scheduler) != 0) return;
  if (lane->begun) _longjmp(lane->context, 1);
  lane->begun = true;
  const size_t at = (size_t{block->index} * grid->threads + threadIdx.x) * kStackBytes;
  getcontext(&fiber);
  fiber.uc_stack.ss_sp = grid->stacks + at;
  fiber.uc_stack.ss_size = kStackBytes;
  fiber.uc_link = nullptr;
  makecontext(&fiber, lane_main, 0);
  setcontext(&fiber);
}

void enter(Block& next) {
  block = &next;
  grid = next.grid;
  blockIdx.x = next.index;
  gridDim.x = static_cast<unsigned>(grid->blocks.size());
}

bool runnable(const Lane& lane) {
  return lane.state == State::kReady ||
         (lane.state == State::kMbarrier && mbarrier_test(lane.object, lane.parity));
}

// One turn of a warp. Whether a lane could go on.
bool turn(Block& of, unsigned index) {
  Warp& w = of.warps[index];
  if (w.idle + w.ended == kWarp) return false;
  // Those that another lane wakes meanwhile run together in the next turn.
  uint32_t lanes = 0;
  for (unsigned i = 0; i < kWarp; ++i) lanes |= uint32_t{runnable(w.lanes[i])} << i;
  if (lanes == 0) return false;
  enter(of);
  warp = &w;
  for (; lanes != 0; lanes &= lanes - 1) {
    const auto i = static_cast<unsigned>(std::countr_zero(lanes));
    w.lanes[i].state = State::kReady;
    resume(index, i);
    if (w.lanes[i].state == State::kEnded && ++w.ended == kWarp) ++of.ended;
  }
  if (w.ended != 0 && w.ended != kWarp && w.arrived != 0 && w.ended + w.arrived == kWarp)
    fail("lanes have left the kernel for which others of their warp wait");
  return true;
}

uint64_t host_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<uint64_t>(t.tv_sec) * 1000000000 + static_cast<uint64_t>(t.tv_nsec);
}

// A round of turns of all warps, from a drawn one on.
void round(Grid& g, Random& random) {
  // Far longer than blocks are left out: who waits at a barrier then waits for ever.
  constexpr unsigned kStill = 100000;
  if (++g.still == kStill) fail("every lane of a grid waits for another");
  const size_t first = random.below(g.blocks.size());
  for (size_t n = 0; n < g.blocks.size(); ++n) {
    Block& b = g.blocks[(first + n) % g.blocks.size()];
    const auto warps = static_cast<unsigned>(b.warps.size());
    if (b.ended == warps) continue;
    if (b.left_out != 0) {
      --b.left_out;
      continue;
    }
    // Now and then a block stands still, most often for few turns.
    if (random.below(256) == 0) b.left_out = random.below(uint64_t{1} << random.below(11));
    const auto offset = static_cast<unsigned>(random.below(warps));
    for (unsigned w = 0; w < warps; ++w) {
      if (random.below(4) != 0 && turn(b, (offset + w) % warps)) g.still = 0;
    }
    if (b.ended == warps) ++g.ended;
  }
}

[[noreturn]] void serve() {
  Device& d = device();
  Random random{1};
  std::vector<Grid*> running;
  uint64_t last = host_ns();
  for (;;) {
    {
      std::unique_lock lock(d.mutex);
      if (running.empty()) d.wake.wait(lock, [&] { return !d.launched.empty(); });
      running.insert(running.end(), d.launched.begin(), d.launched.end());
      d.launched.clear();
    }
    for (Grid* g : running) round(*g, random);
    // While the host does something else, time stands still: no kernel takes that for a late peer.
    constexpr uint64_t kLongestRound = 200000;
    const uint64_t now = host_ns();
    device_ns.fetch_add(std::min(now - last, kLongestRound), std::memory_order_relaxed);
    last = now;
    const auto ended = std::partition(running.begin(), running.end(),
                                      [](Grid* g) { return g->ended != g->blocks.size(); });
    if (ended == running.end()) continue;
    const std::lock_guard lock(d.mutex);
    for (auto g = ended; g != running.end(); ++g) (*g)->done = true;
    running.erase(ended, running.end());
    d.done.notify_all();
  }
}

}  // namespace

void run(unsigned blocks, unsigned threads, size_t shared, const std::function<void()>& body) {
  Grid g;
  g.threads = threads;
  g.body = &body;
  g.blocks.resize(blocks);
  for (unsigned i = 0; i < blocks; ++i) {
    Block& b = g.blocks[i];
    b.grid = &g;
    b.index = i;
    b.warps = std::vector<Warp>(threads / kWarp);
    b.dynamic.assign(shared / 8 + 4, kUnwritten);
    const auto address = reinterpret_cast<uintptr_t>(b.dynamic.data());
    b.dynamic_begin = reinterpret_cast<uint8_t*>((address + 15) & ~uintptr_t{15});
  }
  const size_t stack_bytes = size_t{blocks} * threads * kStackBytes;
  void* stacks = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) fail("no memory for the lanes' stacks");
  g.stacks = static_cast<uint8_t*>(stacks);

  Device& d = device();
  static std::once_flag started;
  std::call_once(started, [] { std::thread(serve).detach(); });
  {
    std::unique_lock lock(d.mutex);
    d.launched.push_back(&g);
    d.wake.notify_one();
    d.done.wait(lock, [&] { return g.done; });
  }
  munmap(stacks, stack_bytes);
}

uint8_t* dynamic_shared() { return block->dynamic_begin; }

unsigned new_variable() {
  static unsigned count = 0;
  return count++;
}

void* variable(unsigned id, size_t bytes) {
  return block->variables.try_emplace(id, (bytes + 7) / 8, kUnwritten).first->second.data();
}

uint32_t collective(Collective kind, uint32_t value, uint32_t argument, int line) {
  Warp& w = *warp;
  Lane& own = *lane;
  own.kind = kind;
  own.line = line;
  own.value = value;
  own.argument = argument;
  if (++w.arrived < kWarp) {
    ++w.idle;
    stop(State::kCollective);
    return own.result;
  }
  uint32_t sum = 0, any = 0, least = ~0u, most = 0, ballot = 0;
  for (unsigned i = 0; i < kWarp; ++i) {
    const Lane& l = w.lanes[i];
    if (l.kind != kind || l.line != line) fail("lanes of a warp meet at different places");
    sum += l.value;
    any |= l.value;
    least = std::min(least, l.value);
    most = std::max(most, l.value);
    ballot |= uint32_t{l.value != 0} << i;
  }
  for (unsigned i = 0; i < kWarp; ++i) {
    Lane& l = w.lanes[i];
    switch (kind) {
    case Collective::kSync: break;
    case Collective::kShuffle: l.result = w.lanes[l.argument % kWarp].value; break;
    case Collective::kShuffleXor: l.result = w.lanes[(i ^ l.argument) % kWarp].value; break;
    case Collective::kBallot: l.result = ballot; break;
    case Collective::kMatch:
      l.result = 0;
      for (unsigned j = 0; j < kWarp; ++j) l.result |= uint32_t{w.lanes[j].value == l.value} << j;
      break;
    case Collective::kAdd: l.result = sum; break;
    case Collective::kOr: l.result = any; break;
    case Collective::kMin: l.result = least; break;
    case Collective::kMax: l.result = most; break;
    }
    l.state = State::kReady;
  }
  w.arrived = 0;
  w.idle = 0;
  stop(State::kReady);
  return own.result;
}

bool barrier(uint32_t id, uint32_t threads, bool predicate) {
  Barrier& b = block->barriers[id];
  if (threads == 0) threads = grid->threads;
  Lane& own = *lane;
  b.any |= predicate;
  if (++b.arrived < threads) {
    b.waiting.emplace_back(warp, lane);
    ++warp->idle;
    stop(State::kBarrier);
    return own.result != 0;
  }
  const bool any = b.any;
  for (const auto& [w, l] : b.waiting) {
    l->state = State::kReady;
    l->result = any;
    --w->idle;
  }
  b.arrived = 0;
  b.any = false;
  b.waiting.clear();
  stop(State::kReady);
  return any;
}

// Completions << 32 | arrivals of each << 16 | arrivals left.
void mbarrier_init(uint64_t* object, uint32_t count) { *object = uint64_t{count} << 16 | count; }

void mbarrier_arrive(uint64_t* object) {
  if ((*object & 0xffff) == 0) fail("a barrier object that was not made");
  if ((--*object & 0xffff) == 0) *object += (uint64_t{1} << 32) + (*object >> 16 & 0xffff);
}

bool mbarrier_test(const uint64_t* object, uint32_t parity) {
  return (*object >> 32 & 1) != parity;
}

void mbarrier_wait(const uint64_t* object, uint32_t parity) {
  if (mbarrier_test(object, parity)) return;
  lane->object = object;
  lane->parity = parity;
  stop(State::kMbarrier);
}

void yield() { stop(State::kReady); }

uint64_t now_ns() { return device_ns.load(std::memory_order_relaxed); }

unsigned multiprocessors() { return g_multiprocessors; }

}  // namespace emu

extern "C" uint64_t ep_emulation_now_ns(void) { return emu::now_ns(); }

extern "C" void ep_emulation_set_multiprocessors(uint32_t multiprocessors) {
  emu::g_multiprocessors = multiprocessors;
}
