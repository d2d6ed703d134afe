// A GPU's words for g++: kernel bodies run on the CPU, one fiber a thread, one block after another.
//
// It finds wrong arithmetic and indices, missing barriers (the schedule is permuted by a seed, and warps are held
// back), barriers that not all threads reach, shared memory read before it was written (it is filled with NaN before
// every block), and copies that nobody waited for (they are carried out only when waited for). It does not model
// memory ordering, bank conflicts, or the order in which tensor cores add.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#define PSD_DEVICE static inline
#define PSD_MEMBER inline
#define PSD_SPECIAL inline
#define PSD_CONSTEXPR constexpr
#define __align__(bytes) alignas(bytes)
#define __restrict__
#define PSD_SHARED(type, name, count) \
  alignas(16) static type name[count]; \
  static const host::Registered name##_registered(name, sizeof(name))
#define PSD_ENTRY(name, Args, threads, blocks, call)      \
  extern "C" const int name##_size = int(sizeof(Args));   \
  extern "C" const int name##_threads = threads;          \
  extern "C" void name(const void* bytes) {               \
    const Args& args = *static_cast<const Args*>(bytes);  \
    call;                                                 \
  }

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace host {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 256 << 10;

enum class State { kReady, kAtWarpBarrier, kAtBlockBarrier, kDone };

struct Copy {
  void* to;
  const void* from;
};

struct Fiber {
  ucontext_t context{};
  std::vector<char> stack = std::vector<char>(kStackBytes);
  State state = State::kReady;
  int line = 0;
  unsigned slot[8] = {};                   // what a lane shows to its warp
  std::vector<std::vector<Copy>> groups;   // asynchronous copies, oldest group first; the last one is open
};

struct Shared {
  void* start;
  size_t bytes;
};

// The block that runs now. Blocks run one after another, in one thread.
inline std::vector<Fiber> fibers;
inline std::vector<Shared> shared_arrays;
inline std::function<void()> body;
inline ucontext_t scheduler;
inline int running = -1;

struct Registered {
  Registered(void* start, size_t bytes) {
    shared_arrays.push_back({start, bytes});
    std::memset(start, 0xff, bytes);
  }
};

inline void resume(int index) {
  running = index;
  threadIdx = dim3{unsigned(index), 0, 0};
  swapcontext(&scheduler, &fibers[index].context);
}

// Hand over to the scheduler; returns when all that the barrier waits for have come.
inline void wait_at(State barrier, int line) {
  Fiber& fiber = fibers[running];
  fiber.state = barrier;
  fiber.line = line;
  swapcontext(&fiber.context, &scheduler);
}

inline void run_body() {
  body();
  fibers[running].state = State::kDone;
  swapcontext(&fibers[running].context, &scheduler);
}

inline void start_block(int threads) {
  fibers.resize(threads);
  for (const Shared& array : shared_arrays) {
    std::memset(array.start, 0xff, array.bytes);
  }
  for (Fiber& fiber : fibers) {
    fiber.state = State::kReady;
    fiber.groups.assign(1, {});
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_body, 0);
  }
}

// Whether fibers first..last-1 all wait at one barrier of one line; then they become ready.
inline bool release(int first, int last, State barrier) {
  for (int i = first; i < last; ++i) {
    if (fibers[i].state != barrier || fibers[i].line != fibers[first].line) {
      return false;
    }
  }
  for (int i = first; i < last; ++i) {
    fibers[i].state = State::kReady;
  }
  return true;
}

inline bool all_done() {
  return std::all_of(fibers.begin(), fibers.end(), [](const Fiber& f) { return f.state == State::kDone; });
}

inline std::string describe_stuck_block() {
  const char* names[] = {"ready", "at a warp barrier", "at __syncthreads", "done"};
  std::string text = "threads wait for each other in block " + std::to_string(blockIdx.x) + ":";
  std::string last;
  for (size_t i = 0; i < fibers.size(); ++i) {
    const std::string now = std::string(names[int(fibers[i].state)]) + " (line " + std::to_string(fibers[i].line) + ")";
    if (now != last) {
      text += " from thread " + std::to_string(i) + " on " + now + ";";
      last = now;
    }
  }
  return text;
}

