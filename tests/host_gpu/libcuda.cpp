// A stand-in for libcuda.so.1: the part of the CUDA driver API that starts kernels, carried out on the CPU.
//
// It lets the tests run the real cuda-python (or PyCUDA), unchanged, where there is no GPU. "Device" memory is host
// memory of this process; a module must be a real cubin for this device; cuLaunchKernel takes the argument struct from
// where the caller said it lies and runs the kernel of that name that g++ compiled (launch.cpp, one or more libraries,
// named by PSD_HOST_KERNELS with colons between). As on a device, work waits on its stream until somebody waits for
// it, a call without a current context fails, and copies outside an allocation fail.
//
// It does not prove that a cubin runs on a GPU, nor limits of launches, timing, true concurrency of streams, or what
// a driver does after a fault. No header of CUDA is used: the codes and signatures are those of cuda.h.

#include <dlfcn.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <iterator>
#include <map>
#include <mutex>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "cubin.h"

#define PSD_API extern "C" __attribute__((visibility("default")))

namespace {

using Result = int;
using Pointer = unsigned long long;

#define PSD_ERRORS(X)                                                                                       \
  X(kSuccess, 0, "CUDA_SUCCESS", "no error")                                                                \
  X(kInvalidValue, 1, "CUDA_ERROR_INVALID_VALUE", "invalid argument")                                       \
  X(kOutOfMemory, 2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory")                                           \
  X(kNotInitialised, 3, "CUDA_ERROR_NOT_INITIALIZED", "initialization error")                               \
  X(kInvalidDevice, 101, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal")                             \
  X(kInvalidImage, 200, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid")                       \
  X(kInvalidContext, 201, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context")                           \
  X(kNoBinary, 209, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device") \
  X(kInvalidHandle, 400, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle")                            \
  X(kNotFound, 500, "CUDA_ERROR_NOT_FOUND", "named symbol not found")                                       \
  X(kLaunchFailed, 719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure")

#define PSD_CONSTANT(constant, code, name, text) constant = code,
enum : Result { PSD_ERRORS(PSD_CONSTANT) };

struct Error {
  Result code;
  const char* name;
  const char* text;
};
#define PSD_ROW(constant, code, name, text) {code, name, text},
constexpr Error kErrors[] = {PSD_ERRORS(PSD_ROW)};

const Error* find_error(Result code) {
  for (const Error& error : kErrors) {
    if (error.code == code) {
      return &error;
    }
  }
  return nullptr;
}

// The device: an Orin of 1 GiB.
constexpr int kMajor = 8, kMinor = 7, kDriverVersion = 13000, kMostThreads = 1024;
constexpr size_t kMemoryBytes = size_t{1} << 30;

struct Module {
  std::set<std::string> entries;
};
struct Function {
  void (*body)(const void*);
  const char* (*launch)(void (*)(const void*), const unsigned*, int, const void*, unsigned);
  int args_bytes;
  int most_threads;
};
struct Work {
  void* stream;
  std::function<Result()> run;
};

std::recursive_mutex mutex;
using Lock = std::lock_guard<std::recursive_mutex>;
bool initialised = false;
int retained = 0;
thread_local std::vector<void*> contexts;
std::map<Pointer, size_t> allocations;
std::set<void*> streams;
std::deque<Work> queue;

void* primary_context() {
  static int place;
  return &place;
}

bool has_context() { return retained > 0 && !contexts.empty() && contexts.back() == primary_context(); }

bool is_stream(void* stream) { return stream == nullptr || streams.count(stream); }

bool is_allocated(Pointer start, size_t bytes) {
  auto next = allocations.upper_bound(start);
  if (next == allocations.begin()) {
    return false;
  }
  const auto& [first, size] = *std::prev(next);
  return start + bytes <= first + size;
}

// Carry out what waits on a stream, in order. The default stream waits for every other, and every other for it.
Result drain(void* stream) {
  bool is_all = stream == nullptr;
  for (const Work& work : queue) {
    is_all = is_all || work.stream == nullptr;
  }
  std::deque<Work> later;
  Result first_error = kSuccess;
  while (!queue.empty()) {
    Work work = std::move(queue.front());
    queue.pop_front();
    if (is_all || work.stream == stream) {
      const Result result = work.run();
      first_error = first_error == kSuccess ? result : first_error;
    } else {
      later.push_back(std::move(work));
    }
  }
  queue = std::move(later);
  return first_error;
}

Result enqueue(void* stream, std::function<Result()> run) {
  queue.push_back({stream, std::move(run)});
  return kSuccess;
}

Result copy(void* to, const void* from, size_t bytes) {
  std::memcpy(to, from, bytes);
  return kSuccess;
}

Function* find_function(const std::string& entry) {
  const char* paths = std::getenv("PSD_HOST_KERNELS");
  std::istringstream list(paths ? paths : "");
  for (std::string path; std::getline(list, path, ':');) {
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    void* body = library ? dlsym(library, entry.c_str()) : nullptr;
    if (body) {
      const int bytes = *static_cast<int*>(dlsym(library, (entry + "_size").c_str()));
      const int threads = *static_cast<int*>(dlsym(library, (entry + "_threads").c_str()));
      return new Function{reinterpret_cast<decltype(Function::body)>(body),
                          reinterpret_cast<decltype(Function::launch)>(dlsym(library, "launch_on_host")), bytes,
                          threads};
    }
  }
  return nullptr;
}

// The struct that a launch passes: the first of `params`, or the buffer that `extra` describes by (key, value) pairs.
const void* find_args(void** params, void** extra, int want_bytes) {
  if (params) {
    return params[0];
  }
  const auto kEnd = uintptr_t{0}, kBuffer = uintptr_t{1}, kBufferSize = uintptr_t{2};
  const void* buffer = nullptr;
  size_t bytes = 0;
  for (; extra && uintptr_t(*extra) != kEnd; extra += 2) {
    if (uintptr_t(*extra) == kBuffer) {
      buffer = extra[1];
    } else if (uintptr_t(*extra) == kBufferSize) {
      bytes = *static_cast<size_t*>(extra[1]);
    }
  }
  return bytes == size_t(want_bytes) ? buffer : nullptr;
}

}  // namespace

#define PSD_NEED(condition, error) \
  if (!(condition)) {              \
    return error;                  \
  }
#define PSD_NEED_CONTEXT \
  Lock lock(mutex);      \
  PSD_NEED(has_context(), kInvalidContext)

PSD_API Result cuInit(unsigned) {
  Lock lock(mutex);
  initialised = true;
  return kSuccess;
}
// NVRTC looks for profilers here, and takes "no" for an answer.
PSD_API Result cuGetExportTable(const void** table, const void*) {
  *table = nullptr;
  return kInvalidValue;
}
PSD_API Result cuDriverGetVersion(int* version) {
  *version = kDriverVersion;
  return kSuccess;
}
PSD_API Result cuGetErrorName(Result code, const char** name) {
  const Error* error = find_error(code);
  *name = error ? error->name : nullptr;
  return error ? kSuccess : kInvalidValue;
}
PSD_API Result cuGetErrorString(Result code, const char** text) {
  const Error* error = find_error(code);
  *text = error ? error->text : nullptr;
  return error ? kSuccess : kInvalidValue;
}

// ---- device and context ----

PSD_API Result cuDeviceGetCount(int* count) {
  PSD_NEED(initialised, kNotInitialised)
  *count = 1;
  return kSuccess;
}
PSD_API Result cuDeviceGet(int* device, int ordinal) {
  PSD_NEED(initialised, kNotInitialised)
  PSD_NEED(ordinal == 0, kInvalidDevice)
  *device = 0;
  return kSuccess;
}
PSD_API Result cuDeviceGetAttribute(int* value, int attribute, int device) {
  constexpr int kComputeMajor = 75, kComputeMinor = 76;
  PSD_NEED(device == 0, kInvalidDevice)
  PSD_NEED(attribute == kComputeMajor || attribute == kComputeMinor, kInvalidValue)
  *value = attribute == kComputeMajor ? kMajor : kMinor;
  return kSuccess;
}
PSD_API Result cuDeviceComputeCapability(int* major, int* minor, int device) {
  PSD_NEED(device == 0, kInvalidDevice)
  *major = kMajor;
  *minor = kMinor;
  return kSuccess;
}
PSD_API Result cuDevicePrimaryCtxRetain(void** context, int device) {
  Lock lock(mutex);
  PSD_NEED(initialised, kNotInitialised)
  PSD_NEED(device == 0, kInvalidDevice)
  ++retained;
  *context = primary_context();
  return kSuccess;
}
PSD_API Result cuDevicePrimaryCtxRelease_v2(int device) {
  Lock lock(mutex);
  PSD_NEED(device == 0, kInvalidDevice)
  PSD_NEED(retained > 0, kInvalidContext)
  --retained;
  return kSuccess;
}
PSD_API Result cuCtxPushCurrent_v2(void* context) {
  PSD_NEED(context == primary_context(), kInvalidContext)
  contexts.push_back(context);
  return kSuccess;
}
PSD_API Result cuCtxPopCurrent_v2(void** context) {
  PSD_NEED(!contexts.empty(), kInvalidContext)
  if (context) {
    *context = contexts.back();
  }
  contexts.pop_back();
  return kSuccess;
}
PSD_API Result cuCtxSetCurrent(void* context) {
  PSD_NEED(context == nullptr || context == primary_context(), kInvalidContext)
  if (!contexts.empty()) {
    contexts.pop_back();
  }
  if (context) {
    contexts.push_back(context);
  }
  return kSuccess;
}
PSD_API Result cuCtxGetCurrent(void** context) {
  *context = contexts.empty() ? nullptr : contexts.back();
  return kSuccess;
}
PSD_API Result cuCtxGetDevice(int* device) {
  PSD_NEED_CONTEXT
  *device = 0;
  return kSuccess;
}
PSD_API Result cuCtxSynchronize() {
  PSD_NEED_CONTEXT
  return drain(nullptr);
}

// ---- memory ----

PSD_API Result cuMemAlloc_v2(Pointer* pointer, size_t bytes) {
  PSD_NEED_CONTEXT
  PSD_NEED(bytes > 0, kInvalidValue)
  PSD_NEED(bytes <= kMemoryBytes, kOutOfMemory)
  constexpr size_t kAlignment = 256;
  void* start = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  PSD_NEED(start, kOutOfMemory)
  // NaN in every format: what is read before it was written shows.
  std::memset(start, 0xff, bytes);
  *pointer = reinterpret_cast<Pointer>(start);
  allocations[*pointer] = bytes;
  return kSuccess;
}
PSD_API Result cuMemFree_v2(Pointer pointer) {
  PSD_NEED_CONTEXT
  PSD_NEED(allocations.count(pointer), kInvalidValue)
  const Result result = drain(nullptr);
  allocations.erase(pointer);
  std::free(reinterpret_cast<void*>(pointer));
  return result;
}
PSD_API Result cuMemGetInfo_v2(size_t* free_bytes, size_t* total_bytes) {
  PSD_NEED_CONTEXT
  *free_bytes = *total_bytes = kMemoryBytes;
  for (const auto& [start, bytes] : allocations) {
    *free_bytes -= bytes;
  }
  return kSuccess;
}
PSD_API Result cuMemcpyHtoDAsync_v2(Pointer to, const void* from, size_t bytes, void* stream) {
  PSD_NEED_CONTEXT
  PSD_NEED(is_stream(stream), kInvalidHandle)
  PSD_NEED(is_allocated(to, bytes), kInvalidValue)
  return enqueue(stream, [=] { return copy(reinterpret_cast<void*>(to), from, bytes); });
}
PSD_API Result cuMemcpyDtoHAsync_v2(void* to, Pointer from, size_t bytes, void* stream) {
  PSD_NEED_CONTEXT
  PSD_NEED(is_stream(stream), kInvalidHandle)
  PSD_NEED(is_allocated(from, bytes), kInvalidValue)
  return enqueue(stream, [=] { return copy(to, reinterpret_cast<void*>(from), bytes); });
}
PSD_API Result cuMemcpyDtoDAsync_v2(Pointer to, Pointer from, size_t bytes, void* stream) {
  PSD_NEED_CONTEXT
  PSD_NEED(is_stream(stream), kInvalidHandle)
  PSD_NEED(is_allocated(to, bytes) && is_allocated(from, bytes), kInvalidValue)
  return enqueue(stream, [=] { return copy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes); });
}
PSD_API Result cuMemcpyHtoD_v2(Pointer to, const void* from, size_t bytes) {
  const Result queued = cuMemcpyHtoDAsync_v2(to, from, bytes, nullptr);
  return queued == kSuccess ? drain(nullptr) : queued;
}
PSD_API Result cuMemcpyDtoH_v2(void* to, Pointer from, size_t bytes) {
  const Result queued = cuMemcpyDtoHAsync_v2(to, from, bytes, nullptr);
  return queued == kSuccess ? drain(nullptr) : queued;
}

