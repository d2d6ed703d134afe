// plugin_logic.h behind C functions, which tests/test_plugin.py calls; with TensorRT's headers (PSD_WITH_TENSORRT)
// also a caller that treats the built library as TensorRT does.
//
// Every function answers with text: the result, or "refused: " and the message. `op` is 0 for PSRoiAlignCL, 1 for
// PSDynamicConv; shapes come as the ranks of all inputs and their sizes one after another.
#include "plugin_logic.h"

#include <cstdio>

using namespace psdiff::plugin;

namespace {

std::string answer;

template <typename Body>
const char* answer_with(int op, Body body) {
  try {
    answer = op ? body(DynamicConv{}) : body(RoiAlign{});
  } catch (const std::invalid_argument& error) {
    answer = std::string("refused: ") + error.what();
  }
  return answer.c_str();
}

template <typename Op>
void fill_shapes(Shape (&shapes)[Op::kNumInputs], const int* ranks, const int64_t* sizes) {
  for (int i = 0; i < Op::kNumInputs; ++i) {
    shapes[i].rank = ranks[i];
    for (int axis = 0; axis < ranks[i]; ++axis) {
      shapes[i].sizes[axis] = *sizes++;
    }
  }
}

// Dimensions as text: what the rule says, whatever it is evaluated on.
struct Words {
  std::string constant(int64_t value) { return std::to_string(value); }
  std::string product(const std::string& a, const std::string& b) { return a + "*" + b; }
};

struct Numbers {
  int64_t constant(int64_t value) { return value; }
  int64_t product(int64_t a, int64_t b) { return a * b; }
};

std::string joined(const std::string* parts, int count) {
  std::string text;
  for (int i = 0; i < count; ++i) {
    text += (i ? ", " : "") + parts[i];
  }
  return text;
}

}  // namespace

