// Fused dynamic convolution: Y = ReLU(LN2(ReLU(LN1(X P1)) P2)) with kernels P1, P2 of each region's own.
//
// Computes kernels/reference.py:dynamic_conv on X (M, 49, C) and the raw generated parameters (M, 2CD), P1 (C, D)
// before P2 (D, C); writes Y (M, 49, C), or its mean over the 49 tokens (M, C). Sums, norms and ReLU run in float.
//
// Launch: one block a region, 4 warps of 16 token rows each (49 padded to 64). Everything is read once: X goes from
// global memory straight into fragments of A, parameters through a ring of shared memory by asynchronous copies. The
// hidden rows stay in registers, because the fragment that a product leaves is the one that the next product takes.
// Shared memory: at most 40 KB, static, so that five blocks fit on an H200 and two on an Orin.
//
// Bytes at the target (300 regions, C = 256, D = 64, 16 bits): parameters 19.7 MB, X 7.5 MB, Y 7.5 MB = 34.7 MB, 0.96
// GFLOP. Roofline: Orin 170 us, L4 116 us, A100 17.0 us, H200 7.2 us. With C = 128, D = 8 (100 regions): 2.9 MB,
// Orin 14 us, L4 9.7 us, A100 1.4 us, H200 0.6 us.
#pragma once
#include "roi_align.cuh"
#include "warp_matrix.cuh"