// How often a warp is held back, in percent: from one barrier of the block to the next some warps race ahead.
inline std::vector<unsigned> laziness;

inline void draw_laziness(std::mt19937& random, int threads) {
  const unsigned choices[] = {0, 50, 90, 98};
  laziness.resize((threads + kLanes - 1) / kLanes);
  for (unsigned& percent : laziness) {
    percent = choices[random() % 4];
  }
}

// Run the ready lanes of every warp once, in an order of the generator's; with a seed some warps are held back.
inline bool run_ready(std::mt19937& random, bool permuted) {
  std::vector<int> warps;
  for (int first = 0; first < int(fibers.size()); first += kLanes) {
    const int last = std::min(int(fibers.size()), first + kLanes);
    if (std::any_of(fibers.begin() + first, fibers.begin() + last,
                    [](const Fiber& f) { return f.state == State::kReady; })) {
      warps.push_back(first);
    }
  }
  if (permuted) {
    std::shuffle(warps.begin(), warps.end(), random);
  }
  bool has_run = false;
  for (size_t turn = 0; turn < warps.size(); ++turn) {
    const bool is_last_chance = !has_run && turn + 1 == warps.size();
    const bool is_held_back = permuted && !is_last_chance && random() % 100 < laziness[warps[turn] / kLanes];
    if (is_held_back) {
      continue;
    }
    has_run = true;
    std::vector<int> lanes;
    for (int i = warps[turn]; i < std::min(int(fibers.size()), warps[turn] + kLanes); ++i) {
      lanes.push_back(i);
    }
    if (permuted) {
      std::shuffle(lanes.begin(), lanes.end(), random);
    }
    for (int lane : lanes) {
      if (fibers[lane].state == State::kReady) {
        resume(lane);
      }
    }
  }
  return !warps.empty();
}

// Run one block to its end. Returns an empty string, or what is wrong with its barriers.
inline std::string run_block(int threads, std::mt19937& random, bool permuted) {
  start_block(threads);
  draw_laziness(random, threads);
  while (!all_done()) {
    if (run_ready(random, permuted)) {
      for (int first = 0; first < threads; first += kLanes) {
        release(first, std::min(threads, first + kLanes), State::kAtWarpBarrier);
      }
      continue;
    }
    if (!release(0, threads, State::kAtBlockBarrier)) {
      return describe_stuck_block();
    }
    draw_laziness(random, threads);
  }
  return "";
}

// Run a whole grid. seed 0 runs threads in order; any other permutes them.
inline std::string launch(dim3 grid, int threads, unsigned seed, std::function<void()> thread_body) {
  std::mt19937 random(seed);
  body = std::move(thread_body);
  gridDim = grid;
  blockDim = dim3{unsigned(threads), 1, 1};
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3{x, y, z};
        const std::string problem = run_block(threads, random, seed != 0);
        if (!problem.empty()) {
          return problem;
        }
      }
    }
  }
  return "";
}

// Show `words` values to the warp, and read those that another lane showed; two calls, a barrier after each.
inline const unsigned* slot_of_lane(int lane) { return fibers[running / kLanes * kLanes + lane].slot; }

inline unsigned exchange_xor(unsigned value, int distance, int line) {
  fibers[running].slot[0] = value;
  wait_at(State::kAtWarpBarrier, line);
  const unsigned seen = slot_of_lane(running % kLanes ^ distance)[0];
  wait_at(State::kAtWarpBarrier, -line);
  return seen;
}

