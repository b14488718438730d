/* One pass from uint8 pixels to normalised images: what tidali/loading/resample.py does as matrix products, for CPUs; and boxes
   of images of any size to uint8 squares. Compiled at first use by tidali/loading/native.py. GCC and Clang: vector types. */

#include <math.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef float pixel __attribute__((vector_size(16)));             /* R, G, B and nothing */
typedef float pair __attribute__((vector_size(32), aligned(16))); /* a pixel of one row and one of the next */
typedef int32_t integers __attribute__((vector_size(16)));
typedef uint8_t bytes __attribute__((vector_size(16)));

/* An axis's matrix: each output row or column is a weighted sum of `taps` source ones, from `first` on. */
struct axis {
  const int32_t *first; /* [samples][res], or [1][res] where shared; -taps..size */
  const float *weights; /* [samples][res][taps], or [1][res][taps] */
  int64_t taps;         /* a multiple of 2 */
  int64_t shared;
};

struct shape {
  int64_t height, width, res;
};

/* Images of one size: image n is number samples[n] of the pixels, flipped horizontally where flips[n]. NULL: number n; none. */
struct images {
  const uint8_t *pixels; /* [][height][width][3] */
  const int64_t *samples;
  const uint8_t *flips;
};

/* An affine map of colours, y = red * R + green * G + blue * B + offset: normalisation, and colour augmentation with it. */
struct colour {
  pixel red, green, blue, offset;
  enum map { NONE, DIAGONAL, MIXING } map; /* the identity; no channel depends on another; any other */
};

