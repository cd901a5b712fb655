/* SPDX-License-Identifier: Apache-2.0 */
/* Byte pair encoding of text, and the bytes of tokens; the tables lie in the file, sorted. */
#include <string.h>

#include "onebit.h"
#include "onebit_bytes.h"

enum { HEADER_BYTES = 40, BYTE_IDS = 256, MERGE_BYTES = 16 };
enum { ADDS_SPACE = 1, TIDIES_SPACES = 2 };
enum { NORMAL = 0, SPECIAL = 1 };

static uint64_t padded(uint64_t size) { return (size + 3) / 4 * 4; }

const char* onebit_open_tokenizer(const OnebitModel* model, OnebitTokenizer* tokenizer) {
  const uint32_t offset = load_u32(model->bytes + 48);
  const uint8_t* base = model->bytes + offset;
  uint64_t size, needed, text_bytes;
  uint32_t i;
  memset(tokenizer, 0, sizeof(*tokenizer));
  if (offset > model->size || model->size - offset < HEADER_BYTES)
    return "the tokenizer is cut off";
  size = model->size - offset;
  tokenizer->kind = load_u32(base);
  tokenizer->bos_id = load_u32(base + 4);
  tokenizer->flags = load_u32(base + 8);
  tokenizer->end_count = load_u32(base + 16);
  tokenizer->token_count = load_u32(base + 20);
  tokenizer->sorted_count = load_u32(base + 24);
  tokenizer->merge_count = load_u32(base + 28);
  text_bytes = load_u32(base + 32);
  if (tokenizer->kind > ONEBIT_SENTENCEPIECE) {
    return "the tokenizer is of a kind that this reader does not know";
  }
  needed = HEADER_BYTES +
           4 * ((uint64_t)tokenizer->end_count + tokenizer->token_count + 1 +
                tokenizer->sorted_count + BYTE_IDS) +
           padded(tokenizer->token_count) + (uint64_t)MERGE_BYTES * tokenizer->merge_count +
           text_bytes;
  if (needed > size) return "the tokenizer is cut off";
  tokenizer->ends = base + HEADER_BYTES;
  tokenizer->offsets = tokenizer->ends + 4 * (size_t)tokenizer->end_count;
  tokenizer->sorted = tokenizer->offsets + 4 * ((size_t)tokenizer->token_count + 1);
  tokenizer->byte_ids = tokenizer->sorted + 4 * (size_t)tokenizer->sorted_count;
  tokenizer->types = tokenizer->byte_ids + 4 * (size_t)BYTE_IDS;
  tokenizer->merges = tokenizer->types + (size_t)padded(tokenizer->token_count);
  tokenizer->text = tokenizer->merges + MERGE_BYTES * (size_t)tokenizer->merge_count;
  for (i = 0; i < tokenizer->token_count; ++i) {
    if (load_u32(tokenizer->offsets + 4 * (size_t)i) >
        load_u32(tokenizer->offsets + 4 * (size_t)(i + 1))) {
      return "the tokens are not in order";
    }
  }
  if (load_u32(tokenizer->offsets + 4 * (size_t)i) > text_bytes) return "the tokens are cut off";
  for (i = 0; i < tokenizer->sorted_count; ++i) {
    if (load_u32(tokenizer->sorted + 4 * (size_t)i) >= tokenizer->token_count) {
      return "the sorted tokens name one that there is not";
    }
  }
  return NULL;
}

/* The bytes of a token, special or not. */
static const uint8_t* name_of(const OnebitTokenizer* tokenizer, uint32_t token, size_t* size) {
  const uint32_t begin = load_u32(tokenizer->offsets + 4 * (size_t)token);
  *size = load_u32(tokenizer->offsets + 4 * (size_t)(token + 1)) - begin;
  return tokenizer->text + begin;
}

const uint8_t* onebit_token_bytes(const OnebitTokenizer* tokenizer, uint32_t token, size_t* size) {
  *size = 0;
  if (token >= tokenizer->token_count || tokenizer->types[token] == SPECIAL) {
    return tokenizer->text;
  }
  return name_of(tokenizer, token, size);
}

int onebit_is_end(const OnebitTokenizer* tokenizer, uint32_t token) {
  uint32_t i;
  for (i = 0; i < tokenizer->end_count; ++i) {
    if (load_u32(tokenizer->ends + 4 * (size_t)i) == token) return 1;
  }
  return 0;
}

