// The rules of the two TensorRT plugins over plain numbers: fields, types, shapes, limits, which kernel to launch.
//
// trt_plugin.cu passes them on to TensorRT. No header of TensorRT or of CUDA is needed here, so g++ tests every rule.
// Whatever a user can get wrong throws std::invalid_argument, "<name> must be <what>, got <value>".
// Legend: B images, N boxes an image, M = B*N regions, C channels, D dynamic width, h x w cells of a level.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace psdiff::plugin {

// TensorRT finds a plugin by its node's type and by these two; the empty namespace is the one that a node has which
// names none, so an exported node needs no attribute for it.
constexpr const char* kNamespace = "";
constexpr const char* kVersion = "1";
constexpr int kNumOutputs = 1;

// What the kernels are built for; trt_plugin.cu holds them against the headers of the kernels.
constexpr int64_t kTokens = 49;
constexpr int kNumLevels = 4;
constexpr int64_t kVectorBytes = 16;
constexpr int64_t kSliceBytes = 128;
constexpr unsigned kPoolingThreads = 224;
constexpr unsigned kConvolvingThreads = 128;

// A million regions of 49 x 256 tokens of 16 bits are 26 GB: more is a mistake of shapes.
constexpr int64_t kMostRegions = int64_t(1) << 20;
// The kernel counts the cells of a level in an int.
constexpr int64_t kMostCells = INT32_MAX;

struct ConvSize {
  int64_t channels;
  int64_t width;
};
// (C, D) of the dynamic convolutions in entries.cu.
#if defined(PSD_CHANNELS)
constexpr ConvSize kConvSizes[] = {{PSD_CHANNELS, PSD_WIDTH}};
#else
constexpr ConvSize kConvSizes[] = {{96, 8}, {128, 8}, {128, 64}, {256, 8}, {256, 64}};
#endif

// ---- tensors ----

enum class Type { kFloat32, kFloat16, kBFloat16, kOther };

constexpr const char* name_of(Type type) {
  constexpr const char* names[] = {"fp32", "fp16", "bf16", "another type"};
  return names[int(type)];
}

// As the names of the kernels spell it.
constexpr const char* suffix_of(Type type) {
  constexpr const char* suffixes[] = {"f32", "f16", "bf16", "none"};
  return suffixes[int(type)];
}

constexpr int64_t item_bytes(Type type) { return type == Type::kFloat32 ? 4 : 2; }

// While an engine is built, the size of a dynamic dimension is not known.
constexpr int64_t kUnknown = -1;
constexpr int kMostDims = 8;

struct Shape {
  int rank = 0;
  int64_t sizes[kMostDims] = {};

  Shape() = default;
  Shape(std::initializer_list<int64_t> values) {
    for (const int64_t value : values) {
      sizes[rank++] = value;
    }
  }
  int64_t operator[](int axis) const { return sizes[axis]; }
};

inline std::string text_of(const Shape& shape) {
  std::string text = "(";
  for (int axis = 0; axis < shape.rank; ++axis) {
    text += (axis ? ", " : "") + (shape[axis] == kUnknown ? "?" : std::to_string(shape[axis]));
  }
  return text + ")";
}

[[noreturn]] inline void refuse(const std::string& name, const std::string& what, const std::string& got) {
  throw std::invalid_argument(name + " must be " + what + ", got " + got);
}

constexpr bool may_equal(int64_t a, int64_t b) { return a == b || a == kUnknown || b == kUnknown; }

inline void expect_shape(const char* name, const Shape& got, const Shape& wanted) {
  bool fits = got.rank == wanted.rank;
  for (int axis = 0; fits && axis < got.rank; ++axis) {
    fits = may_equal(got[axis], wanted[axis]);
  }
  if (!fits) {
    refuse(name, "of shape " + text_of(wanted), text_of(got));
  }
}

inline void expect_regions(const char* name, int64_t regions) {
  if (regions > kMostRegions) {
    refuse(name, "of at most " + std::to_string(kMostRegions) + " regions", std::to_string(regions));
  }
}