/* [samples][res][res][3] float or bfloat16 values, each clamped; `lowest`, `highest`: of each element of a row. */
struct output {
  void *values;
  const float *lowest, *highest;
  int64_t bfloat16;
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

static void store_row(const float *values, int64_t row, int64_t length, struct output o) {
  if (o.bfloat16) {
    uint16_t *restrict out = (uint16_t *)o.values + row * length;
    for (int64_t x = 0; x < length; x++) out[x] = to_bfloat16(clamped(values[x], o.lowest[x], o.highest[x]));
  } else {
    float *restrict out = (float *)o.values + row * length;
    for (int64_t x = 0; x < length; x++) out[x] = clamped(values[x], o.lowest[x], o.highest[x]);
  }
}

/* `colours`: [samples][4][4], or [1][4][4] where shared: the columns of a 3 x 4 matrix, each with a fourth element of 0. */
static struct colour colour_of(const float *colours, int64_t shared, int64_t sample) {
  struct colour c;
  memcpy(&c, colours + (shared ? 0 : 16 * sample), 4 * sizeof c.red);
  c.map = c.red[1] || c.red[2] || c.green[0] || c.green[2] || c.blue[0] || c.blue[1] ? MIXING : DIAGONAL;
  return c;
}

#ifdef __clang__
#define SHUFFLED(b, ...) __builtin_shufflevector(b, (bytes){0}, __VA_ARGS__)
#else
#define SHUFFLED(b, ...) __builtin_shuffle(b, (bytes){0}, (bytes){__VA_ARGS__})
#endif

/* Four bytes from number `i` on. A shuffle spreads them: GCC 12 converts bytes to integers one by one. */
#define FOUR(b, i) SHUFFLED(b, i, 16, 16, 16, i + 1, 16, 16, 16, i + 2, 16, 16, 16, i + 3, 16, 16, 16)
#define FOUR_FLOATS(b, i) __builtin_convertvector((integers)FOUR(b, i), pixel)

/* Pixel `number` of four, and any fourth element. */
static inline pixel pixel_of(bytes b, int number) {
  return number == 0 ? FOUR_FLOATS(b, 0) : number == 1 ? FOUR_FLOATS(b, 3) : number == 2 ? FOUR_FLOATS(b, 6) : FOUR_FLOATS(b, 9);
}

static inline void store_pixel(pixel p, const struct colour *c, enum map map, float *out) {
  if (map == DIAGONAL)
    p = p * (c->red + c->green + c->blue) + c->offset;
  else if (map == MIXING)
    p = c->red * p[0] + (c->green * p[1] + (c->blue * p[2] + c->offset));
  memcpy(out, &p, sizeof p);
}

/* The pixels of a row from its last one to its first, five at a time. */
static void flip_row(const uint8_t *source, int64_t width, uint8_t *flipped) {
  int64_t x = 0;
  for (; x < width - 5; x += 5) {
    bytes b;
    memcpy(&b, source + 3 * (width - 5 - x) - 1, 16);
    b = SHUFFLED(b, 13, 14, 15, 10, 11, 12, 7, 8, 9, 4, 5, 6, 1, 2, 3, 0);
    memcpy(flipped + 3 * x, &b, 16);
  }
  for (; x < width; x++) memcpy(flipped + 3 * x, source + 3 * (width - 1 - x), 3);
}

/* One row with its colours mapped. Pixels are `step` floats apart; where that is 3, the next pixel overwrites the fourth float.
   Four at a time where 16 bytes can be read of them. */
static inline void load_row_as(const uint8_t *source, int64_t width, const struct colour *c, enum map map, int64_t step, float *row) {
  int64_t x = 0;
  bytes b = {0};
  for (; x <= width - 6; x += 4) {
    memcpy(&b, source + 3 * x, 16);
    for (int k = 0; k < 4; k++) store_pixel(pixel_of(b, k), c, map, row + step * (x + k));
  }
  for (; x < width; x++) {
    memcpy(&b, source + 3 * x, 3);
    store_pixel(pixel_of(b, 0), c, map, row + step * x);
  }
}

static void load_row(const uint8_t *source, int64_t width, const struct colour *c, int64_t step, float *row) {
  if (c->map == NONE)
    load_row_as(source, width, c, NONE, step, row);
  else if (c->map == MIXING)
    load_row_as(source, width, c, MIXING, step, row);
  else
    load_row_as(source, width, c, DIAGONAL, step, row);
}

static inline const uint8_t *image_of(struct images i, int64_t n, int64_t bytes) {
  return i.pixels + (i.samples ? i.samples[n] : n) * bytes;
}

/* What the twelve elements of four pixels are times, plus and clamped to, where no channel depends on another. */
struct scaling {
  pixel scale[3], offset[3], lowest[3], highest[3];
};

static struct scaling scaling_of(const struct colour *c, struct output o) {
  struct scaling s;
  pixel scale = c->red + c->green + c->blue;
  for (int k = 0; k < 12; k++) {
    s.scale[k / 4][k % 4] = scale[k % 3], s.offset[k / 4][k % 4] = c->offset[k % 3];
    s.lowest[k / 4][k % 4] = o.lowest[k % 3], s.highest[k / 4][k % 4] = o.highest[k % 3];
  }
  return s;
}

static inline void scale_four(pixel p, const struct scaling *s, int k, float *out) {
  p = p * s->scale[k] + s->offset[k];
  for (int j = 0; j < 4; j++) out[j] = clamped(p[j], s->lowest[k][j], s->highest[k][j]);
}

static inline void scale_twelve(const uint8_t *source, const struct scaling *s, float *out) {
  bytes b;
  memcpy(&b, source, 16);
  scale_four(FOUR_FLOATS(b, 0), s, 0, out);
  scale_four(FOUR_FLOATS(b, 4), s, 1, out + 4);
  scale_four(FOUR_FLOATS(b, 8), s, 2, out + 8);
}

static void scale_row(const uint8_t *source, int64_t length, const struct scaling *s, float *out) {
  for (; length >= 16; source += 12, out += 12, length -= 12) scale_twelve(source, s, out);
  for (; length > 0; source += 12, out += 12, length -= 12) { /* here 16 bytes may be more than there are */
    uint8_t rest[16] = {0};
    float scaled[12];
    int64_t count = length < 12 ? length : 12;
    memcpy(rest, source, count);
    scale_twelve(rest, s, scaled);
    memcpy(out, scaled, count * sizeof *out);
  }
}

/* Images begin..end - 1, res x res, with their colours mapped. `scratch`: 4 * res + 1 floats. */
void tidali_colour(struct images i, int64_t begin, int64_t end, int64_t res, const float *colours, int64_t one_colour,
                   float *scratch, struct output o) {
  int64_t length = 3 * res;
  uint8_t *flipped = (uint8_t *)(scratch + length + 1); /* past the last pixel's fourth float */
  for (int64_t n = begin; n < end; n++) {
    const uint8_t *source = image_of(i, n, length * res);
    int flip = i.flips && i.flips[n];
    struct colour c = colour_of(colours, one_colour, n);
    struct scaling s = scaling_of(&c, o);
    for (int64_t row = n * res; row < (n + 1) * res; row++, source += length) {
      if (flip) flip_row(source, res, flipped);
      const uint8_t *pixels = flip ? flipped : source;
      float *out = o.bfloat16 || c.map == MIXING ? scratch : (float *)o.values + row * length;
      if (c.map == MIXING)
        load_row(pixels, res, &c, 3, out);
      else
        scale_row(pixels, length, &s, out);
      if (out == scratch) store_row(out, row, length, o);
    }
  }
}

/* What resizes one image. Of the rows resized along x only the last taps + 2 are held, which stay in the nearest cache. */
struct resizer {
  const uint8_t *pixels; /* the first row's first pixel that is read */
  int64_t pixel_pitch, height, width, res;
  struct axis vertical, horizontal;
  struct colour colour;
  int flip;
  int64_t done;      /* rows resized along x */
  pair *line;        /* two rows of pixels, with `taps` more on both sides that repeat their borders */
  float *rows, *sum; /* row y stands at y % (taps + 2) */
  uint8_t *flipped;  /* a row of pixels */
};

static inline int64_t pitch_of(int64_t res) { return 3 * res + 8; } /* past the last pixel's fourth float */

static size_t scratch_floats(int64_t width, int64_t res, int64_t vertical_taps, int64_t horizontal_taps) {
  return 8 * (width + 2 * horizontal_taps) + (vertical_taps + 3) * pitch_of(res) + width;
}

static void place_scratch(struct resizer *r, float *scratch) {
  r->line = (pair *)scratch;
  r->rows = (float *)(r->line + r->width + 2 * r->horizontal.taps);
  r->sum = r->rows + (r->vertical.taps + 2) * pitch_of(r->res);
  r->flipped = (uint8_t *)(r->sum + pitch_of(r->res));
}

static inline float *row_of(const struct resizer *r, int64_t y) {
  return r->rows + inside(y, r->height) % (r->vertical.taps + 2) * pitch_of(r->res);
}

/* The next two rows along x: (width,) pixels -> (res, 3) floats. A pixel is stored as four; the next one overwrites the fourth. */
static void resize_two_rows(struct resizer *r) {
  int64_t taps = r->horizontal.taps, width = r->width;
  for (int64_t k = 0; k < 2; k++) {
    pixel *line = (pixel *)r->line + k;
    const uint8_t *row = r->pixels + inside(r->done + k, r->height) * r->pixel_pitch;
    if (r->flip) flip_row(row, width, r->flipped), row = r->flipped;
    load_row(row, width, &r->colour, 8, (float *)(line + 2 * taps));
    for (int64_t x = 0; x < taps; x++) {
      line[2 * x] = line[2 * taps];
      line[2 * (taps + width + x)] = line[2 * (taps + width - 1)];
    }
  }
  /* The number of slots is even, so the second row's slot is the next one. */
  float *first = r->rows + r->done % (r->vertical.taps + 2) * pitch_of(r->res), *second = first + pitch_of(r->res);
  for (int64_t x = 0; x < r->res; x++) {
    const pair *p = r->line + taps + r->horizontal.first[x];
    const float *w = r->horizontal.weights + x * taps;
    pair even = p[0] * w[0], odd = p[1] * w[1]; /* two sums, which do not wait for each other */
    for (int64_t k = 2; k < taps; k += 2) even += p[k] * w[k], odd += p[k + 1] * w[k + 1];
    even += odd;
    memcpy(first + 3 * x, &even, sizeof(pixel));
    memcpy(second + 3 * x, (const char *)&even + sizeof(pixel), sizeof(pixel));
  }
  r->done += 2;
}

/* sum, or sum + where `more`, the weighted sum of `count` rows from `first` on, 2 or 4. */
static inline void add_rows(const struct resizer *r, int64_t first, const float *weights, int count, int more) {
  const float *r0 = row_of(r, first), *r1 = row_of(r, first + 1), *r2 = row_of(r, first + 2), *r3 = row_of(r, first + 3);
  float w0 = weights[0], w1 = weights[1], w2 = count > 2 ? weights[2] : 0, w3 = count > 2 ? weights[3] : 0;
  float *restrict sum = r->sum;
  int64_t length = 3 * r->res;
  if (count == 2)
    for (int64_t x = 0; x < length; x++) sum[x] = r0[x] * w0 + r1[x] * w1;
  else if (more)
    for (int64_t x = 0; x < length; x++) sum[x] += r0[x] * w0 + r1[x] * w1 + r2[x] * w2 + r3[x] * w3;
  else
    for (int64_t x = 0; x < length; x++) sum[x] = r0[x] * w0 + r1[x] * w1 + r2[x] * w2 + r3[x] * w3;
}

/* Output row y, (res, 3) floats, in `sum`. Rows have to be asked for in order. */
static void resize_row(struct resizer *r, int64_t y) {
  int64_t taps = r->vertical.taps, first = r->vertical.first[y], k = taps % 4;
  const float *weights = r->vertical.weights + y * taps;
  while (r->done <= inside(first + taps - 1, r->height)) resize_two_rows(r);
  if (k) add_rows(r, first, weights, 2, 0);
  for (int more = k > 0; k < taps; k += 4, more = 1) add_rows(r, first + k, weights + k, 4, more);
}

static struct axis of_sample(struct axis a, int64_t sample, int64_t res) {
  if (!a.shared) a.first += sample * res, a.weights += sample * res * a.taps;
  return a;
}

int64_t tidali_scratch(struct shape s, int64_t vertical_taps, int64_t horizontal_taps) {
  return scratch_floats(s.width, s.res, vertical_taps, horizontal_taps);
}

/* Images begin..end - 1 to res x res, with their colours mapped. `scratch`: tidali_scratch floats, 16-byte aligned. */
void tidali_resample(struct images i, int64_t begin, int64_t end, struct shape s, struct axis vertical, struct axis horizontal,
                     const float *colours, int64_t one_colour, float *scratch, struct output o) {
  for (int64_t n = begin; n < end; n++) {
    struct resizer r = {image_of(i, n, 3 * s.height * s.width), 3 * s.width, s.height, s.width, s.res};
    r.vertical = of_sample(vertical, n, s.res), r.horizontal = of_sample(horizontal, n, s.res);
    r.colour = colour_of(colours, one_colour, n), r.flip = i.flips && i.flips[n];
    place_scratch(&r, scratch);
    for (int64_t y = 0; y < s.res; y++) {
      resize_row(&r, y);
      store_row(r.sum, n * s.res + y, 3 * s.res, o);
    }
  }
}

/* A box of an image: what becomes one square. The box is in the image's pixels, and pixels outside it count at its edges. */
struct piece {
  const uint8_t *pixels; /* [height][width][3] */
  int64_t height, width;
  float top, left, box_height, box_width;
};

/* Keys' cubic with its constant a free, as tidali/loading/bicubic.py has it. */
static float cubic(float x, float a) {
  x = fabsf(x);
  if (x <= 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? a * (((x - 5) * x + 8) * x - 4) : 0;
}

static int64_t taps_of(float scale) { return 2 * (int64_t)ceilf(2 * fmaxf(scale, 1)); }

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
  int64_t length = 3 * res;
  float *scratch = NULL;
  size_t held = 0;
  for (int64_t n = begin; n < end; n++) {
    struct piece p = pieces[n];
    float scale_y = p.box_height / res, scale_x = p.box_width / res;
    struct resizer r = {NULL, 3 * p.width, p.height, p.width, res};
    r.vertical.taps = taps_of(scale_y), r.horizontal.taps = taps_of(scale_x);
    r.colour.map = NONE;
    size_t floats = scratch_floats(p.width, res, r.vertical.taps, r.horizontal.taps);
    size_t needed = (floats + res * (2 + r.vertical.taps + r.horizontal.taps)) * sizeof(float);
    if (needed > held) {
      free(scratch);
      scratch = malloc(held = needed); /* aligned to 16 bytes */
      if (scratch == NULL) return 1;
    }
    float *weights_y = scratch + floats, *weights_x = weights_y + res * r.vertical.taps;
    int32_t *first_y = (int32_t *)(weights_x + res * r.horizontal.taps), *first_x = first_y + res;
    make_taps(res, p.top, scale_y, a, r.vertical.taps, first_y, weights_y);
    make_taps(res, p.left, scale_x, a, r.horizontal.taps, first_x, weights_x);
    int64_t top = narrow(res, r.vertical.taps, p.height, first_y, &r.height);
    int64_t left = narrow(res, r.horizontal.taps, p.width, first_x, &r.width);
    r.pixels = p.pixels + top * r.pixel_pitch + 3 * left;
    r.vertical.first = first_y, r.vertical.weights = weights_y;
    r.horizontal.first = first_x, r.horizontal.weights = weights_x;
    place_scratch(&r, scratch);
    uint8_t *restrict out = squares + n * res * length;
    for (int64_t y = 0; y < res; y++, out += length) {
      resize_row(&r, y);
      for (int64_t x = 0; x < length; x++) out[x] = (uint8_t)(clamped(r.sum[x], 0, 255) + 0.5f);
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

static char *bus_error;

static void end_with_bus_error(int signal) {
  (void)signal;
  (void)!write(STDERR_FILENO, bus_error, strlen(bus_error));
  _exit(1);
}

/* Have the process end with a text and exit code 1 where it reads a mapped file beyond its end, which is a signal and no error. */
void tidali_explain_bus_error(const char *text) {
  struct sigaction action;
  if (bus_error != NULL || sigaction(SIGBUS, NULL, &action) || action.sa_handler != SIG_DFL) return;
  if ((bus_error = strdup(text)) == NULL) return;
  action.sa_handler = end_with_bus_error;
  sigaction(SIGBUS, &action, NULL);
}
