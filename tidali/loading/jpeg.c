/* JPEGs of one size to RGB, one after the other by one decompressor. The functions are those of a libjpeg-turbo that this process
   has loaded (tidali/loading/libjpeg.py); its headers need not be installed. Compiled at first use by tidali/loading/native.py. */

#include <setjmp.h>
#include <stdint.h>
#include <string.h>

/* What is used here of libjpeg's structures, where they stand in version 6.2 of its binary interface on a 64-bit machine.
   jpeg_CreateDecompress compares the version and the size with its own. */
struct errors {
  void (*exit)(void *);
  void (*message)(void *, int); /* of a warning where the level is negative */
  char between[112];
  long warnings;
  char rest[32];
};

struct decompressor {
  struct errors *errors;
  char others[40];
  uint32_t width, height; /* from the header */
  int32_t components, stored_colours, colours;
  char options[100];
  uint32_t row; /* the next one that is read */
  char rest[460];
};

enum { VERSION = 62, RGB = 2, ROWS = 16 };

struct functions {
  void *(*std_error)(struct errors *);
  void (*create)(struct decompressor *, int, size_t);
  void (*read_from)(struct decompressor *, const uint8_t *, unsigned long);
  int (*read_header)(struct decompressor *, int);
  int (*start)(struct decompressor *);
  uint32_t (*read_rows)(struct decompressor *, uint8_t **, uint32_t);
  int (*finish)(struct decompressor *);
  void (*abort)(struct decompressor *);
  void (*destroy)(struct decompressor *);
};

/* CRC-32 as zip, gzip and zlib have it, of eight bytes at a time: table[k] is of a byte that k others follow. Little-endian. */
static uint32_t table[8][256];

__attribute__((constructor)) static void make_table(void) {
  for (uint32_t n = 0; n < 256; n++) {
    table[0][n] = n;
    for (int bit = 0; bit < 8; bit++) table[0][n] = (table[0][n] & 1 ? 0xEDB88320 : 0) ^ table[0][n] >> 1;
  }
  for (int k = 1; k < 8; k++)
    for (int n = 0; n < 256; n++) table[k][n] = table[0][table[k - 1][n] & 255] ^ table[k - 1][n] >> 8;
}

static uint32_t crc32_of(const uint8_t *data, uint64_t size) {
  uint32_t crc = ~0u;
  for (; size >= 8; data += 8, size -= 8) {
    uint64_t next;
    memcpy(&next, data, 8);
    next ^= crc, crc = 0;
    for (int k = 0; k < 8; k++) crc ^= table[7 - k][next >> 8 * k & 255];
  }
  for (; size; data++, size--) crc = table[0][(crc ^ *data) & 255] ^ crc >> 8;
  return ~crc;
}

struct jumping {
  struct errors errors;
  jmp_buf to;
};

static void jump(void *decompressor) { longjmp(((struct jumping *)((struct decompressor *)decompressor)->errors)->to, 1); }

static void count(void *decompressor, int level) {
  if (level < 0) ((struct decompressor *)decompressor)->errors->warnings++;
}

/* Whether `out`, [height][width][3], has the image now: without a warning, in grey or three colours. */
static int decode(const struct functions *f, struct decompressor *d, struct jumping *errors, const uint8_t *jpeg, uint32_t size,
                  uint32_t height, uint32_t width, uint8_t *out) {
  if (setjmp(errors->to)) {
    f->abort(d);
    return 0;
  }
  errors->errors.warnings = 0;
  f->read_from(d, jpeg, size);
  f->read_header(d, 1);
  if (d->height != height || d->width != width || d->components > 3) {
    f->abort(d);
    return 0;
  }
  d->colours = RGB;
  f->start(d);
  while (d->row < height) {
    uint8_t *rows[ROWS];
    uint32_t most = height - d->row < ROWS ? height - d->row : ROWS;
    for (uint32_t k = 0; k < most; k++) rows[k] = out + (size_t)(d->row + k) * width * 3;
    f->read_rows(d, rows, most);
  }
  f->finish(d);
  return errors->errors.warnings == 0;
}

/* JPEGs at `addresses` to `out`, [images][height][width][3]; `done` says which: those with their CRC-32, of that size and without a
   fault. Returns 0, or 1: libjpeg has another interface. */
int tidali_jpegs(const struct functions *f, const uint64_t *addresses, const uint64_t *sizes, const uint32_t *crc32s,
                 int64_t images, int64_t height, int64_t width, uint8_t *out, uint8_t *done) {
  struct decompressor d = {0};
  struct jumping errors;
  f->std_error(&errors.errors);
  errors.errors.exit = jump, errors.errors.message = count;
  d.errors = &errors.errors;
  if (setjmp(errors.to)) return 1;
  f->create(&d, VERSION, sizeof d);
  for (int64_t n = 0; n < images; n++) {
    const uint8_t *jpeg = (const uint8_t *)(uintptr_t)addresses[n];
    done[n] = crc32_of(jpeg, sizes[n]) == crc32s[n] &&
              decode(f, &d, &errors, jpeg, sizes[n], height, width, out + n * height * width * 3);
  }
  f->destroy(&d);
  return 0;
}
