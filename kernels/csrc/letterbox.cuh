// A decoded frame, RGB8 or NV12, to the network's canvas in one pass: resize, convert, pad, and normalise if wanted.
//
// Computes kernels/reference_frame.py:letterbox: the frame in the top left corner at its aspect ratio, mid grey around
// it. A frame that shrinks is averaged over the area of each pixel, one that grows is interpolated, as cv2.INTER_AREA
// and cv2.INTER_LINEAR do. NV12 is averaged first and converted then, which is the same where no channel clamps;
// where one does, what lies beyond 0..255 counts in the average, and only the average is clamped.
//
// Launch: a thread a pixel of the canvas, 256 a block, so that neighbours read neighbouring spans of a row.
//
// Bytes at the target (1920x1080 to 640x360 on a canvas of 640x384): RGB8 6.2 MB, NV12 3.1 MB, and 0.74 MB written.
// Roofline for NV12: Orin 19 us, L4 13 us, A100 1.9 us, H200 0.8 us; for RGB8 34, 23, 3.4 and 1.5 us.
#pragma once
#include "numeric.cuh"

namespace psdiff {

constexpr int kLetterboxThreads = 256;
constexpr float kPadValue = 114.f;

struct LetterboxArgs {
  const void* first_plane;   // RGB (h, w, 3), or luma (h, w)
  const void* chroma_plane;  // NV12 only: (ceil(h / 2), ceil(w / 2), 2), U before V
  void* canvas;              // (height, width, 3): uint8 RGB, or normalised
  int first_pitch;           // bytes from row to row
  int chroma_pitch;
  int frame_width;
  int frame_height;
  int placed_width;  // of the frame on the canvas
  int placed_height;
  int width;
  int height;
  // From Y, U, V to R, G, B: gains of luma above its offset, of V for red, of U and V for green, of U for blue.
  float luma_offset;
  float luma_gain;
  float red_v;
  float green_u;
  float green_v;
  float blue_u;
  float mean[3];  // normalised: (x - mean) * inverse_std of 0..255 values
  float inverse_std[3];
};

struct Colour {
  float a, b, c;
};

struct Rgb8 {
  static PSD_MEMBER Colour at(const LetterboxArgs& args, int x, int y) {
    const auto* pixel = static_cast<const unsigned char*>(args.first_plane) + i64(y) * args.first_pitch + 3 * x;
    return Colour{float(pixel[0]), float(pixel[1]), float(pixel[2])};
  }
  static PSD_MEMBER Colour rgb(const LetterboxArgs&, const Colour& colour) { return colour; }
};

struct Nv12 {
  static PSD_MEMBER Colour at(const LetterboxArgs& args, int x, int y) {
    const auto* luma = static_cast<const unsigned char*>(args.first_plane) + i64(y) * args.first_pitch + x;
    const auto* chroma =
        static_cast<const unsigned char*>(args.chroma_plane) + i64(y / 2) * args.chroma_pitch + x / 2 * 2;
    return Colour{float(luma[0]), float(chroma[0]), float(chroma[1])};
  }
  static PSD_MEMBER Colour rgb(const LetterboxArgs& args, const Colour& yuv) {
    const float y = (yuv.a - args.luma_offset) * args.luma_gain, u = yuv.b - 128.f, v = yuv.c - 128.f;
    return Colour{y + args.red_v * v, y + args.green_u * u + args.green_v * v, y + args.blue_u * u};
  }
};

PSD_DEVICE void add(Colour& sum, float weight, const Colour& colour) {
  sum.a += weight * colour.a;
  sum.b += weight * colour.b;
  sum.c += weight * colour.c;
}

// How much of source cell `cell` lies in the span low..high.
PSD_DEVICE float overlap(int cell, float low, float high) {
  return fmaxf(fminf(float(cell) + 1.f, high) - fmaxf(float(cell), low), 0.f);
}

template <typename Source>
PSD_DEVICE Colour averaged(const LetterboxArgs& args, int x, int y, float scale_x, float scale_y) {
  const float left = x * scale_x, right = fminf(left + scale_x, float(args.frame_width));
  const float top = y * scale_y, bottom = fminf(top + scale_y, float(args.frame_height));
  Colour sum{0.f, 0.f, 0.f};
  float area = 0.f;
  for (int row = int(top); row < min(int(ceilf(bottom)), args.frame_height); ++row) {
    for (int column = int(left); column < min(int(ceilf(right)), args.frame_width); ++column) {
      const float weight = overlap(row, top, bottom) * overlap(column, left, right);
      add(sum, weight, Source::at(args, column, row));
      area += weight;
    }
  }
  return Colour{sum.a / area, sum.b / area, sum.c / area};
}

template <typename Source>
PSD_DEVICE Colour interpolated(const LetterboxArgs& args, int x, int y, float scale_x, float scale_y) {
  const float column = fminf(fmaxf((x + 0.5f) * scale_x - 0.5f, 0.f), float(args.frame_width - 1));
  const float row = fminf(fmaxf((y + 0.5f) * scale_y - 0.5f, 0.f), float(args.frame_height - 1));
  const int left = int(column), top = int(row);
  const int right = min(left + 1, args.frame_width - 1), bottom = min(top + 1, args.frame_height - 1);
  const float share_x = column - float(left), share_y = row - float(top);
  Colour sum{0.f, 0.f, 0.f};
  add(sum, (1.f - share_y) * (1.f - share_x), Source::at(args, left, top));
  add(sum, (1.f - share_y) * share_x, Source::at(args, right, top));
  add(sum, share_y * (1.f - share_x), Source::at(args, left, bottom));
  add(sum, share_y * share_x, Source::at(args, right, bottom));
  return sum;
}

PSD_DEVICE float in_range(float x) { return fminf(fmaxf(x, 0.f), 255.f); }

PSD_DEVICE void store_colour(const LetterboxArgs&, const Colour& colour, unsigned char* pixel) {
  pixel[0] = static_cast<unsigned char>(rintf(colour.a));
  pixel[1] = static_cast<unsigned char>(rintf(colour.b));
  pixel[2] = static_cast<unsigned char>(rintf(colour.c));
}
template <typename T>
PSD_DEVICE void store_colour(const LetterboxArgs& args, const Colour& colour, T* pixel) {
  pixel[0] = from_float<T>((colour.a - args.mean[0]) * args.inverse_std[0]);
  pixel[1] = from_float<T>((colour.b - args.mean[1]) * args.inverse_std[1]);
  pixel[2] = from_float<T>((colour.c - args.mean[2]) * args.inverse_std[2]);
}

template <typename Source, typename T>
PSD_DEVICE void letterbox(const LetterboxArgs& args) {
  const int index = int(blockIdx.x) * kLetterboxThreads + int(threadIdx.x);
  if (index >= args.width * args.height) {
    return;
  }
  const int x = index % args.width, y = index / args.width;
  Colour colour{kPadValue, kPadValue, kPadValue};
  if (x < args.placed_width && y < args.placed_height) {
    const float scale_x = float(args.frame_width) / float(args.placed_width);
    const float scale_y = float(args.frame_height) / float(args.placed_height);
    const bool shrinks = scale_x >= 1.f && scale_y >= 1.f;
    const Colour mixed = shrinks ? averaged<Source>(args, x, y, scale_x, scale_y)
                                 : interpolated<Source>(args, x, y, scale_x, scale_y);
    const Colour rgb = Source::rgb(args, mixed);
    colour = Colour{in_range(rgb.a), in_range(rgb.b), in_range(rgb.c)};
  }
  store_colour(args, colour, static_cast<T*>(args.canvas) + 3 * i64(index));
}

}  // namespace psdiff
