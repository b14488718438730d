/* One pass from uint8 pixels to normalised images: what tidali/loading/resample.py does as matrix products, for CPUs. Compiled at first
   use by tidali/loading/native.py. GCC and Clang: vector types. */

#include <stdint.h>
#include <string.h>

typedef float pixel __attribute__((vector_size(16))); /* R, G, B and nothing */

/* An axis's matrix: each output row or column is a weighted sum of `taps` source ones, from `first` on. */
struct axis {
  const int32_t *first; /* [samples][res], or [1][res] where shared; -taps..size */
  const float *weights; /* [samples][res][taps], or [1][res][taps] */
  int64_t taps;         /* a multiple of 4 */
  int64_t shared;
};

struct shape {
  int64_t height, width, res;
};

static inline int64_t inside(int64_t index, int64_t size) { return index < 0 ? 0 : index < size ? index : size - 1; }

static inline float clamped(float value, float lowest, float highest) {
  value = value < lowest ? lowest : value;
  return value > highest ? highest : value;
}

/* To the nearest, ties to even. No NaN comes here. */
static inline uint16_t to_bfloat16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* One source row, normalised, with `taps` more pixels on both sides that repeat its borders. */
static void load_line(const uint8_t *source, int64_t width, int64_t taps, pixel scale, pixel offset, pixel *line) {
  for (int64_t x = 0; x < width; x++) {
    const uint8_t *p = source + 3 * x;
    pixel value = {p[0], p[1], p[2], 0};
    line[taps + x] = value * scale + offset;
  }
  for (int64_t x = 0; x < taps; x++) {
    line[x] = line[taps];
    line[taps + width + x] = line[taps + width - 1];
  }
}

/* (width,) pixels -> (res, 3) floats. A pixel is stored as four of them; the next one overwrites the fourth. */
static void resample_line(const pixel *line, int64_t res, struct axis a, float *out) {
  for (int64_t x = 0; x < res; x++) {
    const pixel *p = line + a.taps + a.first[x];
    const float *w = a.weights + x * a.taps;
    pixel sum = p[0] * w[0] + p[1] * w[1] + p[2] * w[2] + p[3] * w[3];
    for (int64_t k = 4; k < a.taps; k += 4) sum += p[k] * w[k] + p[k + 1] * w[k + 1] + p[k + 2] * w[k + 2] + p[k + 3] * w[k + 3];
    memcpy(out + 3 * x, &sum, sizeof sum);
  }
}

/* sum, or sum + where `more`, the weighted sum of four source rows from `first` on. */
static inline void add_rows(const float *rows, int64_t pitch, int64_t height, int64_t first, const float *weights, int64_t length,
                            int more, float *restrict sum) {
  const float *r0 = rows + inside(first, height) * pitch, *r1 = rows + inside(first + 1, height) * pitch;
  const float *r2 = rows + inside(first + 2, height) * pitch, *r3 = rows + inside(first + 3, height) * pitch;
  float w0 = weights[0], w1 = weights[1], w2 = weights[2], w3 = weights[3];
  if (more)
    for (int64_t x = 0; x < length; x++) sum[x] += r0[x] * w0 + r1[x] * w1 + r2[x] * w2 + r3[x] * w3;
  else
    for (int64_t x = 0; x < length; x++) sum[x] = r0[x] * w0 + r1[x] * w1 + r2[x] * w2 + r3[x] * w3;
}

/* (height, res, 3) -> (res, res, 3), clamped. A row's sum stays in the nearest cache until it is whole. */
static void resample_rows(const float *rows, int64_t pitch, struct shape s, struct axis a, const float *lowest,
                          const float *highest, int bfloat16, float *restrict sum, void *image) {
  int64_t length = 3 * s.res;
  for (int64_t y = 0; y < s.res; y++) {
    for (int64_t k = 0; k < a.taps; k += 4)
      add_rows(rows, pitch, s.height, a.first[y] + k, a.weights + y * a.taps + k, length, k > 0, sum);
    if (bfloat16) {
      uint16_t *restrict out = (uint16_t *)image + y * length;
      for (int64_t x = 0; x < length; x++) out[x] = to_bfloat16(clamped(sum[x], lowest[x], highest[x]));
    } else {
      float *restrict out = (float *)image + y * length;
      for (int64_t x = 0; x < length; x++) out[x] = clamped(sum[x], lowest[x], highest[x]);
    }
  }
}