// Kernels load 16 bytes at once.
inline void expect_aligned(const char* name, const void* pointer) {
  const auto rest = reinterpret_cast<uintptr_t>(pointer) % kVectorBytes;
  if (rest) {
    refuse(name, "at a multiple of 16 bytes", std::to_string(rest) + " bytes behind one");
  }
}

// ---- fields: what a node's attributes set and what a plan keeps ----

enum class Kind { kInt32, kFloat32, kOther };

// A field as TensorRT hands it over, and as it takes it to write a plan; all are single numbers.
struct Field {
  const char* name;
  Kind kind;
  const void* data;
  int count;
};

// Where a field lies among the settings.
struct FieldPlace {
  const char* name;
  Kind kind;
  size_t offset;
};

struct RoiAlignSettings {
  int32_t sampling_ratio = 2;
  float canonical_size = 224.f;
};

struct DynamicConvSettings {
  float epsilon = 1e-5f;
  int32_t mean_only = 0;
};

// ---- launches ----

struct Launch {
  std::string entry;  // name of the kernel in entries.cu
  unsigned grid[2];   // no block at all where there is no region
  unsigned threads;
};

// ---- PSRoiAlignCL: p2, p3, p4, p5 (B, h, w, C), boxes_xyxy (B, N, 4) -> (B*N, 49, C) ----

struct RoiAlign {
  using Settings = RoiAlignSettings;
  static constexpr const char* kName = "PSRoiAlignCL";
  static constexpr int kNumInputs = 5;
  static constexpr const char* kInputs[kNumInputs] = {"p2", "p3", "p4", "p5", "boxes_xyxy"};
  static constexpr int kRanks[kNumInputs] = {4, 4, 4, 4, 3};
  // Coordinates of half precision miss by up to a cell.
  static constexpr bool kIsAlwaysFloat32[kNumInputs] = {false, false, false, false, true};
  static constexpr FieldPlace kFields[] = {
      {"sampling_ratio", Kind::kInt32, offsetof(Settings, sampling_ratio)},
      {"canonical_size", Kind::kFloat32, offsetof(Settings, canonical_size)},
  };

  static void check(const Settings& settings) {
    if (settings.sampling_ratio != 1 && settings.sampling_ratio != 2) {
      refuse("sampling_ratio", "1 or 2", std::to_string(settings.sampling_ratio));
    }
    if (!(settings.canonical_size > 0.f && std::isfinite(settings.canonical_size))) {
      refuse("canonical_size", "a number above 0", std::to_string(settings.canonical_size));
    }
  }

  static void check_shapes(const Shape* inputs, Type type) {
    const int64_t images = inputs[0][0], channels = inputs[0][3];
    for (int level = 0; level < kNumLevels; ++level) {
      const int64_t height = inputs[level][1], width = inputs[level][2];
      expect_shape(kInputs[level], inputs[level], {images, height, width, channels});
      if (height == 0 || width == 0 || (height > 0 && width > kMostCells / height)) {
        refuse(kInputs[level], "of 1 to " + std::to_string(kMostCells) + " cells", text_of(inputs[level]));
      }
    }
    const int64_t vector = kVectorBytes / item_bytes(type);
    if (channels != kUnknown && (channels == 0 || channels % vector)) {
      refuse("channels", "a multiple of " + std::to_string(vector) + " in " + name_of(type),
             std::to_string(channels));
    }
    const int64_t boxes = inputs[4][1];
    expect_shape(kInputs[4], inputs[4], {images, boxes, 4});
    if (images > 0 && boxes > 0) {
      expect_regions(kInputs[4], boxes > kMostRegions ? boxes : images * boxes);
    }
  }

  template <typename Dim, typename Math>
  static int output_shape(const Settings&, const Dim* const* inputs, Dim* output, Math& math) {
    output[0] = math.product(inputs[4][0], inputs[4][1]);
    output[1] = math.constant(kTokens);
    output[2] = inputs[0][3];
    return 3;
  }

