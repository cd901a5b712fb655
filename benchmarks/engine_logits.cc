// SPDX-License-Identifier: Apache-2.0
// Prints an engine's logits: links against libllama of llama.cpp, ik_llama.cpp or bitnet.cpp.
//
//   g++ -std=c++17 -I ENGINE/include -I ENGINE/ggml/include engine_logits.cc -L BUILD/src -lllama
//   engine_logits FILE.gguf OUT.f32 < token_ids
//
// With -DOLD_NAMES for bitnet.cpp, whose header is of 2024. OUT gets float32 [tokens, vocabulary].
#include <llama.h>

#include <cstdio>
#include <iostream>
#include <iterator>
#include <vector>

#ifdef OLD_NAMES
#define llama_model_load_from_file llama_load_model_from_file
#define llama_init_from_model llama_new_context_with_model
#define VocabSize llama_n_vocab
#else
int VocabSize(const llama_model* model) {
  return llama_vocab_n_tokens(llama_model_get_vocab(model));
}
#endif

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const std::vector<llama_token> tokens{std::istream_iterator<llama_token>(std::cin), {}};
  const int count = static_cast<int>(tokens.size());
  llama_backend_init();
  llama_model* model = llama_model_load_from_file(argv[1], llama_model_default_params());
  if (model == nullptr) return 1;
  llama_context_params params = llama_context_default_params();
  params.n_ctx = params.n_batch = params.n_ubatch = 512;
  params.n_threads = params.n_threads_batch = 2;
  llama_context* context = llama_init_from_model(model, params);
  if (context == nullptr) return 1;
  llama_batch batch = llama_batch_init(count, 0, 1);
  batch.n_tokens = count;
  for (int i = 0; i < count; ++i) {
    batch.token[i] = tokens[i];
    batch.pos[i] = i;
    batch.n_seq_id[i] = 1;
    batch.seq_id[i][0] = 0;
    batch.logits[i] = 1;
  }
  if (llama_decode(context, batch) != 0) return 1;
  std::FILE* out = std::fopen(argv[2], "wb");
  if (out == nullptr) return 1;
  for (int i = 0; i < count; ++i) {
    std::fwrite(llama_get_logits_ith(context, i), sizeof(float), VocabSize(model), out);
  }
  return std::fclose(out) == 0 ? 0 : 1;
}