namespace psdiff {

constexpr int kConvWarps = 4;
constexpr int kConvThreads = kConvWarps * kWarp;
constexpr int kRowsPerWarp = 16;
static_assert(kConvWarps * kRowsPerWarp >= kCells, "every token needs a row");

constexpr int kStageElements = 4096;
constexpr int kMostStages = 5;

struct DynamicConvArgs {
  const void* tokens;   // (M, 49, C)
  const void* params;   // (M, 2CD)
  const float* weight1;  // (D,), LayerNorm after the first product
  const float* bias1;
  const float* weight2;  // (C,), LayerNorm after the second
  const float* bias2;
  void* out;            // (M, 49, C), or (M, C) where only the mean is wanted
  float epsilon;
  int mean_only;
};

PSD_CONSTEXPR int smaller(int a, int b) { return a < b ? a : b; }
PSD_CONSTEXPR int larger(int a, int b) { return a > b ? a : b; }

// The largest multiple of `unit` that divides `rows` and whose rows of `width` fit a stage.
PSD_CONSTEXPR int rows_per_stage(int rows, int width, int unit) {
  int best = unit;
  for (int count = unit; count <= rows; count += unit) {
    if (rows % count == 0 && count * width <= kStageElements) {
      best = count;
    }
  }
  return best;
}

// How the parameters of one region travel: stages of P1 rows, then stages of P2 rows, through a ring of slots.
template <int C, int D>
struct ConvPlan {
  static_assert(C % 32 == 0 && (D == 8 || D % 16 == 0), "C must be a multiple of 32, D 8 or a multiple of 16");
  static constexpr int kStep2 = D == 8 ? 8 : 16;  // inner size of one product of GEMM 2
  static constexpr int kRows1 = rows_per_stage(C, D, 32);
  static constexpr int kRows2 = rows_per_stage(D, C, kStep2);
  static constexpr int kStages1 = C / kRows1;
  static constexpr int kStages2 = D / kRows2;
  static constexpr int kStages = kStages1 + kStages2;
  static constexpr int kSlot = larger(kRows1 * D, kRows2 * C);
  static constexpr int kSlots = smaller(kStages, kMostStages);
  static_assert(kSlots >= 2, "a slot is filled while another is read");
  // Groups of copies that may still be on their way when a stage is read.
  static constexpr int kPending = kSlots - 2;
  // Before they leave, the rows of Y lie here, 16 bytes apart from a multiple of the banks.
  static constexpr int kOutRow = C + 8;
  static constexpr int kElements = larger(kSlots * kSlot, kConvThreads / 2 * kOutRow);
};

// By how much the 16-byte chunks of a row are exchanged (chunk c lies at c ^ turn), so that 8 rows that are read
// together lie in 8 different groups of banks. `chunks` are those of a row.
template <int chunks>
PSD_DEVICE int turn_of_row(int row) {
  if (chunks % 8 == 0) {
    return row & 7;
  }
  if (chunks % 4 == 0) {
    return (row >> 1) & 3;
  }
  return chunks == 2 ? (row >> 2) & 1 : 0;
}

// The place of row k of P1 among its stage's rows. Lane t reads elements 8t..8t+7 of a row of X at once; the product
// of step s then takes elements 8t + 4s + {0, 1} as inner indices 2t, 2t + 1 and {2, 3} as 2t + 8, 2t + 9. Rows of P1
// are stored in that order, so 8 rows of one fragment are neighbours.
PSD_DEVICE int place_of_row(int k) {
  const int t = k / 8 % 4, step = k / 4 % 2, half = k / 2 % 2, odd = k % 2;
  return k / 32 * 32 + step * 16 + half * 8 + t * 2 + odd;
}

template <typename T, int C, int D>
PSD_DEVICE void copy_stage(const T* params, int stage, T* slot) {
  using Plan = ConvPlan<C, D>;
  if (stage < Plan::kStages1) {
    const T* rows = params + stage * Plan::kRows1 * D;
    for (int i = threadIdx.x; i < Plan::kRows1 * D / 8; i += kConvThreads) {
      const int row = i / (D / 8), chunk = i % (D / 8);
      const int place = place_of_row(row);
      copy_async(slot + (place * (D / 8) + (chunk ^ turn_of_row<D / 8>(place))) * 8, rows + i * 8);
    }
  } else if (stage < Plan::kStages) {
    const T* rows = params + C * D + (stage - Plan::kStages1) * Plan::kRows2 * C;
    for (int i = threadIdx.x; i < Plan::kRows2 * C / 8; i += kConvThreads) {
      const int row = i / (C / 8), chunk = i % (C / 8);
      copy_async(slot + (row * (C / 8) + (chunk ^ turn_of_row<C / 8>(row))) * 8, rows + i * 8);
    }
  }
}

// Wait until a stage has arrived, start the copy that is kSlots - 1 ahead, and return the stage's slot.
template <typename T, int C, int D>
PSD_DEVICE const T* next_stage(const T* params, int stage, T* slots) {
  using Plan = ConvPlan<C, D>;
  wait_copies<Plan::kPending>();
  // Everyone's part of this stage has arrived, and everyone has left the slot that is filled next.
  __syncthreads();
  const int ahead = stage + Plan::kSlots - 1;
  copy_stage<T, C, D>(params, ahead, slots + ahead % Plan::kSlots * Plan::kSlot);
  commit_copies();
  return slots + stage % Plan::kSlots * Plan::kSlot;
}

// d[tile] += a (16 x 16) times rows first..first+15 of a slot with `width` columns, 8 columns a tile.
template <typename T, int width>
PSD_DEVICE void multiply_rows(float (&d)[width / 8][4], const u32 (&a)[4], const T* slot, int first) {
  constexpr int kChunks = width / 8;
  const int lane = threadIdx.x % kWarp;
  const int row = first + lane % 16;
  const T* start = slot + row * width;
  if constexpr (kChunks == 1) {
    u32 b[2];
    load_matrices_transposed(b, start);
    multiply_add(d[0], a, b[0], b[1], T{});
  } else {
    const int turn = turn_of_row<kChunks>(row) ^ lane / 16;
#pragma unroll
    for (int tile = 0; tile < kChunks; tile += 2) {
      u32 b[4];
      // tile ^ turn, in two parts: the upper one is an offset in the instruction, and four addresses serve all tiles.
      load_matrices_transposed(b, start + (((tile & 7) ^ turn) + (tile & ~7)) * 8);
      multiply_add(d[tile], a, b[0], b[1], T{});
      multiply_add(d[tile + 1], a, b[2], b[3], T{});
    }
  }
}

// The same with a (16 x 8) and the 8 rows of a slot.
template <typename T, int width>
PSD_DEVICE void multiply_eight_rows(float (&d)[width / 8][4], const u32 (&a)[2], const T* slot) {
  constexpr int kChunks = width / 8;
  const int lane = threadIdx.x % kWarp;
  const T* start = slot + lane % 8 * width;
  const int turn = turn_of_row<kChunks>(lane % 8) ^ lane / 8;
#pragma unroll
  for (int tile = 0; tile < kChunks; tile += 4) {
    u32 b[4];
    load_matrices_transposed(b, start + (((tile & 7) ^ turn) + (tile & ~7)) * 8);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      multiply_add(d[tile + i], a, b[i], T{});
    }
  }
}

