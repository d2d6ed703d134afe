// The kernels of csrc, compiled for a CPU, and the one function by which tests start them.
#include "entries.cu"

extern "C" const char* launch_on_host(void (*entry)(const void*), const unsigned* grid, int threads, const void* args,
                                      unsigned seed) {
  static std::string problem;
  problem = host::launch(dim3{grid[0], grid[1], grid[2]}, threads, seed, [=] { entry(args); });
  return problem.c_str();
}
