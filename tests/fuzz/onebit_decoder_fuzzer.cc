// SPDX-License-Identifier: Apache-2.0
// libFuzzer target: any bytes are a .1bit file that is opened and run, or refused with a message.
// Length and checksum are put right first, so that what lies behind them is reached; the last bytes
// are a text for the tokenizer, too.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "embedded/onebit.h"
#include "embedded/onebit_bytes.h"
#include "fuzz/require.h"

namespace {

constexpr size_t kMaxStateBytes = size_t{64} << 20, kMaxWork = size_t{1} << 24;

void Store(std::vector<uint8_t>& bytes, size_t at, uint32_t number) {
  for (size_t i = 0; i < 4; ++i) bytes[at + i] = static_cast<uint8_t>(number >> (8 * i));
}

// Weights that one token touches, at most: tensors may lie over one another in a file.
uint64_t Work(const OnebitModel& model) {
  const uint64_t widest =
      std::max<uint64_t>({model.largest_query, model.largest_ffn, model.hidden_size});
  return uint64_t{model.vocab_size} * model.hidden_size + 7 * model.layer_count * widest * widest;
}

void Run(const OnebitModel& model) {
  const uint32_t context = std::min<uint32_t>(3, model.context_length);
  const size_t bytes = onebit_state_bytes(&model, context);
  tf::Require(onebit_state_bytes(&model, 0) == 0, "no state for no context");
  tf::Require(onebit_state_bytes(&model, model.context_length + 1) == 0, "no longer context");
  if (bytes == 0 || bytes > kMaxStateBytes || Work(model) > kMaxWork) return;
  std::vector<uint8_t> memory(bytes);  // of exactly this size: ASan sees the first byte behind it
  std::vector<float> logits(model.vocab_size);
  OnebitState state;
  onebit_begin(&model, context, memory.data(), &state);
  tf::Require(onebit_forward(&state, model.vocab_size, logits.data()) != nullptr, "unknown token");
  for (uint32_t i = 0; i < context; ++i) {
    const uint32_t token = i % 2 == 0 ? model.vocab_size - 1 : 0;
    tf::Require(onebit_forward(&state, token, logits.data()) == nullptr, "a token");
    tf::Require(onebit_argmax(logits.data(), model.vocab_size) < model.vocab_size, "a choice");
  }
  tf::Require(onebit_forward(&state, 0, nullptr) != nullptr, "a full context");
}

void UseTokenizer(const OnebitModel& model, const std::string& text) {
  OnebitTokenizer tokenizer;
  if (onebit_open_tokenizer(&model, &tokenizer) != nullptr) return;
  std::vector<uint32_t> ids(text.size() + 4);
  for (const std::string& part : {text, std::string("Once upon 12 a time\n's")}) {
    for (const size_t capacity : {ids.size(), size_t{2}, size_t{0}}) {
      size_t count = 0;
      const char* problem = onebit_encode(&tokenizer, part.c_str(), ids.data(), capacity, &count);
      tf::Require(problem != nullptr || count <= capacity, "the number of tokens");
    }
  }
  uint8_t seen = 0;
  for (uint32_t token = 0; token <= tokenizer.token_count; ++token) {
    size_t size = 0;
    const uint8_t* bytes = onebit_token_bytes(&tokenizer, token, &size);
    tf::Require(size == 0 || (bytes >= model.bytes && bytes + size <= model.bytes + model.size),
                "the bytes of a token within the file");
    for (size_t i = 0; i < std::min<size_t>(size, 64); ++i)
      seen = static_cast<uint8_t>(seen ^ bytes[i]);
    tf::Require(onebit_is_end(&tokenizer, token) <= 1, "whether a token ends a text");
  }
  tf::Require(seen == 0 || tokenizer.token_count > 0, "no bytes without tokens");
  tf::Require(onebit_leading_spaces(&tokenizer) != 2, "how many spaces are not shown");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  OnebitModel model;
  std::vector<uint8_t> bytes(data, data + size);
  bytes.shrink_to_fit();
  const char* problem = onebit_open(bytes.data(), bytes.size(), &model);
  if (size >= 64 && problem != nullptr) {
    Store(bytes, 8, static_cast<uint32_t>(size));
    Store(bytes, 12, crc32(bytes.data() + 16, size - 16));
    problem = onebit_open(bytes.data(), bytes.size(), &model);
  }
  if (problem != nullptr) return 0;
  Run(model);
  const size_t letters = std::min<size_t>(size, 24);
  UseTokenizer(model, std::string(bytes.end() - static_cast<ptrdiff_t>(letters), bytes.end()));
  return 0;
}
