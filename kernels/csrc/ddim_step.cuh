// What follows the heads of a denoising step: move the boxes, decode, normalise, and one DDIM step for both states.
//
// Computes kernels/reference_frame.py:ddim_step. Everything is float32 but the outputs of the heads, which may be
// half precision; near t = T the schedule does not survive half precision.
//
// Launch: a warp a proposal, 4 warps a block; lanes take 4 embedding values at a time. The embedding is read twice,
// for its length and for its step; the second time it comes from L1.
//
// Bytes at the target (300 proposals, E = 256, heads in 16 bits): 0.47 MB read, 0.63 MB written. Roofline: Orin 5.3 us,
// L4 3.6 us, A100 0.5 us, H200 0.2 us; the launch itself takes longer, so what counts is that it is one.
#pragma once
#include "numeric.cuh"

namespace psdiff {

constexpr int kStepWarps = 4;
constexpr int kStepThreads = kStepWarps * kWarp;

// As in models/denoiser.py and models/diffusion.py.
constexpr float kCentreWeight = 2.f;
constexpr float kMostLogSize = 8.740336742730447f;  // log(100000 / 16)
constexpr float kLeastSide = 1e-4f;
constexpr float kLeastLength = 1e-12f;

struct DdimStepArgs {
  const float* boxes_t;    // (B*N, 4) cxcywh in signal space, unclamped
  const float* emb_t;      // (B*N, E) in signal space
  const void* logits;      // (B*N,)
  const void* deltas;      // (B*N, 4)
  const void* embeddings;  // (B*N, E) predicted, not normalised
  const float* levels;     // (B, 4): signal and noise at t, signal and noise at t_next
  float* boxes_next;       // (B*N, 4)
  float* emb_next;         // (B*N, E)
  float* boxes_xyxy;       // (B*N, 4) normalised on the canvas, not clipped
  float* scores;           // (B*N,)
  float* unit_embeddings;  // (B*N, E)
  int proposals;           // B*N
  int proposals_per_image;
  int embedding_dim;  // a multiple of 4
  float box_scale;
  float embedding_scale;
};

struct Level {
  float signal, noise, next_signal, next_noise;
};

// DDIM with eta 0 and a predicted clean value (Song et al., arXiv:2010.02502, eq. 12).
PSD_DEVICE float ddim(float x_t, float x_0, const Level& level) {
  const float predicted_noise = (x_t - level.signal * x_0) / level.noise;
  return level.next_signal * x_0 + level.next_noise * predicted_noise;
}

// As torch.clamp: a NaN stays one, where fmaxf and fminf would turn it into the limit and hide it.
PSD_DEVICE float at_least(float x, float limit) { return x < limit ? limit : x; }
PSD_DEVICE float at_most(float x, float limit) { return x > limit ? limit : x; }
PSD_DEVICE float clamped(float x, float limit) { return at_most(at_least(x, -limit), limit); }

// Four neighbours of a row, which one load of 8 or 16 bytes brings.
template <typename T>
struct __align__(4 * sizeof(T)) Quad {
  T values[4];
};

template <typename T>
PSD_DEVICE float4 load_quad(const T* from) {
  const Quad<T> quad = *reinterpret_cast<const Quad<T>*>(from);
  return make_float4(to_float(quad.values[0]), to_float(quad.values[1]), to_float(quad.values[2]),
                     to_float(quad.values[3]));
}

// Along one axis: decode a noisy box, move it by the deltas, and return its two edges.
struct Edges {
  float low, high;
};
PSD_DEVICE Edges moved_edges(float centre_t, float extent_t, float delta, float log_size, float box_scale) {
  const float centre = (clamped(centre_t, box_scale) / box_scale + 1.f) / 2.f;
  const float size = at_least((clamped(extent_t, box_scale) / box_scale + 1.f) / 2.f, kLeastSide);
  // The reference goes by the edges and so does this: the last digits are the same.
  const float low = centre - size / 2.f, high = centre + size / 2.f;
  const float side = high - low;
  const float new_centre = (low + high) / 2.f + delta / kCentreWeight * side;
  const float half = side * expf(at_most(log_size, kMostLogSize)) / 2.f;
  return Edges{new_centre - half, new_centre + half};
}

template <typename T>
PSD_DEVICE void step_box(const DdimStepArgs& args, i64 proposal, const Level& level) {
  const float4 deltas = load_quad(static_cast<const T*>(args.deltas) + 4 * proposal);
  const float4 box_t = *reinterpret_cast<const float4*>(args.boxes_t + 4 * proposal);
  const float scale = args.box_scale;
  const Edges x = moved_edges(box_t.x, box_t.z, deltas.x, deltas.z, scale);
  const Edges y = moved_edges(box_t.y, box_t.w, deltas.y, deltas.w, scale);
  *reinterpret_cast<float4*>(args.boxes_xyxy + 4 * proposal) = make_float4(x.low, y.low, x.high, y.high);
  const float centre_x = clamped(scale * (2.f * ((x.low + x.high) / 2.f) - 1.f), scale);
  const float centre_y = clamped(scale * (2.f * ((y.low + y.high) / 2.f) - 1.f), scale);
  const float width = clamped(scale * (2.f * (x.high - x.low) - 1.f), scale);
  const float height = clamped(scale * (2.f * (y.high - y.low) - 1.f), scale);
  *reinterpret_cast<float4*>(args.boxes_next + 4 * proposal) =
      make_float4(ddim(box_t.x, centre_x, level), ddim(box_t.y, centre_y, level), ddim(box_t.z, width, level),
                  ddim(box_t.w, height, level));
  const float logit = to_float(static_cast<const T*>(args.logits)[proposal]);
  args.scores[proposal] = 1.f / (1.f + expf(-logit));
}

template <typename T>
PSD_DEVICE void step_embedding(const DdimStepArgs& args, i64 proposal, const Level& level) {
  const int lane = threadIdx.x % kWarp, dim = args.embedding_dim;
  const T* predicted = static_cast<const T*>(args.embeddings) + proposal * dim;
  const float* emb_t = args.emb_t + proposal * dim;
  float squares = 0.f;
  for (int first = 4 * lane; first < dim; first += 4 * kWarp) {
    const float4 value = load_quad(predicted + first);
    squares += value.x * value.x + value.y * value.y + value.z * value.z + value.w * value.w;
  }
  const float length = at_least(sqrtf(sum_of_lanes<kWarp>(squares)), kLeastLength);
  for (int first = 4 * lane; first < dim; first += 4 * kWarp) {
    const float4 x_t = *reinterpret_cast<const float4*>(emb_t + first);
    const float4 value = load_quad(predicted + first);
    const float4 unit = make_float4(value.x / length, value.y / length, value.z / length, value.w / length);
    const float scale = args.embedding_scale;
    *reinterpret_cast<float4*>(args.unit_embeddings + proposal * dim + first) = unit;
    *reinterpret_cast<float4*>(args.emb_next + proposal * dim + first) =
        make_float4(ddim(x_t.x, scale * unit.x, level), ddim(x_t.y, scale * unit.y, level),
                    ddim(x_t.z, scale * unit.z, level), ddim(x_t.w, scale * unit.w, level));
  }
}

template <typename T>
PSD_DEVICE void ddim_step(const DdimStepArgs& args) {
  const i64 proposal = i64(blockIdx.x) * kStepWarps + threadIdx.x / kWarp;
  if (proposal >= args.proposals) {
    return;
  }
  const float* levels = args.levels + proposal / args.proposals_per_image * 4;
  const Level level{levels[0], levels[1], levels[2], levels[3]};
  if (threadIdx.x % kWarp == 0) {
    step_box<T>(args, proposal, level);
  }
  step_embedding<T>(args, proposal, level);
}

}  // namespace psdiff
