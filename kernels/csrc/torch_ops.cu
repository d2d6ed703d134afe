// The kernels as functions of PyTorch tensors, module psdiff.kernels._C; kernels/ops.py makes operators of them.
//
// They run on PyTorch's current stream and may be captured in a CUDA graph. Bad arguments raise ValueError.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/extension.h>

#include "entries.cu"

namespace {

using at::Tensor;

// kernels/launches.py has the same limits.
constexpr int64_t kMostRegions = 1 << 20;
constexpr int kVectorBytes = 16;
constexpr int kSliceBytes = 128;

void check_tensor(const Tensor& tensor, const char* name, at::IntArrayRef shape, at::ScalarType dtype,
                  const at::Device& device) {
  TORCH_CHECK_VALUE(tensor.device() == device, name, " must be on ", device, ", got ", tensor.device());
  TORCH_CHECK_VALUE(tensor.scalar_type() == dtype, name, " must be ", dtype, ", got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.sizes() == shape, name, " must be of shape ", shape, ", got ", tensor.sizes());
  TORCH_CHECK_VALUE(tensor.is_contiguous(), name, " must be contiguous, got strides ", tensor.strides());
  TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kVectorBytes == 0, name,
                    " must start at a multiple of 16 bytes");
}

void check_floating(const Tensor& tensor, const char* name) {
  const auto dtype = tensor.scalar_type();
  TORCH_CHECK_VALUE(tensor.is_cuda(), name, " must be on CUDA, got ", tensor.device());
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16, name,
                    " must be float32, float16 or bfloat16, got ", dtype);
}

void check_regions(const char* name, int64_t regions) {
  TORCH_CHECK_VALUE(regions <= kMostRegions, name, " must hold at most ", kMostRegions, " regions, got ", regions);
}

void check_vectors(int64_t channels, int64_t item_bytes) {
  const int64_t vector = kVectorBytes / item_bytes;
  TORCH_CHECK_VALUE(channels > 0 && channels % vector == 0, "channels must be a multiple of ", vector, ", got ",
                    channels);
}

// Shape of the boxes and the settings of pooling; returns the number of regions.
int64_t check_pooling(const Tensor& boxes, int64_t batch, int64_t sampling_ratio, double canonical_size,
                      const at::Device& device) {
  TORCH_CHECK_VALUE(boxes.dim() == 3, "boxes_xyxy must be of shape (B, N, 4), got ", boxes.sizes());
  check_tensor(boxes, "boxes_xyxy", {batch, boxes.size(1), 4}, at::kFloat, device);
  check_regions("boxes_xyxy", batch * boxes.size(1));
  TORCH_CHECK_VALUE(sampling_ratio == 1 || sampling_ratio == 2, "sampling_ratio must be 1 or 2, got ",
                    sampling_ratio);
  TORCH_CHECK_VALUE(canonical_size > 0, "canonical_size must be above 0, got ", canonical_size);
  return batch * boxes.size(1);
}

dim3 pooling_grid(int64_t regions, int64_t channels, int64_t item_bytes) {
  return dim3(regions, (channels * item_bytes + kSliceBytes - 1) / kSliceBytes);
}

template <typename Args>
void fill_pooling(Args& args, const Tensor& boxes, int64_t channels, double canonical_size) {
  args.boxes_xyxy = boxes.const_data_ptr<float>();
  args.boxes_per_image = int(boxes.size(1));
  args.channels = int(channels);
  args.canonical_size = float(canonical_size);
}

#define PSD_START(name, type, ratio, grid, args)                                                    \
  psdiff_##name##_##type##_r##ratio<<<grid, psdiff::kRoiThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(args)
#define PSD_START_FOR(name, dtype, ratio, grid, args)                                               \
  if (dtype == at::kFloat) {                                                                        \
    ratio == 1 ? PSD_START(name, f32, 1, grid, args) : PSD_START(name, f32, 2, grid, args);         \
  } else if (dtype == at::kHalf) {                                                                  \
    ratio == 1 ? PSD_START(name, f16, 1, grid, args) : PSD_START(name, f16, 2, grid, args);         \
  } else {                                                                                          \
    ratio == 1 ? PSD_START(name, bf16, 1, grid, args) : PSD_START(name, bf16, 2, grid, args);       \
  }                                                                                                 \
  C10_CUDA_KERNEL_LAUNCH_CHECK()