// LayerNorm and ReLU over the columns of the two rows that a lane shares with the other three of its quad.
template <int columns>
PSD_DEVICE void normalise_rows(float (&d)[columns / 8][4], const float* weight, const float* bias, float epsilon) {
  constexpr int kTiles = columns / 8;
  const int t = threadIdx.x % 4;
  float mean[2], scale[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = 0.f;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      sum += d[tile][2 * half] + d[tile][2 * half + 1];
    }
    mean[half] = sum_of_lanes<4>(sum) * (1.f / columns);
    // A second pass over registers: the difference of two large sums would lose the digits.
    float squares = 0.f;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const float left = d[tile][2 * half] - mean[half], right = d[tile][2 * half + 1] - mean[half];
      squares += left * left + right * right;
    }
    scale[half] = rsqrtf(sum_of_lanes<4>(squares) * (1.f / columns) + epsilon);
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const float2 w = __ldg(reinterpret_cast<const float2*>(weight + 8 * tile + 2 * t));
    const float2 b = __ldg(reinterpret_cast<const float2*>(bias + 8 * tile + 2 * t));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      d[tile][2 * half] = fmaxf((d[tile][2 * half] - mean[half]) * scale[half] * w.x + b.x, 0.f);
      d[tile][2 * half + 1] = fmaxf((d[tile][2 * half + 1] - mean[half]) * scale[half] * w.y + b.y, 0.f);
    }
  }
}

// Rows of D columns as a product leaves them -> the fragments of A that cover 16 columns each (8 where D is 8): two
// neighbouring tiles hold just the elements that one fragment wants.
template <typename T, int D>
PSD_DEVICE void pack_hidden(const float (&hidden)[D / 8][4], u32 (&packed)[(D + 8) / 16][4]) {
#pragma unroll
  for (int tile = 0; tile < D / 8; ++tile) {
    packed[tile / 2][tile % 2 * 2] = pack_pair<T>(hidden[tile][0], hidden[tile][1]);
    packed[tile / 2][tile % 2 * 2 + 1] = pack_pair<T>(hidden[tile][2], hidden[tile][3]);
  }
}

// Y of one warp, through shared memory so that a row leaves in whole lines.
template <typename T, int C>
PSD_DEVICE void store_rows(const float (&d)[C / 8][4], T* staged, T* out) {
  constexpr int kOutRow = C + 8;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  T* rows = staged + warp * kRowsPerWarp * kOutRow;
#pragma unroll
  for (int tile = 0; tile < C / 8; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const u32 word = pack_pair<T>(d[tile][2 * half], d[tile][2 * half + 1]);
      *reinterpret_cast<u32*>(rows + (g + 8 * half) * kOutRow + 8 * tile + 2 * t) = word;
    }
  }
  __syncwarp();
  const int valid = min(kRowsPerWarp, kCells - warp * kRowsPerWarp);
  // Unrolled further, it would need registers that the result still holds.
#pragma unroll 1
  for (int i = lane; i < valid * (C / 8); i += kWarp) {
    const int row = i / (C / 8), chunk = i % (C / 8);
    const uint4 vector = *reinterpret_cast<const uint4*>(rows + row * kOutRow + chunk * 8);
    store_vector(out + i64(warp * kRowsPerWarp + row) * C + chunk * 8, vector);
  }
}

// The mean of Y over the tokens: within a warp by shuffles, over the warps through shared memory.
template <typename T, int C>
PSD_DEVICE void store_mean(const float (&d)[C / 8][4], float* sums, T* out) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const bool has_first = warp * kRowsPerWarp + g < kCells;
  const bool has_second = warp * kRowsPerWarp + g + 8 < kCells;
