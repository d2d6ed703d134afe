/* NVIDIA's driver as far as PyNvVideoCodec decodes with it, without a GPU: device memory is host memory, and a
 * "decoded" picture repeats the bytes of its packet. Built three times: libcuda, libnvcuvid, libnvidia-encode.
 *
 * Structures and values are those of the Video Codec SDK's ABI (cuviddec.h, nvcuvid.h, cuda.h). As in the real parser, a
 * picture without END_OF_PICTURE is decoded when the next packet comes, and pictures are shown in the order of their
 * times once more than ulMaxDisplayDelay of them wait. In the environment, FAIL_AT=N: the N-th packet fails; BITS=10: the
 * stream says that its pictures have so many.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID_VALUE = 1, UNKNOWN = 999 };
enum { WIDTH = 160, HEIGHT = 96, CODED_HEIGHT = 96, PITCH = 256, SURFACES = 32 };
enum { END_OF_STREAM = 1, TIMESTAMP = 2, END_OF_PICTURE = 8 };

#define HANDLE(name) \
  int name(void **handle) { if (handle) *handle = (void *)0x1000; return OK; }
#define NOTHING(name) \
  int name(void) { return OK; }

/* cuda.h */

typedef struct {
  size_t src_x, src_y;
  int src_type;
  const void *src_host;
  uint64_t src_device;
  void *src_array;
  size_t src_pitch;
  size_t dst_x, dst_y;
  int dst_type;
  void *dst_host;
  uint64_t dst_device;
  void *dst_array;
  size_t dst_pitch;
  size_t width, height;
} Copy2D;

enum { HOST = 1, DEVICE = 2 };

NOTHING(cuInit)
NOTHING(cuCtxDestroy_v2)
NOTHING(cuCtxPushCurrent_v2)
NOTHING(cuDevicePrimaryCtxRelease_v2)
NOTHING(cuEventDestroy_v2)
NOTHING(cuEventRecord)
NOTHING(cuEventSynchronize)
NOTHING(cuStreamDestroy_v2)
NOTHING(cuStreamSynchronize)
NOTHING(cuStreamWaitEvent)
HANDLE(cuCtxCreate_v2)
HANDLE(cuCtxPopCurrent_v2)
HANDLE(cuDevicePrimaryCtxRetain)
HANDLE(cuEventCreate)
HANDLE(cuStreamCreate)
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return OK; }
int cuCtxGetDevice(int *device) { *device = 0; return OK; }
int cuDeviceGetCount(int *count) { *count = 1; return OK; }
int cuGetErrorName(int error, const char **name) { (void)error; *name = "CUDA_ERROR_UNKNOWN"; return OK; }
int cuGetErrorString(int error, const char **text) { (void)error; *text = "unknown error"; return OK; }
int cuStreamGetCtx(void *stream, void **context) { (void)stream; *context = (void *)0x1000; return OK; }
int cuPointerGetAttribute(void *data, int attribute, uint64_t pointer) { (void)data, (void)attribute, (void)pointer; return INVALID_VALUE; }
int cuMemAlloc_v2(uint64_t *pointer, size_t size) { *pointer = (uint64_t)malloc(size); return OK; }
int cuMemAllocAsync(uint64_t *pointer, size_t size, void *stream) { (void)stream; return cuMemAlloc_v2(pointer, size); }
int cuMemAllocPitch_v2(uint64_t *pointer, size_t *pitch, size_t width, size_t height, unsigned element) {
  (void)element;
  *pitch = (width + 255) / 256 * 256;
  return cuMemAlloc_v2(pointer, *pitch * height);
}
int cuMemFree_v2(uint64_t pointer) { free((void *)pointer); return OK; }
int cuMemFreeAsync(uint64_t pointer, void *stream) { (void)stream; return cuMemFree_v2(pointer); }
int cuMemcpyDtoH_v2(void *to, uint64_t from, size_t size) { memcpy(to, (void *)from, size); return OK; }
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t size, void *stream) { (void)stream; return cuMemcpyDtoH_v2(to, from, size); }
int cuMemcpyHtoD_v2(uint64_t to, const void *from, size_t size) { memcpy((void *)to, from, size); return OK; }
int cuMemcpy2D_v2(const Copy2D *copy) {
  const char *from = copy->src_type == HOST ? copy->src_host : (const char *)copy->src_device;
  char *to = copy->dst_type == HOST ? copy->dst_host : (char *)copy->dst_device;
  for (size_t y = 0; y < copy->height; y++)
    memcpy(to + (copy->dst_y + y) * copy->dst_pitch + copy->dst_x,
           from + (copy->src_y + y) * copy->src_pitch + copy->src_x, copy->width);
  return OK;
}
int cuMemcpy2DAsync_v2(const Copy2D *copy, void *stream) { (void)stream; return cuMemcpy2D_v2(copy); }

