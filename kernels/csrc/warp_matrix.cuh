// Products of small matrices by a warp, and copies to shared memory that run beside them: sm_80 and later.
//
// Lane l of a warp is g = l / 4, t = l % 4. Fragments, as PTX ISA gives them for 16-bit types:
//   A (16, 16): words (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8); A (16, 8): the first two
//   B (16, 8):  words (2t, g), (2t + 8, g), two rows of one column in a word; B (8, 8): the first
//   D (16, 8):  floats (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
#pragma once
#include "numeric.cuh"

namespace psdiff {

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)

#define PSD_MMA_K16(T, name)                                                                        \
  PSD_DEVICE void multiply_add(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, T) {               \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name ".f32 "                     \
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                  \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                   \
  }
#define PSD_MMA_K8(T, name)                                                                         \
  PSD_DEVICE void multiply_add(float (&d)[4], const u32 (&a)[2], u32 b, T) {                        \
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32." name "." name ".f32 "                      \
                 "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"                              \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                   \
                 : "r"(a[0]), "r"(a[1]), "r"(b));                                                   \
  }
PSD_MMA_K16(half_t, "f16")
PSD_MMA_K16(bfloat16_t, "bf16")
PSD_MMA_K8(half_t, "f16")
PSD_MMA_K8(bfloat16_t, "bf16")
#undef PSD_MMA_K16
#undef PSD_MMA_K8

PSD_DEVICE u32 shared_address(const void* pointer) {
  return u32(__cvta_generic_to_shared(pointer));
}

// Two or four 8x8 matrices of 16-bit elements, transposed into fragments of B. Lane 8m + r gives the address of row
// r of matrix m, 16 bytes.
PSD_DEVICE void load_matrices_transposed(u32 (&words)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(row))
               : "memory");
}
PSD_DEVICE void load_matrices_transposed(u32 (&words)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(words[0]), "=r"(words[1])
               : "r"(shared_address(row))
               : "memory");
}
PSD_DEVICE void load_matrices_transposed(u32 (&words)[1], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
               : "=r"(words[0])
               : "r"(shared_address(row))
               : "memory");
}

// 16 bytes from global to shared memory, past L1 and registers.
PSD_DEVICE void copy_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
PSD_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Wait for all but the newest `pending` groups of this thread.
template <int pending>
PSD_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

#else

template <typename T>
float decode_bits(u16 bits) {
  return to_float(T{bits});
}
template <typename T>
PSD_DEVICE void multiply_add(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, T) {
  const u32 b[2] = {b0, b1};
  host::matrix_multiply(d, a, b, 16, decode_bits<T>, __LINE__);
}
template <typename T>
PSD_DEVICE void multiply_add(float (&d)[4], const u32 (&a)[2], u32 b, T) {
  host::matrix_multiply(d, a, &b, 8, decode_bits<T>, __LINE__);
}
template <int matrices>
PSD_DEVICE void load_matrices_transposed(u32 (&words)[matrices], const void* row) {
  host::load_matrices_transposed(words, matrices, row, __LINE__);
}
PSD_DEVICE void copy_async(void* to, const void* from) { host::copy_async(to, from); }
PSD_DEVICE void commit_copies() { host::commit_copies(); }
template <int pending>
PSD_DEVICE void wait_copies() {
  host::wait_copies(pending);
}

#endif

}  // namespace psdiff