#pragma unroll
  for (int tile = 0; tile < C / 8; ++tile) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = (has_first ? d[tile][i] : 0.f) + (has_second ? d[tile][2 + i] : 0.f);
#pragma unroll
      for (int distance = 4; distance < kWarp; distance *= 2) {
        sum += __shfl_xor_sync(kFullWarp, sum, distance);
      }
      if (g == 0) {
        sums[warp * C + 8 * tile + 2 * t + i] = sum;
      }
    }
  }
  __syncthreads();
  for (int pair = threadIdx.x; pair < C / 2; pair += kConvThreads) {
    float mean[2] = {};
    for (int w = 0; w < kConvWarps; ++w) {
      mean[0] += sums[w * C + 2 * pair] * (1.f / kCells);
      mean[1] += sums[w * C + 2 * pair + 1] * (1.f / kCells);
    }
    *reinterpret_cast<u32*>(out + 2 * pair) = pack_pair<T>(mean[0], mean[1]);
  }
}

template <typename T, int C, int D>
PSD_DEVICE void dynamic_conv(const DynamicConvArgs& args) {
  using Plan = ConvPlan<C, D>;
  static_assert(Plan::kElements * sizeof(T) <= 48 * 1024, "static shared memory ends at 48 KB");
  static_assert(kConvWarps * C * sizeof(float) <= Plan::kElements * sizeof(T), "sums of the mean need room");
  PSD_SHARED(T, slots, Plan::kElements);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const i64 region = blockIdx.x;
  const T* tokens = static_cast<const T*>(args.tokens) + region * kCells * C;
  const T* params = static_cast<const T*>(args.params) + region * 2 * C * D;

#pragma unroll
  for (int stage = 0; stage < Plan::kSlots - 1; ++stage) {
    copy_stage<T, C, D>(params, stage, slots + stage * Plan::kSlot);
    commit_copies();
  }
  // All of this warp's X at once: as many loads in flight as the row is long.
  uint4 x[2][C / 32];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp * kRowsPerWarp + g + 8 * half;
#pragma unroll
    for (int block = 0; block < C / 32; ++block) {
      const T* start = tokens + row * C + block * 32 + t * 8;
      x[half][block] = row < kCells ? __ldg(reinterpret_cast<const uint4*>(start)) : make_uint4(0, 0, 0, 0);
    }
  }

  float hidden[D / 8][4] = {};
#pragma unroll
  for (int stage = 0; stage < Plan::kStages1; ++stage) {
    const T* slot = next_stage<T, C, D>(params, stage, slots);
#pragma unroll
    for (int inner = 0; inner < Plan::kRows1 / 32; ++inner) {
      const uint4& first = x[0][stage * (Plan::kRows1 / 32) + inner];
      const uint4& second = x[1][stage * (Plan::kRows1 / 32) + inner];
      const u32 a0[4] = {first.x, second.x, first.y, second.y};
      const u32 a1[4] = {first.z, second.z, first.w, second.w};
      multiply_rows<T, D>(hidden, a0, slot, inner * 32);
      multiply_rows<T, D>(hidden, a1, slot, inner * 32 + 16);
    }
  }
  normalise_rows<D>(hidden, args.weight1, args.bias1, args.epsilon);
  u32 packed[(D + 8) / 16][4];
  pack_hidden<T, D>(hidden, packed);

  float result[C / 8][4] = {};
#pragma unroll
  for (int stage = 0; stage < Plan::kStages2; ++stage) {
    const T* slot = next_stage<T, C, D>(params, Plan::kStages1 + stage, slots);
    if constexpr (D == 8) {
      const u32 a[2] = {packed[0][0], packed[0][1]};
      multiply_eight_rows<T, C>(result, a, slot);
    } else {
#pragma unroll
      for (int inner = 0; inner < Plan::kRows2 / 16; ++inner) {
        multiply_rows<T, C>(result, packed[stage * (Plan::kRows2 / 16) + inner], slot, inner * 16);
      }
    }
  }
  normalise_rows<C>(result, args.weight2, args.bias2, args.epsilon);
  // The slots are about to hold Y.
  __syncthreads();
  if (args.mean_only) {
    store_mean<T, C>(result, reinterpret_cast<float*>(slots), static_cast<T*>(args.out) + region * C);
  } else {
    store_rows<T, C>(result, slots, static_cast<T*>(args.out) + region * kCells * C);
  }
}