/* nvcuvid.h, cuviddec.h */

typedef struct {
  int codec;
  struct { unsigned numerator, denominator; } frame_rate;
  uint8_t progressive, luma_bits_minus_8, chroma_bits_minus_8, min_surfaces;
  unsigned coded_width, coded_height;
  struct { int left, top, right, bottom; } display;
  int chroma_format;
  unsigned bitrate;
  struct { int x, y; } aspect;
  uint8_t signal[4];
  unsigned header_length;
} Format;

typedef struct {
  int picture, progressive, top_field_first, repeat_first_field;
  int64_t timestamp;
} Shown;

typedef struct {
  int codec;
  unsigned max_surfaces, clock_rate, error_threshold, max_display_delay, annexb, reserved[4];
  void *user;
  int (*sequence)(void *, Format *);
  int (*decode)(void *, void *);
  int (*display)(void *, Shown *);
} ParserParams;

typedef struct {
  unsigned long flags, size;
  const uint8_t *data;
  int64_t timestamp;
} Packet;

typedef struct {
  int codec, chroma_format;
  unsigned bits_minus_8, reserved[3];
  uint8_t is_supported, num_engines;
  uint16_t format_mask;
  unsigned max_width, max_height, max_blocks;
  uint16_t min_width, min_height;
} Caps;

typedef struct {
  ParserParams params;
  int has_format, next, num_packets, num_waiting;
  Shown waiting[SURFACES];
  uint8_t *unfinished;
  unsigned long unfinished_size;
  int64_t unfinished_time;
} Parser;

/* The pictures of the one decoder, NV12 in lines of PITCH bytes. */
static uint8_t surfaces[SURFACES][PITCH * CODED_HEIGHT * 3 / 2];

static int setting(const char *name, int otherwise) {
  const char *text = getenv(name);
  return text ? atoi(text) : otherwise;
}

static void paint(uint8_t *surface, const uint8_t *data, unsigned long size) {
  for (int y = 0; y < CODED_HEIGHT * 3 / 2; y++)
    for (int x = 0; x < WIDTH; x++) {
      uint8_t value = data[(unsigned long)(y * WIDTH + x) % size];
      surface[y * PITCH + x] = y < CODED_HEIGHT ? value : 255 - value;
    }
}

static int show(Parser *parser, unsigned most) {
  while (parser->num_waiting > (int)most) {
    int first = 0;
    for (int i = 1; i < parser->num_waiting; i++)
      if (parser->waiting[i].timestamp < parser->waiting[first].timestamp) first = i;
    Shown shown = parser->waiting[first];
    parser->waiting[first] = parser->waiting[--parser->num_waiting];
    if (!parser->params.display(parser->params.user, &shown)) return UNKNOWN;
  }
  return OK;
}

