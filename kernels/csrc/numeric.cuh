// Conversions, 16-byte vectors and reductions over a warp or a quad of lanes.
#pragma once
#include "platform.cuh"

namespace psdiff {

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)

PSD_DEVICE float to_float(half_t x) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
}
PSD_DEVICE float to_float(bfloat16_t x) { return __uint_as_float(u32(x.bits) << 16); }

// Round to nearest, ties to even; low goes to the lower half of the word, as in memory.
template <typename T>
PSD_DEVICE u32 pack_pair(float low, float high);
template <>
PSD_SPECIAL u32 pack_pair<half_t>(float low, float high) {
  u32 word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
template <>
PSD_SPECIAL u32 pack_pair<bfloat16_t>(float low, float high) {
  u32 word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// One store of 16 bytes; assigning a uint4 may become four.
PSD_DEVICE void store_vector(void* to, const uint4& vector) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(vector.x), "r"(vector.y), "r"(vector.z),
               "r"(vector.w));
}

#else

PSD_DEVICE void store_vector(void* to, const uint4& vector) { *static_cast<uint4*>(to) = vector; }

PSD_DEVICE float to_float(half_t x) { return host::float_of_half(x.bits); }
PSD_DEVICE float to_float(bfloat16_t x) { return host::float_of_bfloat16(x.bits); }

template <typename T>
PSD_DEVICE u32 pack_pair(float low, float high);
template <>
PSD_SPECIAL u32 pack_pair<half_t>(float low, float high) {
  return host::half_of_float(low) | u32(host::half_of_float(high)) << 16;
}
template <>
PSD_SPECIAL u32 pack_pair<bfloat16_t>(float low, float high) {
  return host::bfloat16_of_float(low) | u32(host::bfloat16_of_float(high)) << 16;
}

#endif

PSD_DEVICE float to_float(float x) { return x; }

template <typename T>
PSD_DEVICE T from_float(float x) {
  return T{u16(pack_pair<T>(x, 0.f))};
}
template <>
PSD_SPECIAL float from_float<float>(float x) {
  return x;
}

// What one 16-byte load brings: 4 float, 8 half_t or 8 bfloat16_t.
template <typename T>
struct Vector {
  static constexpr int kCount = 16 / sizeof(T);

  static PSD_MEMBER void unpack(const uint4& vector, float (&values)[kCount]) {
    const u32 words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[2 * i] = to_float(T{u16(words[i])});
      values[2 * i + 1] = to_float(T{u16(words[i] >> 16)});
    }
  }

  static PSD_MEMBER uint4 pack(const float (&values)[kCount]) {
    return make_uint4(pack_pair<T>(values[0], values[1]), pack_pair<T>(values[2], values[3]),
                      pack_pair<T>(values[4], values[5]), pack_pair<T>(values[6], values[7]));
  }
};

template <>
struct Vector<float> {
  static constexpr int kCount = 4;

  static PSD_MEMBER void unpack(const uint4& vector, float (&values)[kCount]) {
    values[0] = __uint_as_float(vector.x);
    values[1] = __uint_as_float(vector.y);
    values[2] = __uint_as_float(vector.z);
    values[3] = __uint_as_float(vector.w);
  }

  static PSD_MEMBER uint4 pack(const float (&values)[kCount]) {
    return make_uint4(__float_as_uint(values[0]), __float_as_uint(values[1]), __float_as_uint(values[2]),
                      __float_as_uint(values[3]));
  }
};

// Every lane of a group of `lanes` neighbours gets the sum over the group; lanes is a power of two.
template <int lanes>
PSD_DEVICE float sum_of_lanes(float value) {
#pragma unroll
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, distance);
  }
  return value;
}

}  // namespace psdiff