extern "C" {

const char* describe(int op) {
  return answer_with(op, [](auto which) {
    using Op = decltype(which);
    std::string text = std::string(Op::kName) + "|" + kVersion + "|" + kNamespace + "|";
    for (const char* name : Op::kInputs) {
      text += std::string(name) + " ";
    }
    text += "|";
    for (const FieldPlace& place : Op::kFields) {
      text += std::string(place.name) + (place.kind == Kind::kInt32 ? ":int32 " : ":float32 ");
    }
    return text;
  });
}

const char* conv_sizes() {
  return answer_with(0, [](auto) {
    std::string text;
    for (const ConvSize& size : kConvSizes) {
      text += std::to_string(size.channels) + "," + std::to_string(size.width) + " ";
    }
    return text;
  });
}

const char* takes(int op, int position, const int* types, int is_row_major) {
  return answer_with(op, [&](auto which) {
    Type known[16];
    for (int i = 0; i <= position; ++i) {
      known[i] = Type(types[i]);
    }
    return std::string(accepts<decltype(which)>(position, known, is_row_major) ? "yes" : "no");
  });
}

const char* type_of_output(int op, const int* types, int count) {
  return answer_with(op, [&](auto which) {
    using Op = decltype(which);
    expect_inputs<Op>(count);
    Type known[Op::kNumInputs];
    for (int i = 0; i < count; ++i) {
      known[i] = Type(types[i]);
    }
    return std::string(name_of(output_type<Op>(known)));
  });
}

// Settings by way of fields, as TensorRT gives them: kinds 0 int32, 1 float32, 2 another.
const char* round_trip(int op, int count, const char* const* names, const int* kinds, const void* const* data,
                       const int* counts) {
  return answer_with(op, [&](auto which) {
    using Op = decltype(which);
    Field given[8];
    for (int i = 0; i < count; ++i) {
      given[i] = {names[i], Kind(kinds[i]), data[i], counts[i]};
    }
    const auto settings = read_fields<Op>(given, count);
    Field written[kNumFields<Op>];
    list_fields<Op>(settings, written);
    const auto again = read_fields<Op>(written, kNumFields<Op>);
    std::string text;
    list_fields<Op>(again, written);
    for (const Field& field : written) {
      char value[32];
      if (field.kind == Kind::kInt32) {
        std::snprintf(value, sizeof value, "%d", *static_cast<const int32_t*>(field.data));
      } else {
        std::snprintf(value, sizeof value, "%.9g", *static_cast<const float*>(field.data));
      }
      text += std::string(field.name) + "=" + value + " ";
    }
    return text;
  });
}

// The shape of the output in words and, where sizes are known, in numbers.
const char* shape_of_output(int op, int mean_only, const int* ranks, const int64_t* sizes) {
  return answer_with(op, [&](auto which) {
    using Op = decltype(which);
    typename Op::Settings settings;
    if constexpr (Op::kNumInputs == DynamicConv::kNumInputs) {
      settings.mean_only = mean_only;
    }
    Shape shapes[Op::kNumInputs];
    fill_shapes<Op>(shapes, ranks, sizes);
    expect_shapes<Op>(shapes, Type::kFloat16);
    std::string names[Op::kNumInputs][kMostDims], words[3], digits[3];
    const std::string* name_rows[Op::kNumInputs];
    const int64_t* number_rows[Op::kNumInputs];
    for (int i = 0; i < Op::kNumInputs; ++i) {
      for (int axis = 0; axis < ranks[i]; ++axis) {
        names[i][axis] = std::string(Op::kInputs[i]) + "[" + std::to_string(axis) + "]";
      }
      name_rows[i] = names[i];
      number_rows[i] = shapes[i].sizes;
    }
    Words in_words;
    Numbers in_numbers;
    int64_t numbers[3] = {};
    const int rank = Op::output_shape(settings, name_rows, words, in_words);
    Op::output_shape(settings, number_rows, numbers, in_numbers);
    for (int axis = 0; axis < rank; ++axis) {
      digits[axis] = std::to_string(numbers[axis]);
    }
    return joined(words, rank) + "|" + joined(digits, rank);
  });
}

const char* launch(int op, int sampling_ratio, int type, const int* ranks, const int64_t* sizes) {
  return answer_with(op, [&](auto which) {
    using Op = decltype(which);
    typename Op::Settings settings;
    if constexpr (Op::kNumInputs == RoiAlign::kNumInputs) {
      settings.sampling_ratio = sampling_ratio;
    }
    Shape shapes[Op::kNumInputs];
    fill_shapes<Op>(shapes, ranks, sizes);
    const Launch chosen = launch_of<Op>(settings, shapes, Type(type));
    return chosen.entry + " " + std::to_string(chosen.grid[0]) + " " + std::to_string(chosen.grid[1]) + " " +
           std::to_string(chosen.threads);
  });
}

const char* check_aligned(int64_t address) {
  return answer_with(0, [&](auto) {
    expect_aligned("p2", reinterpret_cast<const void*>(address));
    return std::string();
  });
}

}  // extern "C"

#if defined(PSD_WITH_TENSORRT)
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <memory>