static int decode(Parser *parser, const uint8_t *data, unsigned long size, int64_t time) {
  if (!parser->has_format) {
    Format format = {0};
    format.codec = parser->params.codec;
    format.progressive = 1;
    format.luma_bits_minus_8 = format.chroma_bits_minus_8 = setting("BITS", 8) - 8;
    format.min_surfaces = 8;
    format.coded_width = WIDTH, format.coded_height = CODED_HEIGHT;
    format.display.right = WIDTH, format.display.bottom = HEIGHT;
    format.chroma_format = 1;
    if (!parser->params.sequence(parser->params.user, &format)) return UNKNOWN;
    parser->has_format = 1;
  }
  int index = parser->next++ % 8;
  paint(surfaces[index], data, size);
  int picture[2048] = {WIDTH / 16, CODED_HEIGHT / 16, index};
  if (!parser->params.decode(parser->params.user, picture)) return UNKNOWN;
  parser->waiting[parser->num_waiting++] = (Shown){index, 1, 0, 0, time};
  return show(parser, parser->params.max_display_delay);
}

static int finish(Parser *parser) {
  if (!parser->unfinished) return OK;
  int status = decode(parser, parser->unfinished, parser->unfinished_size, parser->unfinished_time);
  free(parser->unfinished);
  parser->unfinished = NULL;
  return status;
}

int cuvidCreateVideoParser(Parser **parser, const ParserParams *params) {
  *parser = calloc(1, sizeof **parser);
  (*parser)->params = *params;
  return OK;
}

int cuvidParseVideoData(Parser *parser, const Packet *packet) {
  if (++parser->num_packets >= setting("FAIL_AT", 1 << 30)) return UNKNOWN;
  int status = finish(parser);
  if (status == OK && packet->size) {
    if (!(packet->flags & TIMESTAMP)) return INVALID_VALUE;
    if (packet->flags & END_OF_PICTURE)
      status = decode(parser, packet->data, packet->size, packet->timestamp);
    else {
      parser->unfinished = memcpy(malloc(packet->size), packet->data, packet->size);
      parser->unfinished_size = packet->size;
      parser->unfinished_time = packet->timestamp;
    }
  }
  if (status == OK && packet->flags & END_OF_STREAM) {
    status = finish(parser);
    if (status == OK) status = show(parser, 0);
  }
  return status;
}

int cuvidDestroyVideoParser(Parser *parser) { free(parser); return OK; }

int cuvidGetDecoderCaps(Caps *caps) {
  caps->is_supported = 1, caps->num_engines = 3, caps->format_mask = 3; /* NV12, P016 */
  caps->max_width = caps->max_height = 4096, caps->max_blocks = 65536;
  caps->min_width = caps->min_height = 16;
  return OK;
}

int cuvidMapVideoFrame64(void *decoder, int picture, uint64_t *pointer, unsigned *pitch, void *params) {
  (void)decoder, (void)params;
  *pointer = (uint64_t)surfaces[picture], *pitch = PITCH;
  return OK;
}

/* The status of a picture: 2 is success. */
int cuvidGetDecodeStatus(void *decoder, int picture, int *status) { (void)decoder, (void)picture; *status = 2; return OK; }

HANDLE(cuvidCreateDecoder)
HANDLE(cuvidCtxLockCreate)
NOTHING(cuvidDecodePicture)
NOTHING(cuvidDestroyDecoder)
NOTHING(cuvidReconfigureDecoder)
NOTHING(cuvidUnmapVideoFrame64)
NOTHING(cuvidCtxLock)
NOTHING(cuvidCtxUnlock)
NOTHING(cuvidCtxLockDestroy)
NOTHING(cuvidCreateVideoSource)
NOTHING(cuvidCreateVideoSourceW)
NOTHING(cuvidDestroyVideoSource)
NOTHING(cuvidGetSourceAudioFormat)
NOTHING(cuvidGetSourceVideoFormat)
NOTHING(cuvidGetVideoSourceState)
NOTHING(cuvidSetVideoSourceState)

/* nvEncodeAPI.h: which of its two builds PyNvVideoCodec takes. */
int NvEncodeAPIGetMaxSupportedVersion(uint32_t *version) { *version = 13 << 4; return OK; }
