// Every kernel by a name of its own: what a cubin holds, what NVRTC compiles, what the tests run on a CPU.
#include "ddim_step.cuh"
#include "dynamic_conv.cuh"
#include "letterbox.cuh"
#include "roi_align.cuh"

// (C, D) of the dynamic convolutions that are built; -DPSD_CHANNELS=C -DPSD_WIDTH=D builds one other instead.
#if defined(PSD_CHANNELS)
#define PSD_EACH_DYNAMIC_CONV(X) X(PSD_CHANNELS, PSD_WIDTH)
#else
#define PSD_EACH_DYNAMIC_CONV(X) X(96, 8) X(128, 8) X(128, 64) X(256, 8) X(256, 64)
#endif

#define PSD_ROI_ALIGN(type, T, ratio)                                                               \
  PSD_ENTRY(psdiff_roi_align_##type##_r##ratio, psdiff::RoiAlignArgs, psdiff::kRoiThreads, 1,          \
            (psdiff::roi_align<T, ratio>(args)))                                                    \
  PSD_ENTRY(psdiff_roi_align_grad_##type##_r##ratio, psdiff::RoiAlignGradArgs, psdiff::kRoiThreads, 1, \
            (psdiff::roi_align_grad<T, ratio>(args)))
PSD_ROI_ALIGN(f32, float, 1)
PSD_ROI_ALIGN(f32, float, 2)
PSD_ROI_ALIGN(f16, psdiff::half_t, 1)
PSD_ROI_ALIGN(f16, psdiff::half_t, 2)
PSD_ROI_ALIGN(bf16, psdiff::bfloat16_t, 1)
PSD_ROI_ALIGN(bf16, psdiff::bfloat16_t, 2)

// Blocks of a dynamic convolution on one multiprocessor, which bounds the registers: 3 on Hopper, so that 300 regions
// are one wave of 132 x 3; the compiler for the others would spill at 3.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ / 100 == 9
#define PSD_CONV_BLOCKS 3
#else
#define PSD_CONV_BLOCKS 2
#endif

#define PSD_DYNAMIC_CONV_OF(type, C, D, body)                                                       \
  PSD_ENTRY(psdiff_dynamic_conv_##type##_c##C##_d##D, psdiff::DynamicConvArgs, psdiff::kConvThreads, \
            PSD_CONV_BLOCKS, (body(args)))
#define PSD_DYNAMIC_CONV(C, D)                                                                      \
  PSD_DYNAMIC_CONV_OF(f32, C, D, (psdiff::dynamic_conv_float<C, D>))                                \
  PSD_DYNAMIC_CONV_OF(f16, C, D, (psdiff::dynamic_conv<psdiff::half_t, C, D>))                      \
  PSD_DYNAMIC_CONV_OF(bf16, C, D, (psdiff::dynamic_conv<psdiff::bfloat16_t, C, D>))
PSD_EACH_DYNAMIC_CONV(PSD_DYNAMIC_CONV)

#define PSD_DDIM_STEP(type, T) \
  PSD_ENTRY(psdiff_ddim_step_##type, psdiff::DdimStepArgs, psdiff::kStepThreads, 1, (psdiff::ddim_step<T>(args)))
PSD_DDIM_STEP(f32, float)
PSD_DDIM_STEP(f16, psdiff::half_t)
PSD_DDIM_STEP(bf16, psdiff::bfloat16_t)

#define PSD_LETTERBOX(source, Source, type, T)                                                      \
  PSD_ENTRY(psdiff_letterbox_##source##_##type, psdiff::LetterboxArgs, psdiff::kLetterboxThreads, 1, \
            (psdiff::letterbox<Source, T>(args)))
PSD_LETTERBOX(rgb8, psdiff::Rgb8, u8, unsigned char)
PSD_LETTERBOX(rgb8, psdiff::Rgb8, f16, psdiff::half_t)
PSD_LETTERBOX(rgb8, psdiff::Rgb8, f32, float)
PSD_LETTERBOX(nv12, psdiff::Nv12, u8, unsigned char)
PSD_LETTERBOX(nv12, psdiff::Nv12, f16, psdiff::half_t)
PSD_LETTERBOX(nv12, psdiff::Nv12, f32, float)
