// libpsdiff_trt.so: PSRoiAlignCL and PSDynamicConv as plugins (IPluginV3) of TensorRT, one source for 10.3 to 11.x.
//
// The rules are plugin_logic.h's; this file hands them TensorRT's words and launches the kernels of entries.cu.
// Nothing calls CUDA before enqueue, so an engine can be built where no GPU is; enqueue only launches one kernel, so
// it can be captured into a CUDA graph. libnvinfer is not linked: the library finds the one in the process, and does
// nothing where there is none. Build it once for each major version: make trt-plugin TENSORRT_INCLUDE=<folder>.
#include <NvInferRuntime.h>
#include <dlfcn.h>
#include <execinfo.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <new>
#include <vector>

#include "entries.cu"
#include "plugin_logic.h"

namespace psdiff::plugin {
namespace {

using nvinfer1::DataType;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;

// ---- the kernels by name ----

static_assert(kTokens == kCells && kNumLevels == kLevels, "plugin_logic.h must pool as roi_align.cuh does");
static_assert(kSliceBytes == kRoiLanes * kVectorBytes, "a block of ROIAlign must take one slice of channels");
static_assert(kPoolingThreads == kRoiThreads && kConvolvingThreads == kConvThreads, "threads must be the kernels'");

template <typename Args>
struct Kernel {
  const char* name;
  void (*start)(Args);
};

#define PSD_KERNEL(name) {#name, name},
constexpr Kernel<RoiAlignArgs> kRoiAlignKernels[] = {
    PSD_KERNEL(psdiff_roi_align_f32_r1) PSD_KERNEL(psdiff_roi_align_f32_r2) PSD_KERNEL(psdiff_roi_align_f16_r1)
    PSD_KERNEL(psdiff_roi_align_f16_r2) PSD_KERNEL(psdiff_roi_align_bf16_r1) PSD_KERNEL(psdiff_roi_align_bf16_r2)};
#define PSD_CONV_KERNELS(C, D)                    \
  PSD_KERNEL(psdiff_dynamic_conv_f32_c##C##_d##D) \
  PSD_KERNEL(psdiff_dynamic_conv_f16_c##C##_d##D) \
  PSD_KERNEL(psdiff_dynamic_conv_bf16_c##C##_d##D)
#define PSD_CONV_KERNELS_OF(C, D) PSD_CONV_KERNELS(C, D)
constexpr Kernel<DynamicConvArgs> kDynamicConvKernels[] = {PSD_EACH_DYNAMIC_CONV(PSD_CONV_KERNELS_OF)};

template <typename Args, size_t count>
void start(const Kernel<Args> (&kernels)[count], const Launch& launch, const Args& args, cudaStream_t stream) {
  if (!launch.grid[0]) {
    return;
  }
  for (const Kernel<Args>& kernel : kernels) {
    if (launch.entry == kernel.name) {
      // Not <<<...>>>, whose error would be mixed up with one that somebody left behind.
      void* arguments[] = {const_cast<Args*>(&args)};
      const dim3 grid(launch.grid[0], launch.grid[1]);
      const auto* function = reinterpret_cast<const void*>(kernel.start);
      const cudaError_t error = cudaLaunchKernel(function, grid, dim3(launch.threads), arguments, 0, stream);
      if (error != cudaSuccess) {
        throw std::runtime_error(launch.entry + " did not start: " + cudaGetErrorString(error));
      }
      return;
    }
  }
  throw std::runtime_error(launch.entry + " is not among the kernels of this library");
}

void run(const RoiAlignSettings& settings, const Shape (&inputs)[RoiAlign::kNumInputs], const Launch& launch,
         const void* const* data, void* output, cudaStream_t stream) {
  RoiAlignArgs args{};
  for (int level = 0; level < kNumLevels; ++level) {
    args.levels[level] = data[level];
    args.heights[level] = int(inputs[level][1]);
    args.widths[level] = int(inputs[level][2]);
  }
  args.boxes_xyxy = static_cast<const float*>(data[4]);
  args.tokens = output;
  args.boxes_per_image = int(inputs[4][1]);
  args.channels = int(inputs[0][3]);
  args.canonical_size = settings.canonical_size;
  start(kRoiAlignKernels, launch, args, stream);
}

void run(const DynamicConvSettings& settings, const Shape (&)[DynamicConv::kNumInputs], const Launch& launch,
         const void* const* data, void* output, cudaStream_t stream) {
  DynamicConvArgs args{};
  args.tokens = data[0];
  args.params = data[1];
  args.weight1 = static_cast<const float*>(data[2]);
  args.bias1 = static_cast<const float*>(data[3]);
  args.weight2 = static_cast<const float*>(data[4]);
  args.bias2 = static_cast<const float*>(data[5]);
  args.out = output;
  args.epsilon = settings.epsilon;
  args.mean_only = settings.mean_only;
  start(kDynamicConvKernels, launch, args, stream);
}

// ---- TensorRT's words ----

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

void log_error(const char* plugin, const char* problem) noexcept {
  char message[1024];
  std::snprintf(message, sizeof message, "%s: %s", plugin, problem);
  nvinfer1::ILoggerFinder* finder = logger_finder.load();
  nvinfer1::ILogger* logger = finder ? finder->findLogger() : nullptr;
  if (logger) {
    logger->log(nvinfer1::ILogger::Severity::kERROR, message);
  } else {
    std::fprintf(stderr, "%s\n", message);
  }
}

// TensorRT takes no exceptions: 0 for success, 1 and a line in the log for an exception of `body`.
template <typename Body>
int32_t guarded(const char* plugin, const Body& body) noexcept {
  try {
    body();
    return 0;
  } catch (const std::exception& error) {
    log_error(plugin, error.what());
  }
  return 1;
}

Type type_of(DataType type) {
  switch (type) {
    case DataType::kFLOAT: return Type::kFloat32;
    case DataType::kHALF: return Type::kFloat16;
    case DataType::kBF16: return Type::kBFloat16;
    default: return Type::kOther;
  }
}

Kind kind_of(PluginFieldType type) {
  switch (type) {
    case PluginFieldType::kINT32: return Kind::kInt32;
    case PluginFieldType::kFLOAT32: return Kind::kFloat32;
    default: return Kind::kOther;
  }
}

PluginField plugin_field(const Field& field) {
  const auto type = field.kind == Kind::kInt32 ? PluginFieldType::kINT32 : PluginFieldType::kFLOAT32;
  return {field.name, field.data, type, field.count};
}

Shape shape_of(const nvinfer1::Dims& dims) {
  Shape shape;
  shape.rank = dims.nbDims;
  std::copy(dims.d, dims.d + std::max(0, shape.rank), shape.sizes);
  return shape;
}

Shape shape_of(const nvinfer1::DimsExprs& dims) {
  Shape shape;
  shape.rank = dims.nbDims;
  for (int axis = 0; axis < shape.rank; ++axis) {
    shape.sizes[axis] = dims.d[axis]->isConstant() ? dims.d[axis]->getConstantValue() : kUnknown;
  }
  return shape;
}

// Arithmetic of output_shape on sizes that only the run tells.
struct Expressions {
  using Dim = const nvinfer1::IDimensionExpr*;
  nvinfer1::IExprBuilder& builder;

  Dim constant(int64_t value) { return builder.constant(value); }
  Dim product(Dim a, Dim b) { return builder.operation(nvinfer1::DimensionOperation::kPROD, *a, *b); }
};

// ---- the plugin ----

template <typename Op>
class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuild,
                     public nvinfer1::IPluginV3OneRuntime {
 public:
  explicit Plugin(const typename Op::Settings& settings) : settings_(settings) {
    Field fields[kNumFields<Op>];
    list_fields<Op>(settings_, fields);
    std::transform(fields, fields + kNumFields<Op>, fields_, plugin_field);
  }

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
    switch (type) {
      case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
      case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
      case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }

  nvinfer1::IPluginV3* clone() noexcept override { return new (std::nothrow) Plugin(settings_); }

  const char* getPluginName() const noexcept override { return Op::kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

  int32_t getNbOutputs() const noexcept override { return kNumOutputs; }

  int32_t getOutputDataTypes(DataType* outputs, int32_t, const DataType* inputs,
                             int32_t count) const noexcept override {
    return guarded(Op::kName, [&] {
      expect_inputs<Op>(count);
      Type types[Op::kNumInputs];
      std::transform(inputs, inputs + count, types, type_of);
      output_type<Op>(types);
      outputs[0] = inputs[0];
    });
  }

  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t count, const nvinfer1::DimsExprs*, int32_t,
                          nvinfer1::DimsExprs* outputs, int32_t, nvinfer1::IExprBuilder& builder) noexcept override {
    return guarded(Op::kName, [&] {
      expect_inputs<Op>(count);
      Shape shapes[Op::kNumInputs];
      const Expressions::Dim* sizes[Op::kNumInputs];
      for (int i = 0; i < count; ++i) {
        shapes[i] = shape_of(inputs[i]);
        sizes[i] = inputs[i].d;
      }
      // Types come later: those of 4 bytes ask for the least.
      expect_shapes<Op>(shapes, Type::kFloat32);
      Expressions math{builder};
      outputs[0].nbDims = Op::output_shape(settings_, sizes, outputs[0].d, math);
    });
  }

  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors, int32_t inputs,
                                 int32_t outputs) noexcept override {
    if (inputs != Op::kNumInputs || outputs != kNumOutputs || position < 0 || position >= inputs + outputs) {
      return false;
    }
    Type types[Op::kNumInputs + kNumOutputs];
    for (int i = 0; i <= position; ++i) {
      types[i] = type_of(tensors[i].desc.type);
    }
    return accepts<Op>(position, types, tensors[position].desc.format == nvinfer1::TensorFormat::kLINEAR);
  }

  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t count,
                          const nvinfer1::DynamicPluginTensorDesc*, int32_t) noexcept override {
    return guarded(Op::kName, [&] {
      expect_inputs<Op>(count);
      Shape shapes[Op::kNumInputs];
      for (int i = 0; i < count; ++i) {
        shapes[i] = shape_of(inputs[i].desc.dims);
      }
      expect_shapes<Op>(shapes, type_of(inputs[0].desc.type));
    });
  }

  int32_t onShapeChange(const nvinfer1::PluginTensorDesc*, int32_t, const nvinfer1::PluginTensorDesc*,
                        int32_t) noexcept override {
    return 0;
  }

  int32_t enqueue(const nvinfer1::PluginTensorDesc* inputs, const nvinfer1::PluginTensorDesc*,
                  const void* const* data, void* const* outputs, void*, cudaStream_t stream) noexcept override {
    return guarded(Op::kName, [&] {
      Shape shapes[Op::kNumInputs];
      for (int i = 0; i < Op::kNumInputs; ++i) {
        shapes[i] = shape_of(inputs[i].dims);
        expect_aligned(Op::kInputs[i], data[i]);
      }
      expect_aligned("output", outputs[0]);
      const Launch launch = launch_of<Op>(settings_, shapes, type_of(inputs[0].type));
      run(settings_, shapes, launch, data, outputs[0], stream);
    });
  }

  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }

  const PluginFieldCollection* getFieldsToSerialize() noexcept override { return &written_; }

 private:
  const typename Op::Settings settings_;
  PluginField fields_[kNumFields<Op>];  // these point into settings_
  const PluginFieldCollection written_{kNumFields<Op>, fields_};
};

template <typename Op>
class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  Creator() {
    for (int i = 0; i < kNumFields<Op>; ++i) {
      fields_[i] = plugin_field({Op::kFields[i].name, Op::kFields[i].kind, nullptr, 1});
    }
  }