  // All sizes known and checked.
  static Launch launch(const Settings& settings, const Shape* inputs, Type type) {
    const int64_t slices = (inputs[0][3] * item_bytes(type) + kSliceBytes - 1) / kSliceBytes;
    const auto ratio = std::to_string(settings.sampling_ratio);
    return {std::string("psdiff_roi_align_") + suffix_of(type) + "_r" + ratio,
            {unsigned(inputs[4][0] * inputs[4][1]), unsigned(slices)},
            kPoolingThreads};
  }
};

// ---- PSDynamicConv: tokens (M, 49, C), params (M, 2CD), LayerNorms of D, of C -> (M, 49, C) or its mean (M, C) ----

struct DynamicConv {
  using Settings = DynamicConvSettings;
  static constexpr const char* kName = "PSDynamicConv";
  static constexpr int kNumInputs = 6;
  static constexpr const char* kInputs[kNumInputs] = {"tokens", "params", "weight1", "bias1", "weight2", "bias2"};
  static constexpr int kRanks[kNumInputs] = {3, 2, 1, 1, 1, 1};
  static constexpr bool kIsAlwaysFloat32[kNumInputs] = {false, false, true, true, true, true};
  static constexpr FieldPlace kFields[] = {
      {"epsilon", Kind::kFloat32, offsetof(Settings, epsilon)},
      {"mean_only", Kind::kInt32, offsetof(Settings, mean_only)},
  };

  static void check(const Settings& settings) {
    if (!(settings.epsilon > 0.f && std::isfinite(settings.epsilon))) {
      refuse("epsilon", "a number above 0", std::to_string(settings.epsilon));
    }
    if (settings.mean_only != 0 && settings.mean_only != 1) {
      refuse("mean_only", "0 or 1", std::to_string(settings.mean_only));
    }
  }

  static void check_shapes(const Shape* inputs, Type) {
    const int64_t regions = inputs[0][0], channels = inputs[0][2], width = inputs[2][0];
    expect_shape(kInputs[0], inputs[0], {regions, kTokens, channels});
    expect_regions(kInputs[0], regions);
    expect_size(channels, width);
    const bool is_known = channels != kUnknown && width != kUnknown;
    expect_shape(kInputs[1], inputs[1], {regions, is_known ? 2 * channels * width : kUnknown});
    expect_shape(kInputs[3], inputs[3], {width});
    expect_shape(kInputs[4], inputs[4], {channels});
    expect_shape(kInputs[5], inputs[5], {channels});
  }

  template <typename Dim, typename Math>
  static int output_shape(const Settings& settings, const Dim* const* inputs, Dim* output, Math& math) {
    output[0] = inputs[0][0];
    output[1] = settings.mean_only ? inputs[0][2] : math.constant(kTokens);
    output[2] = inputs[0][2];
    return settings.mean_only ? 2 : 3;
  }

  static Launch launch(const Settings&, const Shape* inputs, Type type) {
    const auto channels = std::to_string(inputs[0][2]), width = std::to_string(inputs[2][0]);
    return {std::string("psdiff_dynamic_conv_") + suffix_of(type) + "_c" + channels + "_d" + width,
            {unsigned(inputs[0][0]), 1},
            kConvolvingThreads};
  }

 private:
  static void expect_size(int64_t channels, int64_t width) {
    std::string sizes;
    for (const ConvSize& size : kConvSizes) {
      if (may_equal(channels, size.channels) && may_equal(width, size.width)) {
        return;
      }
      sizes += (sizes.empty() ? "" : " or ") + text_of(Shape{size.channels, size.width});
    }
    refuse("(channels, width)", sizes, text_of(Shape{channels, width}));
  }
};

// ---- what holds for both ----

