/* One pass from uint8 pixels to normalised images: what tidali/loading/resample.py does as matrix products, for CPUs; and boxes
   of images of any size to uint8 squares. Compiled at first use by tidali/loading/native.py. GCC and Clang: vector types. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

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

/* An affine map of colours, y = red * R + green * G + blue * B + offset: normalisation, and colour augmentation with it. */
struct colour {
  pixel red, green, blue, offset;
};

/* `colours`: [samples][4][4], or [1][4][4] where shared: the columns of a 3 x 4 matrix, each with a fourth element of 0. */
static struct colour colour_of(const float *colours, int64_t shared, int64_t sample) {
  struct colour c;
  memcpy(&c, colours + (shared ? 0 : 16 * sample), sizeof c);
  return c;
}

static inline pixel coloured(struct colour c, const uint8_t *p) {
  return c.red * (float)p[0] + (c.green * (float)p[1] + (c.blue * (float)p[2] + c.offset));
}

/* One source row with its colours mapped, and `taps` more pixels on both sides that repeat its borders. */
static void load_line(const uint8_t *source, int64_t width, int64_t taps, struct colour c, pixel *line) {
  for (int64_t x = 0; x < width; x++) line[taps + x] = coloured(c, source + 3 * x);
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
static void flip_row(const uint8_t *source, int64_t width, uint8_t *out) {
  const uint8_t *last = source + 3 * (width - 1);
  memcpy(out, last, 3);
  for (int64_t x = 1; x < width - 1; x++) memcpy(out + 3 * x, last - 3 * x, 4);
  memcpy(out + 3 * (width - 1), source, 3);
}

/* Images begin..end - 1 of `out` (n, height, width, 3): image i is number samples[i] of `pixels`, flipped where flips[i]. */
void tidali_gather(const uint8_t *pixels, int64_t begin, int64_t end, int64_t height, int64_t width, const int64_t *samples,
                   const uint8_t *flips, uint8_t *out) {
  int64_t pitch = 3 * width, size = height * pitch;
  for (int64_t n = begin; n < end; n++) {
    const uint8_t *source = pixels + samples[n] * size;
    if (flips[n])
      for (int64_t y = 0; y < height; y++) flip_row(source + y * pitch, width, out + n * size + y * pitch);
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

/* Images begin..end - 1 of (N, length, 3) pixels, each with its own colour map, clamped. `lowest`, `highest`: of each channel. */
void tidali_colour(const uint8_t *pixels, int64_t begin, int64_t end, int64_t length, const float *colours, const float *lowest,
                   const float *highest, int bfloat16, void *images) {
  for (int64_t n = begin; n < end; n++) {
    struct colour c = colour_of(colours, 0, n);
    for (int64_t i = n * length; i < (n + 1) * length; i++) {
      pixel value = coloured(c, pixels + 3 * i);
      for (int k = 0; k < 3; k++) {
        float channel = clamped(value[k], lowest[k], highest[k]);
        if (bfloat16)
          ((uint16_t *)images)[3 * i + k] = to_bfloat16(channel);
        else
          ((float *)images)[3 * i + k] = channel;
      }
    }
  }
}

/* Samples begin..end - 1 of (N, height, width, 3) pixels to (N, res, res, 3) images.
   `colours`: see colour_of. `lowest`, `highest`: of each element of an output row.
   `scratch`: 4 * (width + 2 * horizontal.taps) + (height + 1) * (3 * res + 8) floats, 16-byte aligned. */
void tidali_resample(const uint8_t *pixels, int64_t begin, int64_t end, struct shape s, struct axis vertical,
                     struct axis horizontal, const float *colours, int64_t one_colour, const float *lowest, const float *highest,
                     int bfloat16, float *scratch, void *images) {
  int64_t pitch = 3 * s.res + 8; /* past the last pixel's fourth float */
  pixel *line = (pixel *)scratch;
  float *rows = (float *)(line + s.width + 2 * horizontal.taps), *sum = rows + s.height * pitch;
  int64_t image_bytes = 3 * s.res * s.res * (bfloat16 ? 2 : 4);
  for (int64_t n = begin; n < end; n++) {
    const uint8_t *source = pixels + n * s.height * s.width * 3;
    struct axis columns = of_sample(horizontal, n, s.res);
    struct colour c = colour_of(colours, one_colour, n);
    for (int64_t y = 0; y < s.height; y++) {
      load_line(source + 3 * y * s.width, s.width, columns.taps, c, line);
      resample_line(line, s.res, columns, rows + y * pitch);
    }
    resample_rows(rows, pitch, s, of_sample(vertical, n, s.res), lowest, highest, bfloat16, sum, (char *)images + n * image_bytes);
  }
}

/* A box of an image: what becomes one square. The box is in the image's pixels, and pixels outside it count at its edges. */
struct piece {
  const uint8_t *pixels; /* [height][width][3] */
  int64_t height, width;
  float top, left, box_height, box_width;
};

/* Keys' cubic with its constant a free, as tidali/loading/resample.py has it. */
static float cubic(float x, float a) {
  x = fabsf(x);
  if (x <= 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? a * (((x - 5) * x + 8) * x - 4) : 0;
}

static int64_t taps_of(float scale) { return (2 * (int64_t)ceilf(2 * fmaxf(scale, 1)) + 3) / 4 * 4; }

/* The rows of an axis's matrix: `res` output pixels from `start` on, `scale` source pixels each, antialiased. */
static void make_taps(int64_t res, float start, float scale, float a, int64_t taps, int32_t *first, float *weights) {
  float stretch = fmaxf(scale, 1);
  for (int64_t i = 0; i < res; i++) {
    float centre = start + (i + 0.5f) * scale - 0.5f, begin = floorf(centre - 2 * stretch) + 1, sum = 0;
    float *w = weights + i * taps;
    for (int64_t k = 0; k < taps; k++) sum += w[k] = cubic((begin + k - centre) / stretch, a);
    for (int64_t k = 0; k < taps; k++) w[k] /= sum;
    first[i] = (int32_t)begin;
  }
}

/* The part of an axis that its matrix reads, so that nothing else is touched; `first` is counted from its start on. */
static int64_t narrow(int64_t res, int64_t taps, int64_t size, int32_t *first, int64_t *length) {
  int64_t begin = inside(first[0], size), end = inside(first[res - 1] + taps - 1, size) + 1;
  for (int64_t i = 0; i < res; i++) {
    int64_t from = first[i] - begin;
    first[i] = (int32_t)(from < -taps ? -taps : from > end - begin ? end - begin : from);
  }
  *length = end - begin;
  return begin;
}

/* Pieces begin..end - 1 to (res, res, 3) uint8 squares, bicubic with the constant `a`, rounded to the nearest.
   Returns 0, or 1 where there is no memory. */
int tidali_squares(const struct piece *pieces, int64_t begin, int64_t end, int64_t res, float a, uint8_t *squares) {
  struct colour plain = {{1, 0, 0, 0}, {0, 1, 0, 0}, {0, 0, 1, 0}, {0, 0, 0, 0}};
  int64_t pitch = 3 * res + 8, length = 3 * res;
  float *scratch = NULL;
  size_t held = 0;
  for (int64_t n = begin; n < end; n++) {
    struct piece p = pieces[n];
    float scale_y = p.box_height / res, scale_x = p.box_width / res;
    struct axis rows = {NULL, NULL, taps_of(scale_y), 1}, columns = {NULL, NULL, taps_of(scale_x), 1};
    size_t matrices = (size_t)res * (2 + rows.taps + columns.taps), lines = 4 * (size_t)(p.width + 2 * columns.taps);
    /* The box's own rows alone are resized along x: a bound of them, known before the matrix is. */
    size_t most = (size_t)fminf(p.height, p.box_height + 2 * rows.taps + 2) + 1;
    size_t needed = (matrices + lines + (most + 1) * pitch + 4) * sizeof(float);
    if (needed > held) {
      free(scratch);
      scratch = malloc(held = needed);
      if (scratch == NULL) return 1;
    }
    pixel *line = (pixel *)scratch; /* malloc aligns to 16 bytes */
    float *resized = scratch + lines, *sum = resized + most * pitch, *weights_y = sum + pitch;
    float *weights_x = weights_y + res * rows.taps;
    int32_t *first_y = (int32_t *)(weights_x + res * columns.taps), *first_x = first_y + res;
    make_taps(res, p.top, scale_y, a, rows.taps, first_y, weights_y);
    make_taps(res, p.left, scale_x, a, columns.taps, first_x, weights_x);
    int64_t height, width, y0 = narrow(res, rows.taps, p.height, first_y, &height);
    int64_t x0 = narrow(res, columns.taps, p.width, first_x, &width);
    columns.first = first_x, columns.weights = weights_x;
    for (int64_t y = 0; y < height; y++) {
      load_line(p.pixels + 3 * ((y0 + y) * p.width + x0), width, columns.taps, plain, line);
      resample_line(line, res, columns, resized + y * pitch);
    }
    uint8_t *restrict out = squares + n * res * length;
    for (int64_t y = 0; y < res; y++, out += length) {
      for (int64_t k = 0; k < rows.taps; k += 4)
        add_rows(resized, pitch, height, first_y[y] + k, weights_y + y * rows.taps + k, length, k > 0, sum);
      for (int64_t x = 0; x < length; x++) out[x] = (uint8_t)(clamped(sum[x], 0, 255) + 0.5f);
    }
  }
  free(scratch);
  return 0;
}

/* The integers of a JSON array that stand outside its strings, and nulls as -1; `text` begins after the array's '['.
   Returns how many there are, or -1: more than `most`, no end, or something that is neither integer, null, string, object nor array. */
int64_t tidali_integers(const char *text, int64_t length, int64_t *out, int64_t most) {
  int64_t count = 0, depth = 0;
  for (int64_t i = 0; i < length; i++) {
    char c = text[i];
    if (c == '"') {
      for (i++; i < length && text[i] != '"'; i++) i += text[i] == '\\';
    } else if (c >= '0' && c <= '9') {
      int64_t value = 0;
      for (; i < length && text[i] >= '0' && text[i] <= '9'; i++) value = 10 * value + (text[i] - '0');
      if (count == most) return -1;
      out[count++] = value, i--;
    } else if (c == 'n') {
      if (count == most || length - i < 4 || memcmp(text + i, "null", 4)) return -1;
      out[count++] = -1, i += 3;
    } else if (c == '{' || c == '[') {
      depth++;
    } else if (c == '}' || c == ']') {
      if (depth-- == 0) return count;
    } else if (c != ':' && c != ',' && c != ' ' && c != '\n') {
      return -1;
    }
  }
  return -1;
}

/* Tell the kernel that `count` pieces of mapped files are read next; `addresses` are multiples of a page. */
void tidali_expect(const uint64_t *addresses, const uint64_t *lengths, int64_t count) {
  for (int64_t i = 0; i < count; i++) madvise((void *)(uintptr_t)addresses[i], lengths[i], MADV_WILLNEED);
}