  nvinfer1::IPluginV3* createPlugin(const char*, const PluginFieldCollection* given,
                                    nvinfer1::TensorRTPhase) noexcept override {
    nvinfer1::IPluginV3* plugin = nullptr;
    guarded(Op::kName, [&] {
      std::vector<Field> fields;
      for (int i = 0; given && i < given->nbFields; ++i) {
        const PluginField& field = given->fields[i];
        fields.push_back({field.name, kind_of(field.type), field.data, field.length});
      }
      plugin = new Plugin<Op>(read_fields<Op>(fields.data(), int(fields.size())));
    });
    return plugin;
  }

  const PluginFieldCollection* getFieldNames() noexcept override { return &names_; }
  const char* getPluginName() const noexcept override { return Op::kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  PluginField fields_[kNumFields<Op>];
  PluginFieldCollection names_{kNumFields<Op>, fields_};
};

}  // namespace
}  // namespace psdiff::plugin

// ---- what TensorRT looks for in a library of plugins ----

#define PSD_EXPORT extern "C" __attribute__((visibility("default")))

PSD_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static psdiff::plugin::Creator<psdiff::plugin::RoiAlign> roi_align;
  static psdiff::plugin::Creator<psdiff::plugin::DynamicConv> dynamic_conv;
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&roi_align, &dynamic_conv};
  count = 2;
  return creators;
}