// ---- streams ----

PSD_API Result cuStreamCreate(void** stream, unsigned) {
  PSD_NEED_CONTEXT
  *stream = new char;
  streams.insert(*stream);
  return kSuccess;
}
PSD_API Result cuStreamDestroy_v2(void* stream) {
  PSD_NEED_CONTEXT
  PSD_NEED(streams.erase(stream), kInvalidHandle)
  delete static_cast<char*>(stream);
  return kSuccess;
}
PSD_API Result cuStreamSynchronize(void* stream) {
  PSD_NEED_CONTEXT
  PSD_NEED(is_stream(stream), kInvalidHandle)
  return drain(stream);
}

// ---- kernels ----

PSD_API Result cuModuleLoadDataEx(void** module, const void* image, unsigned, int*, void**) {
  PSD_NEED_CONTEXT
  const char* bytes = static_cast<const char*>(image);
  PSD_NEED(cubin::is_cubin(bytes), kInvalidImage)
  const int arch = cubin::arch(bytes);
  PSD_NEED(arch / 10 == kMajor && arch % 10 <= kMinor, kNoBinary)
  *module = new Module{cubin::entries(bytes)};
  return kSuccess;
}
PSD_API Result cuModuleLoadData(void** module, const void* image) {
  return cuModuleLoadDataEx(module, image, 0, nullptr, nullptr);
}
PSD_API Result cuModuleUnload(void* module) {
  PSD_NEED_CONTEXT
  delete static_cast<Module*>(module);
  return kSuccess;
}
PSD_API Result cuModuleGetFunction(void** function, void* module, const char* name) {
  PSD_NEED_CONTEXT
  PSD_NEED(static_cast<Module*>(module)->entries.count(name), kNotFound)
  *function = find_function(name);
  return *function ? kSuccess : kNotFound;
}
// Calls of the interface before CUDA 4, which PyCUDA makes beside its launch; that states the block itself.
PSD_API Result cuFuncSetBlockShape(void*, int, int, int) { return kSuccess; }

