// Tile registers (AMX): 8 of 16 rows by 64 bytes, whose sizes a thread sets before it uses them. Included by isa.cpp.
#pragma once
#include "vec.h"

namespace {

#if defined(__AMX_BF16__)

constexpr int kStepUnits = 16;  // what one instruction multiplies: 16 units of each row and column
constexpr int kMostTileRows = 32;

thread_local int configured_rows = 0;  // 0: the registers have no sizes, or those of somebody else

// Sums of up to 32 rows in tiles 0 to 3, rows in 4 and 5, columns in 6 and 7. Of up to 16 rows, tile 0 to 3 have sums
// of a group of columns each; of more, 0 and 1 those of the first 16 rows, 2 and 3 those of the others.
INLINE void configure_tiles(int num_rows) {
  if (configured_rows == num_rows) return;
  configured_rows = num_rows;
  struct alignas(64) {
    uint8_t palette, first_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } sizes = {};
  sizes.palette = 1;
  const uint8_t first = static_cast<uint8_t>(min64(num_rows, 16));
  const uint8_t second = num_rows > 16 ? static_cast<uint8_t>(num_rows - 16) : first;
  const uint8_t rows[8] = {first, first, second, second, first, second, 16, 16};
  for (int i = 0; i < 8; i++) sizes.rows[i] = rows[i], sizes.row_bytes[i] = 64;
  __asm__ volatile("" ::: "memory");
  _tile_loadconfig(&sizes);
}

// A thread's work on a call's items. Others, such as torch, give the registers other sizes in between; and registers
// that are given up need not be saved when threads change places.
struct TileRegisters {
  TileRegisters() { configured_rows = 0; }
  ~TileRegisters() {
    if (configured_rows) _tile_release();
  }
};

#else

struct TileRegisters {
  ~TileRegisters() {}  // a type with a destructor: variables of it do not count as unused
};

#endif

}  // namespace