size_t onebit_leading_spaces(const OnebitTokenizer* tokenizer) {
  if (tokenizer->flags & TIDIES_SPACES) return SIZE_MAX;
  return tokenizer->flags & ADDS_SPACE ? 1 : 0;
}

/* The normal token that consists of these bytes. */
static uint32_t find_token(const OnebitTokenizer* tokenizer, const uint8_t* bytes, size_t size) {
  uint32_t low = 0, high = tokenizer->sorted_count;
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    const uint32_t token = load_u32(tokenizer->sorted + 4 * (size_t)middle);
    size_t length;
    const uint8_t* name = name_of(tokenizer, token, &length);
    int order = memcmp(bytes, name, size < length ? size : length);
    if (order == 0) order = size < length ? -1 : size > length;
    if (order == 0) return token;
    if (order < 0) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return ONEBIT_NO_TOKEN;
}

/* What two neighbours become, and how early; or ONEBIT_NO_TOKEN. */
static uint32_t find_merge(const OnebitTokenizer* tokenizer, uint32_t left, uint32_t right,
                           uint32_t* rank) {
  uint32_t low = 0, high = tokenizer->merge_count;
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    const uint8_t* merge = tokenizer->merges + MERGE_BYTES * (size_t)middle;
    const uint32_t first = load_u32(merge), second = load_u32(merge + 4);
    if (first == left && second == right) {
      *rank = load_u32(merge + 8);
      return load_u32(merge + 12);
    }
    if (left < first || (left == first && right < second)) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return ONEBIT_NO_TOKEN;
}

/* Joins the earliest pair, leftmost first, as long as there is one. Returns the new count. */
static size_t merge_all(const OnebitTokenizer* tokenizer, uint32_t* ids, size_t count) {
  for (;;) {
    uint32_t best_rank = 0xFFFFFFFFu, best_token = ONEBIT_NO_TOKEN;
    size_t best = 0, i;
    for (i = 0; i + 1 < count; ++i) {
      uint32_t rank = 0;
      const uint32_t token = find_merge(tokenizer, ids[i], ids[i + 1], &rank);
      if (token != ONEBIT_NO_TOKEN && rank < best_rank) {
        best_rank = rank;
        best_token = token;
        best = i;
      }
    }
    if (best_token == ONEBIT_NO_TOKEN) return count;
    ids[best] = best_token;
    --count;
    memmove(ids + best + 1, ids + best + 2, (count - best - 1) * sizeof(*ids));
  }
}

/* ---- Byte-level: words by the pattern of GPT-2, in ASCII ---- */

static int is_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }
static int is_digit(char c) { return c >= '0' && c <= '9'; }
static int is_letter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }

/* 0 letter, 1 digit, 2 anything else that is no space. */
static int kind_of(char c) { return is_letter(c) ? 0 : is_digit(c) ? 1 : 2; }