namespace {

using namespace nvinfer1;

// Keeps what a plugin logs.
struct Memory final : ILogger, ILoggerFinder {
  std::string text;
  void log(Severity, const char* message) noexcept override { text += message; }
  ILogger* findLogger() override { return this; }
};

void demand(bool holds, const char* what) {
  if (!holds) {
    throw std::invalid_argument(std::string("the library ") + what);
  }
}

DynamicPluginTensorDesc tensor(std::initializer_list<int64_t> sizes, DataType type) {
  DynamicPluginTensorDesc description{};
  description.desc.dims.nbDims = int(sizes.size());
  std::copy(sizes.begin(), sizes.end(), description.desc.dims.d);
  description.desc.type = type;
  description.desc.format = TensorFormat::kLINEAR;
  return description;
}

// Build phase, then run phase without a single region, of a PSRoiAlignCL whose canonical size is 96.
void play(IPluginCreatorV3One& creator, const Memory& log) {
  const int32_t wrong = 3;
  const PluginField refused[] = {{"sampling_ratio", &wrong, PluginFieldType::kINT32, 1}};
  const PluginFieldCollection bad{1, refused};
  demand(!creator.createPlugin("layer", &bad, TensorRTPhase::kBUILD), "made a plugin with sampling_ratio 3");
  demand(log.text == "PSRoiAlignCL: sampling_ratio must be 1 or 2, got 3", "did not log what was wrong");

  const float side = 96.f;
  const PluginField given[] = {{"canonical_size", &side, PluginFieldType::kFLOAT32, 1}};
  const PluginFieldCollection good{1, given};
  std::unique_ptr<IPluginV3> first(creator.createPlugin("layer", &good, TensorRTPhase::kBUILD));
  demand(first != nullptr, "made no plugin");
  std::unique_ptr<IPluginV3> plugin(first->clone());
  first.reset();
  auto& build = *static_cast<IPluginV3OneBuild*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
  auto& run = *static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  auto& core = *static_cast<IPluginV3OneCore*>(plugin->getCapabilityInterface(PluginCapabilityType::kCORE));
  demand(std::string(core.getPluginName()) == creator.getPluginName(), "names the plugin in two ways");

  const auto half = DataType::kHALF, single = DataType::kFLOAT;
  DynamicPluginTensorDesc tensors[] = {tensor({2, 16, 20, 64}, half), tensor({2, 8, 10, 64}, half),
                                       tensor({2, 4, 5, 64}, half),   tensor({2, 2, 3, 64}, half),
                                       tensor({2, 0, 4}, single),     tensor({0, 49, 64}, half)};
  for (int position = 0; position < 6; ++position) {
    demand(build.supportsFormatCombination(position, tensors, 5, 1), "refused its own types");
  }
  tensors[4].desc.type = half;
  demand(!build.supportsFormatCombination(4, tensors, 5, 1), "took boxes of half precision");
  const DataType types[] = {half, half, half, half, single};
  DataType of_output = single;
  demand(build.getOutputDataTypes(&of_output, 1, types, 5) == 0 && of_output == half, "has the wrong output type");
  demand(build.configurePlugin(tensors, 5, tensors + 5, 1) == 0, "refused its own shapes");
  tensors[1].desc.dims.d[3] = 32;
  demand(build.configurePlugin(tensors, 5, tensors + 5, 1) != 0, "took levels of different channels");
  tensors[1].desc.dims.d[3] = 64;

  const PluginFieldCollection* kept = run.getFieldsToSerialize();
  std::unique_ptr<IPluginV3> restored(creator.createPlugin("layer", kept, TensorRTPhase::kRUNTIME));
  demand(restored && kept->nbFields == 2, "cannot read its own fields");
  demand(*static_cast<const float*>(kept->fields[1].data) == side, "forgot canonical_size");
  PluginTensorDesc inputs[5];
  for (int i = 0; i < 5; ++i) {
    inputs[i] = tensors[i].desc;
  }
  const void* data[5] = {};
  void* output[1] = {};
  demand(run.enqueue(inputs, &tensors[5].desc, data, output, nullptr, nullptr) == 0, "failed without regions");
  output[0] = reinterpret_cast<void*>(8);
  demand(run.enqueue(inputs, &tensors[5].desc, data, output, nullptr, nullptr) != 0, "wrote to a crooked address");
}

}  // namespace

// Empty, or what the library at `path` does wrong.
extern "C" const char* play_tensorrt(const char* path) {
  return answer_with(0, [&](auto) {
    void* library = dlopen(path, RTLD_NOW);
    demand(library, "does not load");
    using Creators = IPluginCreatorInterface* const*;
    auto* get_creators = reinterpret_cast<Creators (*)(int32_t&)>(dlsym(library, "getCreators"));
    auto* set_finder = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
    demand(get_creators && set_finder, "exports no getCreators or no setLoggerFinder");
    Memory log;
    set_finder(&log);
    int32_t count = 0;
    const Creators creators = get_creators(count);
    demand(count == 2, "does not hold two creators");
    play(*static_cast<IPluginCreatorV3One*>(creators[0]), log);
    set_finder(nullptr);
    return std::string();
  });
}
#endif
