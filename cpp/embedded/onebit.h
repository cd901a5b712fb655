/* SPDX-License-Identifier: Apache-2.0 */
/* Reads a .1bit file and runs it: C99, no dependency but the mathematics library, no allocation.
 *
 * The file, described byte by byte in docs/reference/onebit.md, stays where it is (flash, a C
 * array, a mapped file); all memory that changes lies in one block that the caller provides. */
#ifndef TERNARYFORGE_EMBEDDED_ONEBIT_H_
#define TERNARYFORGE_EMBEDDED_ONEBIT_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* How the numbers of a tensor are stored. */
enum {
  ONEBIT_F32 = 0,
  ONEBIT_F16 = 1,
  ONEBIT_INT8 = 2,
  ONEBIT_TERNARY = 3, /* four in a byte: 00 = 0, 01 = +1, 11 = -1 */
  ONEBIT_BINARY = 4   /* eight in a byte: 0 = -1, 1 = +1 */
};

/* One tensor inside the file. A weight is its code times the scale of its tensor, row or group. */
typedef struct {
  uint32_t mode;
  uint32_t rows, cols;
  uint32_t group_size;     /* columns that share a scale; 0: none, or one scale for many rows */
  uint32_t scales_per_row; /* 0: one scale for the tensor, or none */
  const uint8_t* data;
  const uint8_t* scales; /* float32, little-endian, any alignment; null: none */
} OnebitTensor;

enum { ONEBIT_SILU = 0, ONEBIT_RELU2 = 1, ONEBIT_GELU = 2, ONEBIT_RELU = 3 };

/* What differs from layer to layer. */
typedef struct {
  uint32_t heads, kv_heads, head_dim, ffn_size, window, pairs, activation, flags;
  float rotation_scale, attention_scale, attention_soft_cap, residual_scale;
  const uint8_t* rotation; /* float32 [pairs] */
  const uint8_t* tensors;  /* this layer's part of the tensor table */
} OnebitLayer;

/* A file that was looked through. */
typedef struct {
  const uint8_t* bytes;
  size_t size;
  uint32_t vocab_size, hidden_size, layer_count, context_length, flags;
  float norm_epsilon, embedding_scale, logit_soft_cap;
  uint32_t largest_query, largest_kv, largest_ffn; /* over the layers */
  OnebitTensor embedding, position_embedding, final_norm, head;
} OnebitModel;

/* One sequence: its keys and values, and the work space. */
typedef struct {
  const OnebitModel* model;
  uint32_t context; /* most tokens */
  uint32_t length;  /* tokens so far */
  float *hidden, *input, *query, *key, *value, *gate, *up, *delta, *angles, *scores, *cache;
  int8_t* codes;
} OnebitState;

/* Looks through `size` bytes that must outlive the model, at any alignment. Returns null, or what
 * is wrong with the file. Afterwards no call reads outside of it, whatever it holds. */
const char* onebit_open(const uint8_t* bytes, size_t size, OnebitModel* model);

/* Bytes of changing memory that a sequence of at most `context` tokens needs; 0 when `context` is 0
 * or beyond the model's, or when the size does not fit a size_t. */
size_t onebit_state_bytes(const OnebitModel* model, uint32_t context);

/* Begins a sequence in `memory`, aligned to 4 bytes and as large as onebit_state_bytes says. */
void onebit_begin(const OnebitModel* model, uint32_t context, void* memory, OnebitState* state);

/* Runs one more token. With `logits`, [vocab_size], writes what it predicts. Returns null, or why
 * nothing was done: an unknown token, or a full context. */
const char* onebit_forward(OnebitState* state, uint32_t token, float* logits);

/* The likeliest token, the first one of equals. */
uint32_t onebit_argmax(const float* logits, uint32_t vocab_size);

/* ---- Text ---- */

/* The tokenizer of a file. */
typedef struct {
  uint32_t kind;
  uint32_t bos_id, flags, end_count, token_count, sorted_count, merge_count;
  const uint8_t *ends, *offsets, *sorted, *byte_ids, *types, *merges, *text;
} OnebitTokenizer;

enum { ONEBIT_NO_TEXT = 0, ONEBIT_BYTE_LEVEL = 1, ONEBIT_SENTENCEPIECE = 2 };
#define ONEBIT_NO_TOKEN 0xFFFFFFFFu

/* Finds the tokenizer of an opened file. Returns null, or what is wrong with it. */
const char* onebit_open_tokenizer(const OnebitModel* model, OnebitTokenizer* tokenizer);

/* Turns UTF-8 text into at most `capacity` token ids, the one that starts every text included, and
 * stores their number. Returns null, or why not: too long, or (byte-level tokenizers) not ASCII,
 * because the splitting of words would need the tables of Unicode. */
const char* onebit_encode(const OnebitTokenizer* tokenizer, const char* text, uint32_t* ids,
                          size_t capacity, size_t* count);

/* The bytes that a token stands for, inside the file, and their number; none for special tokens. */
const uint8_t* onebit_token_bytes(const OnebitTokenizer* tokenizer, uint32_t token, size_t* size);

/* Whether a token ends a text. */
int onebit_is_end(const OnebitTokenizer* tokenizer, uint32_t token);

/* How many spaces in front of a whole text are the tokenizer's own, and are not shown. */
size_t onebit_leading_spaces(const OnebitTokenizer* tokenizer);

#ifdef __cplusplus
}
#endif

#endif /* TERNARYFORGE_EMBEDDED_ONEBIT_H_ */