// float32: for comparisons and for training without autocast; plain loops, no tensor cores, bound by arithmetic.
// One block a region, one warp a token row at a time.
template <int C, int D>
PSD_DEVICE void dynamic_conv_float(const DynamicConvArgs& args) {
  constexpr int kWarps = kConvWarps;
  PSD_SHARED(float, rows, kWarps * C);
  PSD_SHARED(float, hidden, kWarps * D);
  PSD_SHARED(float, sums, kWarps * C);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const i64 region = blockIdx.x;
  const float* tokens = static_cast<const float*>(args.tokens) + region * kCells * C;
  const float* first = static_cast<const float*>(args.params) + region * 2 * C * D;
  const float* second = first + C * D;
  float* out = static_cast<float*>(args.out) + region * (args.mean_only ? C : kCells * C);
  float total[C / kWarp] = {};
  for (int row = warp; row < kCells; row += kWarps) {
    for (int c = lane; c < C; c += kWarp) {
      rows[warp * C + c] = tokens[row * C + c];
    }
    __syncwarp();
    for (int d = lane; d < D; d += kWarp) {
      float sum = 0.f;
      for (int c = 0; c < C; ++c) {
        sum += rows[warp * C + c] * first[c * D + d];
      }
      hidden[warp * D + d] = sum;
    }
    __syncwarp();
    float mean = 0.f, squares = 0.f;
    for (int d = lane; d < D; d += kWarp) {
      mean += hidden[warp * D + d];
    }
    mean = sum_of_lanes<kWarp>(mean) / D;
    for (int d = lane; d < D; d += kWarp) {
      squares += (hidden[warp * D + d] - mean) * (hidden[warp * D + d] - mean);
    }
    float scale = rsqrtf(sum_of_lanes<kWarp>(squares) / D + args.epsilon);
    for (int d = lane; d < D; d += kWarp) {
      const float value = (hidden[warp * D + d] - mean) * scale;
      hidden[warp * D + d] = fmaxf(value * args.weight1[d] + args.bias1[d], 0.f);
    }
    __syncwarp();
    float result[C / kWarp] = {};
    for (int d = 0; d < D; ++d) {
      const float share = hidden[warp * D + d];
      for (int i = 0; i < C / kWarp; ++i) {
        result[i] += share * second[d * C + lane + i * kWarp];
      }
    }
    mean = 0.f;
    squares = 0.f;
    for (int i = 0; i < C / kWarp; ++i) {
      mean += result[i];
    }
    mean = sum_of_lanes<kWarp>(mean) / C;
    for (int i = 0; i < C / kWarp; ++i) {
      squares += (result[i] - mean) * (result[i] - mean);
    }
    scale = rsqrtf(sum_of_lanes<kWarp>(squares) / C + args.epsilon);
    for (int i = 0; i < C / kWarp; ++i) {
      const int c = lane + i * kWarp;
      const float value = fmaxf((result[i] - mean) * scale * args.weight2[c] + args.bias2[c], 0.f);
      total[i] += value;
      if (!args.mean_only) {
        out[row * C + c] = value;
      }
    }
    // The row of this warp is read no more.
    __syncwarp();
  }
  if (!args.mean_only) {
    return;
  }
  for (int i = 0; i < C / kWarp; ++i) {
    sums[warp * C + lane + i * kWarp] = total[i];
  }
  __syncthreads();
  for (int c = threadIdx.x; c < C; c += kConvThreads) {
    float sum = 0.f;
    for (int w = 0; w < kWarps; ++w) {
      sum += sums[w * C + c];
    }
    out[c] = sum / kCells;
  }
}

}  // namespace psdiff
