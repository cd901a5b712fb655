/* SPDX-License-Identifier: Apache-2.0 */
/* Continues a text with a .1bit file, greedily, and says how much memory that took. With
 * ONEBIT_HEADER defined as the name of an emitted C header, the model is part of the program. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "onebit.h"

#ifdef ONEBIT_HEADER
#include ONEBIT_HEADER
#endif

static int fail(const char* where, const char* why) {
  fprintf(stderr, "onebit: %s: %s\n", where, why);
  return 1;
}

#ifndef ONEBIT_HEADER
static uint8_t* read_file(const char* path, size_t* size) {
  FILE* file = fopen(path, "rb");
  uint8_t* bytes = NULL;
  long length = -1;
  if (file == NULL) return NULL;
  if (fseek(file, 0, SEEK_END) == 0) length = ftell(file);
  if (length > 0 && fseek(file, 0, SEEK_SET) == 0) bytes = malloc((size_t)length);
  *size = (size_t)length;
  if (bytes != NULL && fread(bytes, 1, *size, file) != *size) {
    free(bytes);
    bytes = NULL;
  }
  fclose(file);
  return bytes;
}
#endif

/* Reads a whole number. Returns whether it is one. */
static int parse_number(const char* text, uint32_t* number) {
  char* end;
  unsigned long value;
  errno = 0;
  value = strtoul(text, &end, 10);
  *number = (uint32_t)value;
  return end != text && *end == '\0' && errno == 0 && value <= 0xFFFFFFFFul && *text != '-';
}

/* Reads "1,2,3". Returns null or what is wrong. */
static const char* parse_ids(const char* text, uint32_t* ids, size_t capacity, size_t* count) {
  *count = 0;
  for (;;) {
    char* end;
    unsigned long id;
    errno = 0;
    id = strtoul(text, &end, 10);
    if (end == text || errno != 0 || id > 0xFFFFFFFFul) return "token ids are written as 1,2,3";
    if (*count == capacity) return "there are more token ids than the context holds";
    ids[(*count)++] = (uint32_t)id;
    if (*end == '\0') return NULL;
    if (*end != ',') return "token ids are written as 1,2,3";
    text = end + 1;
  }
}

/* Prints what a token stands for, without the `spaces` in front of the text that are left. */
static void print_token(const OnebitTokenizer* tokenizer, uint32_t token, size_t* spaces) {
  size_t size, skip = 0;
  const uint8_t* bytes = onebit_token_bytes(tokenizer, token, &size);
  for (; *spaces > 0 && skip < size && bytes[skip] == ' '; --*spaces) ++skip;
  if (skip < size) *spaces = 0;
  fwrite(bytes + skip, 1, size - skip, stdout);
}

int main(int argc, char** argv) {
  const char *prompt = "Once upon a time", *id_list = NULL, *problem;
  uint32_t new_tokens = 64, context = 0;
  const uint8_t* bytes = NULL;
  uint32_t* ids;
  float* logits;
  void* memory;
  size_t size = 0, count = 0, spaces, state_bytes, i;
  int a = 1, print_ids = 0;
  OnebitModel model;
  OnebitTokenizer tokenizer;
  OnebitState state;
#ifdef ONEBIT_HEADER
  bytes = onebit_file;
  size = sizeof(onebit_file);
#else
  if (argc < 2 || argv[1][0] == '-') {
    fprintf(stderr,
            "usage: onebit FILE.1bit [--prompt TEXT | --ids 1,2,3] [--max-new-tokens N] "
            "[--context N] [--print-ids]\n");
    return 2;
  }
  bytes = read_file(argv[1], &size);
  if (bytes == NULL) return fail(argv[1], "cannot be read");
  a = 2;
#endif
  for (; a < argc; ++a) {
    const char* name = argv[a];
    if (strcmp(name, "--print-ids") == 0) {
      print_ids = 1;
    } else if (a + 1 == argc) {
      return fail(name, "is no option, or its value is missing");
    } else if (strcmp(name, "--prompt") == 0) {
      prompt = argv[++a];
    } else if (strcmp(name, "--ids") == 0) {
      id_list = argv[++a];
    } else if (strcmp(name, "--max-new-tokens") == 0) {
      if (!parse_number(argv[++a], &new_tokens)) return fail(name, "takes a whole number");
    } else if (strcmp(name, "--context") == 0) {
      if (!parse_number(argv[++a], &context)) return fail(name, "takes a whole number");
    } else {
      return fail(name, "is no option");
    }
  }

  problem = onebit_open(bytes, size, &model);
  if (problem == NULL) problem = onebit_open_tokenizer(&model, &tokenizer);
  if (problem != NULL) return fail("the model", problem);
  if (context == 0 || context > model.context_length) context = model.context_length;
  state_bytes = onebit_state_bytes(&model, context);
  memory = state_bytes == 0 ? NULL : malloc(state_bytes);
  logits = malloc(model.vocab_size * sizeof(*logits));
  ids = malloc(context * sizeof(*ids));
  if (memory == NULL || logits == NULL || ids == NULL) return fail("memory", "there is not enough");
  fprintf(stderr, "onebit: model %zu bytes, sequence %zu, logits %zu, token ids %zu\n", size,
          state_bytes, model.vocab_size * sizeof(*logits), context * sizeof(*ids));

  problem = id_list != NULL ? parse_ids(id_list, ids, context, &count)
                            : onebit_encode(&tokenizer, prompt, ids, context, &count);
  if (problem == NULL && count == 0) problem = "there is no token to begin with";
  if (problem != NULL) return fail("the prompt", problem);

  onebit_begin(&model, context, memory, &state);
  spaces = onebit_leading_spaces(&tokenizer);
  for (i = 0; i < count; ++i) {
    problem = onebit_forward(&state, ids[i], i + 1 == count ? logits : NULL);
    if (problem != NULL) return fail("the prompt", problem);
    if (!print_ids) print_token(&tokenizer, ids[i], &spaces);
  }
  for (i = 0; i < new_tokens; ++i) {
    const uint32_t token = onebit_argmax(logits, model.vocab_size);
    if (onebit_is_end(&tokenizer, token)) break;
    if (print_ids) {
      printf(i == 0 ? "%lu" : ",%lu", (unsigned long)token);
    } else {
      print_token(&tokenizer, token, &spaces);
    }
    if (state.length == context || onebit_forward(&state, token, logits) != NULL) break;
  }
  printf("\n");
  return 0;
}
