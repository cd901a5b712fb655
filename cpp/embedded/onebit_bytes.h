/* SPDX-License-Identifier: Apache-2.0 */
/* Little-endian numbers at any address, a checksum, and powers of two. */
#ifndef TERNARYFORGE_EMBEDDED_ONEBIT_BYTES_H_
#define TERNARYFORGE_EMBEDDED_ONEBIT_BYTES_H_

#include <stddef.h>
#include <stdint.h>
#include <string.h>

static inline uint32_t load_u32(const uint8_t* bytes) {
  return (uint32_t)bytes[0] | (uint32_t)bytes[1] << 8 | (uint32_t)bytes[2] << 16 |
         (uint32_t)bytes[3] << 24;
}

static inline float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

static inline float load_f32(const uint8_t* bytes) { return float_of_bits(load_u32(bytes)); }

/* 2^n for -126 <= n <= 127. */
static inline float power_of_two(int32_t n) { return float_of_bits((uint32_t)(n + 127) << 23); }

/* CRC-32 of zlib and PNG (polynomial 0xEDB88320), four bits at a time. */
static inline uint32_t crc32(const uint8_t* bytes, size_t size) {
  static const uint32_t table[16] = {0x00000000, 0x1DB71064, 0x3B6E20C8, 0x26D930AC,
                                     0x76DC4190, 0x6B6B51F4, 0x4DB26158, 0x5005713C,
                                     0xEDB88320, 0xF00F9344, 0xD6D6A3E8, 0xCB61B38C,
                                     0x9B64C2B0, 0x86D3D2D4, 0xA00AE278, 0xBDBDF21C};
  uint32_t crc = 0xFFFFFFFFu;
  size_t i;
  for (i = 0; i < size; ++i) {
    crc = crc >> 4 ^ table[(crc ^ bytes[i]) & 15];
    crc = crc >> 4 ^ table[(crc ^ (uint32_t)bytes[i] >> 4) & 15];
  }
  return ~crc;
}

#endif /* TERNARYFORGE_EMBEDDED_ONEBIT_BYTES_H_ */