PSD_API Result cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                              unsigned block_y, unsigned block_z, unsigned, void* stream, void** params,
                              void** extra) {
  PSD_NEED_CONTEXT
  PSD_NEED(is_stream(stream), kInvalidHandle)
  const Function& kernel = *static_cast<Function*>(function);
  PSD_NEED(grid_x && grid_y && grid_z && grid_y <= 65535 && grid_z <= 65535, kInvalidValue)
  PSD_NEED(block_x <= kMostThreads && block_x == unsigned(kernel.most_threads), kInvalidValue)
  PSD_NEED(block_y == 1 && block_z == 1, kInvalidValue)
  const void* args = find_args(params, extra, kernel.args_bytes);
  PSD_NEED(args, kInvalidValue)
  // As a driver does: the argument is taken now, the kernel runs when its stream comes to it.
  std::vector<char> taken(kernel.args_bytes);
  std::memcpy(taken.data(), args, taken.size());
  return enqueue(stream, [=] {
    const unsigned grid[3] = {grid_x, grid_y, grid_z};
    return *kernel.launch(kernel.body, grid, int(block_x), taken.data(), 0) ? kLaunchFailed : kSuccess;
  });
}

// cuda-python asks for each call by its plain name; the newest version of those above is the one to give.
PSD_API Result cuGetProcAddress_v2(const char* symbol, void** address, int, uint64_t, int* status) {
  static void* self = [] {
    Dl_info info;
    dladdr(reinterpret_cast<void*>(&cuInit), &info);
    return dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  }();
  void* found = dlsym(self, (std::string(symbol) + "_v2").c_str());
  *address = found ? found : dlsym(self, symbol);
  if (status) {
    *status = *address ? 0 : 1;
  }
  return *address ? kSuccess : kNotFound;
}
PSD_API Result cuGetProcAddress(const char* symbol, void** address, int version, uint64_t flags) {
  return cuGetProcAddress_v2(symbol, address, version, flags, nullptr);
}
