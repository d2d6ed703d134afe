// Multi-level ROIAlign on channels-last features: each box is pooled from the pyramid level of its size.
//
// Computes kernels/reference.py:multilevel_roi_align, half-pixel aligned, 7x7 cells, R x R samples a cell; the boxes
// stay float32 whatever the features are, since half-precision coordinates miss by up to a cell on a fine level.
//
// Launch: grid (M regions, slices of 128 bytes of channels), 224 threads = 28 cells x 8 lanes of 16 bytes. A slice
// sees all cells of its region, so that the corners which neighbouring samples share come from L1; 128 bytes are
// whole sectors. The positions and weights of the 2 * 7R samples are worked out once a block, in shared memory.
//
// Bytes at the target (B = 1, 300 boxes, C = 256, fp16, canvas 640x800): pyramid 21.8 MB read once, 7.5 MB written.
// Roofline of these bytes: Orin 143 us, L4 98 us, A100 14.4 us, H200 6.1 us.
#pragma once
#include "numeric.cuh"

namespace psdiff {

constexpr int kPool = 7;
constexpr int kCells = kPool * kPool;
constexpr int kLevels = 4;
// p2 has stride 4; p4, two levels up, pools boxes of the canonical size.
constexpr float kFinestScale = 0.25f;

constexpr int kRoiLanes = 8;
constexpr int kRoiCellsPerRound = 28;
constexpr int kRoiThreads = kRoiLanes * kRoiCellsPerRound;

struct RoiAlignArgs {
  const void* levels[kLevels];  // (B, h, w, C), 16-byte aligned
  const float* boxes_xyxy;      // (B, N, 4) canvas pixels
  void* tokens;                 // (B*N, 49, C)
  int heights[kLevels];
  int widths[kLevels];
  int boxes_per_image;
  int channels;  // a multiple of what 16 bytes hold
  float canonical_size;
};

struct RoiAlignGradArgs {
  const void* grad_tokens;         // (B*N, 49, C)
  const float* boxes_xyxy;         // (B, N, 4)
  float* grad_levels[kLevels];     // (B, h, w, C), zero before, summed into
  int heights[kLevels];
  int widths[kLevels];
  int boxes_per_image;
  int channels;
  float canonical_size;
};

// A sample along one axis: the two cells around it and their shares of a pooled cell.
struct __align__(16) Sample {
  int low;
  int high;
  float low_weight;
  float high_weight;
};

PSD_DEVICE int pyramid_level(const float* box, float canonical_size) {
  const float width = fmaxf(box[2] - box[0], 0.f);
  const float height = fmaxf(box[3] - box[1], 0.f);
  const float side = sqrtf(width * height);
  return (side >= 0.5f * canonical_size) + (side >= canonical_size) + (side >= 2.f * canonical_size);
}

// Torchvision's rule: up to one cell outside counts as the border, beyond it as zero. A NaN lies outside.
PSD_DEVICE Sample sample_at(float position, int size, float share) {
  if (!(position >= -1.f && position <= float(size))) {
    return Sample{0, 0, 0.f, 0.f};
  }
  const float clamped = fmaxf(position, 0.f);
  const int low = int(clamped);
  if (low >= size - 1) {
    return Sample{size - 1, size - 1, share, 0.f};
  }
  const float fraction = clamped - float(low);
  return Sample{low, low + 1, share * (1.f - fraction), share * fraction};
}

// Work out the samples of this block's box, first those along y, then those along x, 7R each; returns its level.
template <int kRatio, typename Args>
PSD_DEVICE int sample_box(const Args& args, Sample* axis) {
  constexpr int kSamples = kPool * kRatio;
  const float* box = args.boxes_xyxy + 4 * i64(blockIdx.x);
  const int level = pyramid_level(box, args.canonical_size);
  const float scale = kFinestScale / float(1 << level);
  for (int i = threadIdx.x; i < 2 * kSamples; i += kRoiThreads) {
    const bool is_x = i >= kSamples;
    const int k = is_x ? i - kSamples : i;
    const float first = box[is_x ? 0 : 1] * scale - 0.5f;
    const float last = box[is_x ? 2 : 3] * scale - 0.5f;
    const float cell = (last - first) / float(kPool);
    const float position = first + (float(k) + 0.5f) * cell / float(kRatio);
    axis[i] = sample_at(position, is_x ? args.widths[level] : args.heights[level], 1.f / float(kRatio));
  }
  __syncthreads();
  return level;
}

// The first of the channels that this thread pools.
template <typename T>
PSD_DEVICE int own_channel() {
  return (blockIdx.y * kRoiLanes + threadIdx.x % kRoiLanes) * Vector<T>::kCount;
}

// Where the map of this block's image begins in a level, in elements.
template <typename Args>
PSD_DEVICE i64 own_map(const Args& args, int level) {
  return i64(blockIdx.x / args.boxes_per_image) * args.heights[level] * args.widths[level] * args.channels;
}

// One of the 4 R R feature cells that a pooled cell is the weighted sum of.
struct Corner {
  i64 offset;  // elements from the map's first
  float weight;
};

template <int kRatio>
PSD_DEVICE Corner corner_of(const Sample* axis, int cell, int number, int width, int channels) {
  const int sample = number / 4;
  const Sample y = axis[cell / kPool * kRatio + sample / kRatio];
  const Sample x = axis[kPool * kRatio + cell % kPool * kRatio + sample % kRatio];
  const bool is_lower = number / 2 % 2, is_right = number % 2;
  const int row = is_lower ? y.high : y.low;
  const int column = is_right ? x.high : x.low;
  const float weight = (is_lower ? y.high_weight : y.low_weight) * (is_right ? x.high_weight : x.low_weight);
  return Corner{i64(row * width + column) * channels, weight};
}

template <typename T, int kRatio>
PSD_DEVICE void roi_align(const RoiAlignArgs& args) {
  constexpr int kCount = Vector<T>::kCount;
  PSD_SHARED(Sample, axis, 2 * kPool * kRatio);
  const int level = sample_box<kRatio>(args, axis);
  const int channel = own_channel<T>();
  if (channel >= args.channels) {
    return;
  }
  const T* map = static_cast<const T*>(args.levels[level]) + own_map(args, level) + channel;
  T* tokens = static_cast<T*>(args.tokens) + i64(blockIdx.x) * kCells * args.channels + channel;
  for (int cell = threadIdx.x / kRoiLanes; cell < kCells; cell += kRoiCellsPerRound) {
    float sum[kCount] = {};
#pragma unroll
    for (int number = 0; number < 4 * kRatio * kRatio; ++number) {
      const Corner corner = corner_of<kRatio>(axis, cell, number, args.widths[level], args.channels);
      float values[kCount];
      Vector<T>::unpack(__ldg(reinterpret_cast<const uint4*>(map + corner.offset)), values);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        sum[i] += corner.weight * values[i];
      }
    }
    store_vector(tokens + i64(cell) * args.channels, Vector<T>::pack(sum));
  }
}