/* The length of the word that a text begins with. */
static size_t word_length(const char* text) {
  static const char* const endings[] = {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"};
  size_t i, end;
  for (i = 0; i < sizeof(endings) / sizeof(endings[0]); ++i) {
    const size_t length = strlen(endings[i]);
    if (strncmp(text, endings[i], length) == 0) return length;
  }
  i = text[0] == ' ' ? 1 : 0;
  if (text[i] != '\0' && !is_space(text[i])) {
    const int kind = kind_of(text[i]);
    for (end = i + 1; text[end] != '\0' && !is_space(text[end]) && kind_of(text[end]) == kind;) {
      ++end;
    }
    return end;
  }
  for (end = 0; is_space(text[end]);) ++end;
  /* The last space belongs to the word behind it. */
  return text[end] != '\0' && end > 1 ? end - 1 : end;
}

static const char* encode_bytes(const OnebitTokenizer* tokenizer, const char* text, uint32_t* ids,
                                size_t capacity, size_t* count) {
  size_t i;
  for (i = 0; text[i] != '\0'; ++i) {
    if ((unsigned char)text[i] >= 128) {
      return "only ASCII text can be split into words here; give token ids instead";
    }
  }
  while (*text != '\0') {
    const size_t length = word_length(text);
    if (length > capacity - *count) return "the text has too many tokens";
    for (i = 0; i < length; ++i) {
      const uint32_t id = load_u32(tokenizer->byte_ids + 4 * (size_t)(unsigned char)text[i]);
      if (id == ONEBIT_NO_TOKEN) return "the tokenizer has no token for a byte of the text";
      ids[*count + i] = id;
    }
    *count += merge_all(tokenizer, ids + *count, length);
    text += length;
  }
  return NULL;
}

/* ---- SentencePiece: characters, and bytes for those that are no token ---- */

/* Bytes of the character that a text begins with; 0 where it is not UTF-8. */
static size_t character_length(const uint8_t* text) {
  const size_t size = text[0] < 0x80   ? 1
                      : text[0] < 0xC2 ? 0
                      : text[0] < 0xE0 ? 2
                      : text[0] < 0xF0 ? 3
                      : text[0] < 0xF5 ? 4
                                       : 0;
  size_t i;
  for (i = 1; i < size; ++i) {
    if ((text[i] & 0xC0) != 0x80) return 0;
  }
  return size;
}

/* Bytes of the space, or of its mark U+2581, that a text begins with; 0: neither. */
static size_t blank_length(const uint8_t* text) {
  if (text[0] == ' ') return 1;
  return text[0] == 0xE2 && text[1] == 0x96 && text[2] == 0x81 ? 3 : 0;
}

static int only_blanks_follow(const uint8_t* text) {
  while (blank_length(text) > 0) text += blank_length(text);
  return *text == '\0';
}

/* Appends the token of a character, or those of its bytes. A blank is a space in the names of
 * tokens and its mark in bytes. */
static const char* append_character(const OnebitTokenizer* tokenizer, const uint8_t* character,
                                    size_t size, uint32_t* ids, size_t capacity, size_t* count) {
  const int is_blank = blank_length(character) > 0;
  const uint8_t* name = is_blank ? (const uint8_t*)" " : character;
  const uint8_t* spelled = is_blank ? (const uint8_t*)"\xE2\x96\x81" : character;
  const uint32_t whole = find_token(tokenizer, name, is_blank ? 1 : size);
  const size_t parts = whole != ONEBIT_NO_TOKEN ? 1 : is_blank ? 3 : size;
  size_t i;
  for (i = 0; i < parts; ++i) {
    uint32_t id = whole;
    if (id == ONEBIT_NO_TOKEN) id = load_u32(tokenizer->byte_ids + 4 * (size_t)spelled[i]);
    if (id == ONEBIT_NO_TOKEN) return "the tokenizer has no token for a character of the text";
    if (*count == capacity) return "the text has too many tokens";
    ids[(*count)++] = id;
  }
  return NULL;
}

static const char* encode_characters(const OnebitTokenizer* tokenizer, const char* text,
                                     uint32_t* ids, size_t capacity, size_t* count) {
  const int tidies = (tokenizer->flags & TIDIES_SPACES) != 0;
  const uint8_t* next = (const uint8_t*)text;
  const size_t first = *count;
  const char* problem = NULL;
  while (tidies && *next == ' ') ++next;
  if (*next == '\0' || (tidies && only_blanks_follow(next))) return NULL;
  if (tokenizer->flags & ADDS_SPACE) {
    problem = append_character(tokenizer, (const uint8_t*)" ", 1, ids, capacity, count);
  }
  while (problem == NULL && *next != '\0' && !(tidies && only_blanks_follow(next))) {
    const size_t size = character_length(next);
    if (size == 0) return "the text is not UTF-8";
    if (!(tidies && next[0] == ' ' && next[1] == ' ')) {
      problem = append_character(tokenizer, next, size, ids, capacity, count);
    }
    next += size;
  }
  if (problem == NULL) *count = first + merge_all(tokenizer, ids + first, *count - first);
  return problem;
}

const char* onebit_encode(const OnebitTokenizer* tokenizer, const char* text, uint32_t* ids,
                          size_t capacity, size_t* count) {
  *count = 0;
  if (tokenizer->kind == ONEBIT_NO_TEXT) return "the file has no tokenizer; give token ids instead";
  if (tokenizer->bos_id != ONEBIT_NO_TOKEN) {
    if (capacity == 0) return "the text has too many tokens";
    ids[(*count)++] = tokenizer->bos_id;
  }
  return tokenizer->kind == ONEBIT_BYTE_LEVEL
             ? encode_bytes(tokenizer, text, ids, capacity, count)
             : encode_characters(tokenizer, text, ids, capacity, count);
}