Tensor roi_align(const std::vector<Tensor>& maps, const Tensor& boxes, int64_t pool_size, int64_t sampling_ratio,
                 double canonical_size) {
  TORCH_CHECK_VALUE(maps.size() == psdiff::kLevels, "maps must be 4 tensors, p2 to p5, got ", maps.size());
  TORCH_CHECK_VALUE(pool_size == psdiff::kPool, "pool_size must be 7, got ", pool_size);
  check_floating(maps[0], "maps[0]");
  TORCH_CHECK_VALUE(maps[0].dim() == 4, "maps[0] must be of shape (B, h, w, C), got ", maps[0].sizes());
  const auto batch = maps[0].size(0), channels = maps[0].size(3);
  const auto dtype = maps[0].scalar_type();
  check_vectors(channels, maps[0].element_size());
  psdiff::RoiAlignArgs args;
  for (int level = 0; level < psdiff::kLevels; ++level) {
    const auto name = "maps[" + std::to_string(level) + "]";
    TORCH_CHECK_VALUE(maps[level].dim() == 4, name, " must be of shape (B, h, w, C), got ", maps[level].sizes());
    const auto height = maps[level].size(1), width = maps[level].size(2);
    check_tensor(maps[level], name.c_str(), {batch, height, width, channels}, dtype, maps[0].device());
    args.levels[level] = maps[level].const_data_ptr();
    args.heights[level] = int(height);
    args.widths[level] = int(width);
  }
  const auto regions = check_pooling(boxes, batch, sampling_ratio, canonical_size, maps[0].device());
  const c10::cuda::CUDAGuard guard(maps[0].device());
  Tensor tokens = at::empty({regions, psdiff::kCells, channels}, maps[0].options());
  if (regions == 0) {
    return tokens;
  }
  args.tokens = tokens.mutable_data_ptr();
  fill_pooling(args, boxes, channels, canonical_size);
  const dim3 grid = pooling_grid(regions, channels, maps[0].element_size());
  PSD_START_FOR(roi_align, dtype, sampling_ratio, grid, args);
  return tokens;
}

std::vector<Tensor> roi_align_grad(const Tensor& grad, const Tensor& boxes, const std::vector<int64_t>& heights,
                                   const std::vector<int64_t>& widths, int64_t sampling_ratio,
                                   double canonical_size) {
  TORCH_CHECK_VALUE(heights.size() == psdiff::kLevels && widths.size() == psdiff::kLevels,
                    "heights and widths must be 4 each, p2 to p5, got ", heights.size(), " and ", widths.size());
  check_floating(grad, "grad_tokens");
  TORCH_CHECK_VALUE(grad.dim() == 3, "grad_tokens must be of shape (M, 49, C), got ", grad.sizes());
  const auto batch = boxes.size(0), channels = grad.size(2);
  check_vectors(channels, grad.element_size());
  const auto regions = check_pooling(boxes, batch, sampling_ratio, canonical_size, grad.device());
  check_tensor(grad, "grad_tokens", {regions, psdiff::kCells, channels}, grad.scalar_type(), grad.device());
  const c10::cuda::CUDAGuard guard(grad.device());
  psdiff::RoiAlignGradArgs args;
  std::vector<Tensor> maps;
  for (int level = 0; level < psdiff::kLevels; ++level) {
    maps.push_back(at::zeros({batch, heights[level], widths[level], channels}, grad.options().dtype(at::kFloat)));
    args.grad_levels[level] = maps[level].mutable_data_ptr<float>();
    args.heights[level] = int(heights[level]);
    args.widths[level] = int(widths[level]);
  }
  if (regions == 0) {
    return maps;
  }
  args.grad_tokens = grad.const_data_ptr();
  fill_pooling(args, boxes, channels, canonical_size);
  const dim3 grid = pooling_grid(regions, channels, grad.element_size());
  PSD_START_FOR(roi_align_grad, grad.scalar_type(), sampling_ratio, grid, args);
  return maps;
}

using ConvKernel = void (*)(psdiff::DynamicConvArgs);