// The transpose of roi_align: every cell gives its gradient to the corners it came from. Sums run in float32 by
// atomic additions, whose order is not fixed: the last bits differ from run to run.
template <typename T, int kRatio>
PSD_DEVICE void roi_align_grad(const RoiAlignGradArgs& args) {
  constexpr int kCount = Vector<T>::kCount;
  PSD_SHARED(Sample, axis, 2 * kPool * kRatio);
  const int level = sample_box<kRatio>(args, axis);
  const int channel = own_channel<T>();
  if (channel >= args.channels) {
    return;
  }
  float* map = args.grad_levels[level] + own_map(args, level) + channel;
  const T* tokens = static_cast<const T*>(args.grad_tokens) + i64(blockIdx.x) * kCells * args.channels + channel;
  for (int cell = threadIdx.x / kRoiLanes; cell < kCells; cell += kRoiCellsPerRound) {
    float grad[kCount];
    Vector<T>::unpack(__ldg(reinterpret_cast<const uint4*>(tokens + i64(cell) * args.channels)), grad);
    for (int number = 0; number < 4 * kRatio * kRatio; ++number) {
      const Corner corner = corner_of<kRatio>(axis, cell, number, args.widths[level], args.channels);
      // Samples outside the map have no weight; their additions would all meet at its first cell.
      if (corner.weight == 0.f) {
        continue;
      }
      for (int i = 0; i < kCount; ++i) {
        atomicAdd(map + corner.offset + i, corner.weight * grad[i]);
      }
    }
  }
}

}  // namespace psdiff