inline float float_of_bits(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline unsigned bits_of_float(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline float float_of_half(unsigned short bits) {
  _Float16 value;
  std::memcpy(&value, &bits, sizeof(value));
  return float(value);
}
inline unsigned short half_of_float(float value) {
  const _Float16 rounded = _Float16(value);
  unsigned short bits;
  std::memcpy(&bits, &rounded, sizeof(bits));
  return bits;
}
inline float float_of_bfloat16(unsigned short bits) { return float_of_bits(unsigned(bits) << 16); }
inline unsigned short bfloat16_of_float(float value) {
  const unsigned bits = bits_of_float(value);
  if (value != value) {
    return static_cast<unsigned short>(bits >> 16 | 0x40);
  }
  return static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// ---- tensor cores: the fragment layouts of PTX ISA, "mma.m16n8k16" and "mma.m16n8k8" for 16-bit types ----

using Decode = float (*)(unsigned short);

inline float half_of_word(unsigned word, int which, Decode decode) {
  return decode(static_cast<unsigned short>(which ? word >> 16 : word));
}

// d += a b with a (16, k) and b (k, 8), k = 8 or 16; every lane holds 4 of d, k/4 of a and k/8 words of b.
inline void matrix_multiply(float (&d)[4], const unsigned* a, const unsigned* b, int k, Decode decode, int line) {
  unsigned* slot = fibers[running].slot;
  std::copy(a, a + k / 4, slot);
  std::copy(b, b + k / 8, slot + 4);
  wait_at(State::kAtWarpBarrier, line);
  const int lane = running % kLanes;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2);
    const int column = lane % 4 * 2 + i % 2;
    for (int inner = 0; inner < k; ++inner) {
      // Column `inner` of a row lies with lane (row % 8) * 4 + (inner % 8) / 2, in register row / 8 + 2 (inner / 8).
      const unsigned* of_a = slot_of_lane(row % 8 * 4 + inner % 8 / 2);
      const unsigned* of_b = slot_of_lane(column * 4 + inner % 8 / 2);
      d[i] += half_of_word(of_a[row / 8 + 2 * (inner / 8)], inner % 2, decode) *
              half_of_word(of_b[4 + inner / 8], inner % 2, decode);
    }
  }
  wait_at(State::kAtWarpBarrier, -line);
}

// ldmatrix.trans: lane 8m + r gives the address of row r of matrix m; every lane gets, of each matrix, the elements
// (2t, g) and (2t + 1, g) with g = lane / 4 and t = lane % 4.
inline void load_matrices_transposed(unsigned* out, int matrices, const void* row, int line) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(row);
  unsigned* slot = fibers[running].slot;
  slot[0] = unsigned(address);
  slot[1] = unsigned(uint64_t(address) >> 32);
  wait_at(State::kAtWarpBarrier, line);
  const int lane = running % kLanes;
  for (int matrix = 0; matrix < matrices; ++matrix) {
    unsigned word = 0;
    for (int half = 0; half < 2; ++half) {
      const unsigned* shown = slot_of_lane(8 * matrix + lane % 4 * 2 + half);
      const uintptr_t start = uintptr_t(uint64_t(shown[1]) << 32 | shown[0]);
      unsigned short element;
      std::memcpy(&element, reinterpret_cast<const unsigned short*>(start) + lane / 4, sizeof(element));
      word |= unsigned(element) << (16 * half);
    }
    out[matrix] = word;
  }
  wait_at(State::kAtWarpBarrier, -line);
}

// ---- asynchronous copies: nothing arrives before it is waited for ----

inline void copy_async(void* to, const void* from) { fibers[running].groups.back().push_back({to, from}); }

inline void commit_copies() { fibers[running].groups.emplace_back(); }

inline void wait_copies(int pending) {
  auto& groups = fibers[running].groups;
  while (int(groups.size()) - 1 > pending) {
    for (const Copy& copy : groups.front()) {
      std::memcpy(copy.to, copy.from, 16);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace host

#define __syncthreads() host::wait_at(host::State::kAtBlockBarrier, __LINE__)
#define __syncwarp() host::wait_at(host::State::kAtWarpBarrier, __LINE__)
#define __shfl_xor_sync(mask, value, distance) \
  host::float_of_bits(host::exchange_xor(host::bits_of_float(value), distance, __LINE__))

inline unsigned __float_as_uint(float value) { return host::bits_of_float(value); }
inline float __uint_as_float(unsigned bits) { return host::float_of_bits(bits); }
template <typename T>
T __ldg(const T* address) {
  return *address;
}
inline float atomicAdd(float* address, float value) {
  const float before = *address;
  *address += value;
  return before;
}
inline float rsqrtf(float value) { return 1.f / std::sqrt(value); }
using std::max;
using std::min;