static struct axis of_sample(struct axis a, int64_t sample, int64_t res) {
  if (!a.shared) a.first += sample * res, a.weights += sample * res * a.taps;
  return a;
}

/* A row of pixels from right to left. Four bytes at a time where a fifth pixel's do no harm: the next pixel overwrites the fourth. */
static void mirror_row(const uint8_t *source, int64_t width, uint8_t *out) {
  const uint8_t *last = source + 3 * (width - 1);
  memcpy(out, last, 3);
  for (int64_t x = 1; x < width - 1; x++) memcpy(out + 3 * x, last - 3 * x, 4);
  memcpy(out + 3 * (width - 1), source, 3);
}

/* Images begin..end - 1 of `out` (n, height, width, 3): image i is number samples[i] of `pixels`, mirrored where mirrored[i]. */
void tidali_gather(const uint8_t *pixels, int64_t begin, int64_t end, int64_t height, int64_t width, const int64_t *samples,
                   const uint8_t *mirrored, uint8_t *out) {
  int64_t pitch = 3 * width, size = height * pitch;
  for (int64_t n = begin; n < end; n++) {
    const uint8_t *source = pixels + samples[n] * size;
    if (mirrored[n])
      for (int64_t y = 0; y < height; y++) mirror_row(source + y * pitch, width, out + n * size + y * pitch);
    else
      memcpy(out + n * size, source, size);
  }
}

/* Rows begin..end - 1 of (rows, length) pixels, normalised. `scale`, `offset`: of each element of a row. */
void tidali_normalise(const uint8_t *pixels, int64_t begin, int64_t end, int64_t length, const float *scale, const float *offset,
                      int bfloat16, void *images) {
  for (int64_t y = begin; y < end; y++) {
    const uint8_t *row = pixels + y * length;
    if (bfloat16) {
      uint16_t *restrict out = (uint16_t *)images + y * length;
      for (int64_t x = 0; x < length; x++) out[x] = to_bfloat16(row[x] * scale[x] + offset[x]);
    } else {
      float *restrict out = (float *)images + y * length;
      for (int64_t x = 0; x < length; x++) out[x] = row[x] * scale[x] + offset[x];
    }
  }
}

/* Samples begin..end - 1 of (N, height, width, 3) pixels to (N, res, res, 3) images.
   `scale`, `offset`: of each channel. `lowest`, `highest`: of each element of an output row.
   `scratch`: 4 * (width + 2 * horizontal.taps) + (height + 1) * (3 * res + 8) floats, 16-byte aligned. */
void tidali_resample(const uint8_t *pixels, int64_t begin, int64_t end, struct shape s, struct axis vertical,
                     struct axis horizontal, const float *scale, const float *offset, const float *lowest, const float *highest,
                     int bfloat16, float *scratch, void *images) {
  int64_t pitch = 3 * s.res + 8; /* past the last pixel's fourth float */
  pixel *line = (pixel *)scratch;
  float *rows = (float *)(line + s.width + 2 * horizontal.taps), *sum = rows + s.height * pitch;
  pixel scale3 = {scale[0], scale[1], scale[2], 0}, offset3 = {offset[0], offset[1], offset[2], 0};
  int64_t image_bytes = 3 * s.res * s.res * (bfloat16 ? 2 : 4);
  for (int64_t n = begin; n < end; n++) {
    const uint8_t *source = pixels + n * s.height * s.width * 3;
    struct axis columns = of_sample(horizontal, n, s.res);
    for (int64_t y = 0; y < s.height; y++) {
      load_line(source + 3 * y * s.width, s.width, columns.taps, scale3, offset3, line);
      resample_line(line, s.res, columns, rows + y * pitch);
    }
    resample_rows(rows, pitch, s, of_sample(vertical, n, s.res), lowest, highest, bfloat16, sum, (char *)images + n * image_bytes);
  }
}