// Whether input or output `position` may have the type types[position], given the types before it. Only row-major
// tensors are taken: levels come as (B, h, w, C), which costs TensorRT no copy behind a Transpose.
template <typename Op>
bool accepts(int position, const Type* types, bool is_row_major) {
  if (!is_row_major || position < 0 || position >= Op::kNumInputs + kNumOutputs) {
    return false;
  }
  if (position < Op::kNumInputs && Op::kIsAlwaysFloat32[position]) {
    return types[position] == Type::kFloat32;
  }
  return position ? types[position] == types[0] : types[0] != Type::kOther;
}

template <typename Op>
void expect_inputs(int count) {
  if (count != Op::kNumInputs) {
    refuse(std::string("inputs of ") + Op::kName, std::to_string(Op::kNumInputs), std::to_string(count));
  }
}

// The type of the output. In a strongly typed network nobody inserts a cast, so a wrong type is named here.
template <typename Op>
Type output_type(const Type (&inputs)[Op::kNumInputs]) {
  for (int i = 0; i < Op::kNumInputs; ++i) {
    if (!accepts<Op>(i, inputs, true)) {
      refuse(Op::kInputs[i], Op::kIsAlwaysFloat32[i] ? "fp32" : i ? name_of(inputs[0]) : "fp32, fp16 or bf16",
             name_of(inputs[i]));
    }
  }
  return inputs[0];
}

// Everything that shapes can get wrong; sizes may still be unknown.
template <typename Op>
void expect_shapes(const Shape (&inputs)[Op::kNumInputs], Type type) {
  for (int i = 0; i < Op::kNumInputs; ++i) {
    if (inputs[i].rank != Op::kRanks[i]) {
      refuse(Op::kInputs[i], "of " + std::to_string(Op::kRanks[i]) + " dimensions", text_of(inputs[i]));
    }
  }
  Op::check_shapes(inputs, type);
}

// Which kernel runs on how many blocks.
template <typename Op>
Launch launch_of(const typename Op::Settings& settings, const Shape (&inputs)[Op::kNumInputs], Type type) {
  expect_shapes<Op>(inputs, type);
  for (int i = 0; i < Op::kNumInputs; ++i) {
    for (int axis = 0; axis < inputs[i].rank; ++axis) {
      if (inputs[i][axis] < 0) {
        refuse(Op::kInputs[i], "of known sizes", text_of(inputs[i]));
      }
    }
  }
  return Op::launch(settings, inputs, type);
}

template <typename Op>
const FieldPlace& place_of_field(const char* name) {
  std::string names;
  for (const FieldPlace& place : Op::kFields) {
    if (!std::strcmp(place.name, name)) {
      return place;
    }
    names += (names.empty() ? "" : " or ") + std::string(place.name);
  }
  refuse(std::string("field of ") + Op::kName, names, name);
}

// Settings from fields in any order; one that is missing keeps its default.
template <typename Op>
typename Op::Settings read_fields(const Field* fields, int count) {
  typename Op::Settings settings;
  for (int i = 0; i < count; ++i) {
    const FieldPlace& place = place_of_field<Op>(fields[i].name ? fields[i].name : "");
    if (fields[i].kind != place.kind || fields[i].count != 1 || !fields[i].data) {
      refuse(place.name, place.kind == Kind::kInt32 ? "one int32" : "one float32",
             fields[i].kind == place.kind ? std::to_string(fields[i].count) + " values" : "another type");
    }
    // Both kinds have 4 bytes; a plan's bytes need not be aligned.
    std::memcpy(reinterpret_cast<char*>(&settings) + place.offset, fields[i].data, 4);
  }
  Op::check(settings);
  return settings;
}

template <typename Op>
constexpr int kNumFields = int(sizeof(Op::kFields) / sizeof(FieldPlace));

// The fields that read_fields turns into the same settings again; they point into `settings`.
template <typename Op>
void list_fields(const typename Op::Settings& settings, Field (&fields)[kNumFields<Op>]) {
  for (int i = 0; i < kNumFields<Op>; ++i) {
    const FieldPlace& place = Op::kFields[i];
    fields[i] = {place.name, place.kind, reinterpret_cast<const char*>(&settings) + place.offset, 1};
  }
}

}  // namespace psdiff::plugin