// The kernel of a size and type, or null where that size was not built.
ConvKernel conv_kernel(int64_t channels, int64_t width, at::ScalarType dtype) {
#define PSD_CHOOSE(C, D)                                            \
  if (channels == C && width == D) {                                \
    return dtype == at::kFloat  ? psdiff_dynamic_conv_f32_c##C##_d##D \
           : dtype == at::kHalf ? psdiff_dynamic_conv_f16_c##C##_d##D \
                                : psdiff_dynamic_conv_bf16_c##C##_d##D; \
  }
  PSD_EACH_DYNAMIC_CONV(PSD_CHOOSE)
#undef PSD_CHOOSE
  return nullptr;
}

bool has_dynamic_conv(int64_t channels, int64_t width) { return conv_kernel(channels, width, at::kHalf) != nullptr; }

Tensor dynamic_conv(const Tensor& tokens, const Tensor& params, const Tensor& weight1, const Tensor& bias1,
                    const Tensor& weight2, const Tensor& bias2, double epsilon, bool mean_only) {
  check_floating(tokens, "tokens");
  TORCH_CHECK_VALUE(tokens.dim() == 3, "tokens must be of shape (M, 49, C), got ", tokens.sizes());
  const auto regions = tokens.size(0), channels = tokens.size(2), width = weight1.numel();
  const auto dtype = tokens.scalar_type();
  const auto device = tokens.device();
  check_regions("tokens", regions);
  check_tensor(tokens, "tokens", {regions, psdiff::kCells, channels}, dtype, device);
  check_tensor(params, "params", {regions, 2 * channels * width}, dtype, device);
  check_tensor(weight1, "weight1", {width}, at::kFloat, device);
  check_tensor(bias1, "bias1", {width}, at::kFloat, device);
  check_tensor(weight2, "weight2", {channels}, at::kFloat, device);
  check_tensor(bias2, "bias2", {channels}, at::kFloat, device);
  const ConvKernel kernel = conv_kernel(channels, width, dtype);
  TORCH_CHECK_VALUE(kernel, "channels and width must be a size of PSD_EACH_DYNAMIC_CONV in csrc/entries.cu, got ",
                    channels, " and ", width);
  const c10::cuda::CUDAGuard guard(device);
  Tensor out = mean_only ? at::empty({regions, channels}, tokens.options()) : at::empty_like(tokens);
  if (regions == 0) {
    return out;
  }
  psdiff::DynamicConvArgs args;
  args.tokens = tokens.const_data_ptr();
  args.params = params.const_data_ptr();
  args.weight1 = weight1.const_data_ptr<float>();
  args.bias1 = bias1.const_data_ptr<float>();
  args.weight2 = weight2.const_data_ptr<float>();
  args.bias2 = bias2.const_data_ptr<float>();
  args.out = out.mutable_data_ptr();
  args.epsilon = float(epsilon);
  args.mean_only = mean_only;
  kernel<<<dim3(regions), psdiff::kConvThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(args);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

// The tail of a denoising step: boxes_next, emb_next, boxes_xyxy, scores, unit embeddings.
std::vector<Tensor> ddim_step(const Tensor& boxes_t, const Tensor& emb_t, const Tensor& logits, const Tensor& deltas,
                              const Tensor& embeddings, const Tensor& levels, double box_scale,
                              double embedding_scale) {
  check_floating(logits, "logits");
  TORCH_CHECK_VALUE(emb_t.dim() == 3, "emb_t must be of shape (B, N, E), got ", emb_t.sizes());
  const auto batch = emb_t.size(0), count = emb_t.size(1), dim = emb_t.size(2);
  const auto dtype = logits.scalar_type();
  const auto device = logits.device();
  TORCH_CHECK_VALUE(dim > 0 && dim % 4 == 0, "embedding_dim must be a multiple of 4, got ", dim);
  TORCH_CHECK_VALUE(box_scale > 0 && embedding_scale > 0, "box_scale and embedding_scale must be above 0, got ",
                    box_scale, " and ", embedding_scale);
  check_regions("emb_t", batch * count);
  check_tensor(boxes_t, "boxes_t", {batch, count, 4}, at::kFloat, device);
  check_tensor(emb_t, "emb_t", {batch, count, dim}, at::kFloat, device);
  check_tensor(logits, "logits", {batch, count}, dtype, device);
  check_tensor(deltas, "deltas", {batch, count, 4}, dtype, device);
  check_tensor(embeddings, "embeddings", {batch, count, dim}, dtype, device);
  check_tensor(levels, "levels", {batch, 4}, at::kFloat, device);
  const c10::cuda::CUDAGuard guard(device);
  const std::vector<Tensor> outputs = {at::empty_like(boxes_t), at::empty_like(emb_t), at::empty_like(boxes_t),
                                       at::empty({batch, count}, boxes_t.options()), at::empty_like(emb_t)};
  if (batch * count == 0) {
    return outputs;
  }
  psdiff::DdimStepArgs args;
  args.boxes_t = boxes_t.const_data_ptr<float>();
  args.emb_t = emb_t.const_data_ptr<float>();
  args.logits = logits.const_data_ptr();
  args.deltas = deltas.const_data_ptr();
  args.embeddings = embeddings.const_data_ptr();
  args.levels = levels.const_data_ptr<float>();
  args.boxes_next = outputs[0].mutable_data_ptr<float>();
  args.emb_next = outputs[1].mutable_data_ptr<float>();
  args.boxes_xyxy = outputs[2].mutable_data_ptr<float>();
  args.scores = outputs[3].mutable_data_ptr<float>();
  args.unit_embeddings = outputs[4].mutable_data_ptr<float>();
  args.proposals = int(batch * count);
  args.proposals_per_image = int(count);
  args.embedding_dim = int(dim);
  args.box_scale = float(box_scale);
  args.embedding_scale = float(embedding_scale);
  const auto kernel = dtype == at::kFloat  ? psdiff_ddim_step_f32
                      : dtype == at::kHalf ? psdiff_ddim_step_f16
                                           : psdiff_ddim_step_bf16;
  const auto blocks = (batch * count + psdiff::kStepWarps - 1) / psdiff::kStepWarps;
  kernel<<<dim3(blocks), psdiff::kStepThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(args);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return outputs;
}

// (h, w, 3) RGB frame -> (height, width, 3) canvas, both uint8; where it is placed comes from frame_launches.py.
Tensor letterbox(const Tensor& frame, int64_t width, int64_t height, int64_t placed_width, int64_t placed_height) {
  TORCH_CHECK_VALUE(frame.is_cuda(), "frame must be on CUDA, got ", frame.device());
  TORCH_CHECK_VALUE(frame.scalar_type() == at::kByte, "frame must be uint8, got ", frame.scalar_type());
  TORCH_CHECK_VALUE(frame.dim() == 3 && frame.size(2) == 3 && frame.numel() > 0,
                    "frame must be of shape (h, w, 3) with pixels in it, got ", frame.sizes());
  TORCH_CHECK_VALUE(frame.is_contiguous(), "frame must be contiguous, got strides ", frame.strides());
  TORCH_CHECK_VALUE(placed_width >= 1 && placed_width <= width && placed_height >= 1 && placed_height <= height,
                    "the frame must lie on the canvas, got ", placed_width, "x", placed_height, " on ", width, "x",
                    height);
  const c10::cuda::CUDAGuard guard(frame.device());
  Tensor canvas = at::empty({height, width, 3}, frame.options());
  psdiff::LetterboxArgs args{};
  args.first_plane = frame.const_data_ptr();
  args.canvas = canvas.mutable_data_ptr();
  args.first_pitch = int(3 * frame.size(1));
  args.frame_width = int(frame.size(1));
  args.frame_height = int(frame.size(0));
  args.placed_width = int(placed_width);
  args.placed_height = int(placed_height);
  args.width = int(width);
  args.height = int(height);
  const auto blocks = (width * height + psdiff::kLetterboxThreads - 1) / psdiff::kLetterboxThreads;
  const auto stream = c10::cuda::getCurrentCUDAStream();
  psdiff_letterbox_rgb8_u8<<<dim3(blocks), psdiff::kLetterboxThreads, 0, stream>>>(args);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return canvas;
}

// What setup.py built for, as "8.0;9.0".
std::vector<std::string> architectures() {
  std::vector<std::string> names;
  std::stringstream list(PSD_ARCHITECTURES);
  for (std::string name; std::getline(list, name, ';');) {
    names.push_back(name);
  }
  return names;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("roi_align", &roi_align);
  module.def("roi_align_grad", &roi_align_grad);
  module.def("dynamic_conv", &dynamic_conv);
  module.def("has_dynamic_conv", &has_dynamic_conv);
  module.def("ddim_step", &ddim_step);
  module.def("letterbox", &letterbox);
  module.def("architectures", &architectures);
}