PSD_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { psdiff::plugin::logger_finder = finder; }

namespace psdiff::plugin {
namespace {

// A function of the TensorRT that is already in this process, or null.
template <typename Function>
Function* find_in_tensorrt(const char* name) {
  void* symbol = dlsym(RTLD_DEFAULT, name);
  for (const char* library : {"libnvinfer.so.11", "libnvinfer.so.10", "libtensorrt_rtx.so.1"}) {
    // Not closed again: TensorRT must stay as long as it holds these creators.
    void* handle = symbol ? nullptr : dlopen(library, RTLD_NOW | RTLD_NOLOAD);
    symbol = handle ? dlsym(handle, name) : symbol;
  }
  return reinterpret_cast<Function*>(symbol);
}

// Whether TensorRT itself opens this library (loadLibrary). It then asks for the creators too, and refuses a library
// whose creators it knows already.
bool is_opened_by_tensorrt(const void* function_of_tensorrt) {
  Dl_info tensorrt, caller;
  void* frames[128];
  const int count = dladdr(function_of_tensorrt, &tensorrt) ? backtrace(frames, 128) : 0;
  return std::any_of(frames, frames + count, [&](const void* frame) {
    return dladdr(frame, &caller) && caller.dli_fbase == tensorrt.dli_fbase;
  });
}

// Some servers only open a library (Triton's `plugins=`) and never ask it for its creators.
struct Registration {
  Registration() {
    auto* get_registry = find_in_tensorrt<nvinfer1::IPluginRegistry*()>("getPluginRegistry");
    auto* get_version = find_in_tensorrt<int32_t()>("getInferLibVersion");
    if (!get_registry || !get_version || is_opened_by_tensorrt(reinterpret_cast<const void*>(get_registry))) {
      return;
    }
    // Version 11 took functions out of the middle of the registry's table.
    if (get_version() / 10000 != NV_TENSORRT_MAJOR) {
      std::fprintf(stderr, "libpsdiff_trt.so must be built for TensorRT %d, got a build for %d: build it again\n",
                   get_version() / 10000, NV_TENSORRT_MAJOR);
      return;
    }
    stay_loaded();
    int32_t count = 0;
    nvinfer1::IPluginCreatorInterface* const* creators = getCreators(count);
    for (int i = 0; i < count; ++i) {
      get_registry()->registerCreator(*creators[i], kNamespace);
    }
  }

  // The registry keeps pointers into this library, whoever closes it.
  static void stay_loaded() {
    Dl_info self;
    if (dladdr(reinterpret_cast<void*>(&getCreators), &self)) {
      dlopen(self.dli_fname, RTLD_NOW | RTLD_NOLOAD | RTLD_NODELETE);
    }
  }
} registration;

}  // namespace
}  // namespace psdiff::plugin
