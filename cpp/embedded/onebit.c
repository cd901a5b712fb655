/* SPDX-License-Identifier: Apache-2.0 */
/* The decoder: one token after the other through the layers, in the order of operations of the
 * scalar target of the C++ core, so that both give the same logits. */
#include "onebit.h"

#include <math.h>
#include <string.h>

#include "onebit_bytes.h"

/* A product and a sum round one after the other, as in the scalar target. */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=off")
#else
#pragma STDC FP_CONTRACT OFF
#endif

enum { LANES = 16 }; /* of a floating-point sum: column c goes to lane c % 16 */

enum { HEADER_BYTES = 64, LAYER_BYTES = 64, ENTRY_BYTES = 32 };
enum { TIED_HEAD = 1, POSITION_EMBEDDING = 2, INT8_ACTIVATIONS = 4, MODEL_FLAGS = 7 };
enum {
  PROJECTION_BIAS = 1,
  OUTPUT_BIAS = 2,
  FFN_BIAS = 4,
  HEAD_NORMS = 8,
  SUB_NORMS = 16,
  POST_NORMS = 32,
  GATED = 64,
  LAYER_FLAGS = 127
};
enum { SCALE_NONE = 0, SCALE_TENSOR = 1, SCALE_ROW = 2, SCALE_GROUP = 3 };

/* ---- The file ---- */

static uint64_t row_bytes(uint32_t mode, uint32_t cols) {
  switch (mode) {
    case ONEBIT_F32:
      return (uint64_t)cols * 4;
    case ONEBIT_F16:
      return (uint64_t)cols * 2;
    case ONEBIT_INT8:
      return cols;
    case ONEBIT_TERNARY:
      return ((uint64_t)cols + 3) / 4;
    default:
      return ((uint64_t)cols + 7) / 8;
  }
}

/* Reads an entry of the tensor table without a check. */
static OnebitTensor tensor_at(const uint8_t* file, const uint8_t* entry) {
  OnebitTensor tensor;
  const uint32_t kind = load_u32(entry + 12), scales = load_u32(entry + 24);
  tensor.mode = load_u32(entry);
  tensor.rows = load_u32(entry + 4);
  tensor.cols = load_u32(entry + 8);
  tensor.group_size = kind == SCALE_GROUP ? load_u32(entry + 16) : 0;
  tensor.scales_per_row = kind == SCALE_ROW     ? 1
                          : kind == SCALE_GROUP ? (tensor.cols - 1) / tensor.group_size + 1
                                                : 0;
  tensor.data = file + load_u32(entry + 20);
  tensor.scales = kind == SCALE_NONE ? NULL : file + scales;
  return tensor;
}

/* Whether the two bits 10, which no weight has, stand somewhere. */
static int has_invalid_code(const uint8_t* data, uint64_t size) {
  uint64_t i;
  for (i = 0; i < size; ++i) {
    if (data[i] & 0xAA & ~(data[i] << 1)) return 1;
  }
  return 0;
}

/* The scales and the data of an entry begin behind *used, which moves behind them. */
static const char* check_entry(const uint8_t* file, uint64_t size, const uint8_t* entry,
                               uint32_t rows, uint32_t cols, int is_vector, uint64_t* used) {
  const uint32_t mode = load_u32(entry), kind = load_u32(entry + 12), group = load_u32(entry + 16);
  const uint64_t data = load_u32(entry + 20), scales = load_u32(entry + 24);
  uint64_t count = 0, bytes;
  if (load_u32(entry + 4) != rows || load_u32(entry + 8) != cols)
    return "a tensor has another shape";
  if (mode > ONEBIT_BINARY || (is_vector && mode != ONEBIT_F32))
    return "a tensor has an unknown mode";
  if (kind > SCALE_GROUP || (mode <= ONEBIT_F16) != (kind == SCALE_NONE) ||
      (mode == ONEBIT_INT8 && kind == SCALE_GROUP)) {
    return "a tensor has scales that do not fit its mode";
  }
  if (kind == SCALE_GROUP && group == 0) return "a group has no columns";
  bytes = row_bytes(mode, cols) * rows;
  if (data > size || bytes > size - data) return "a tensor lies outside of the file";
  if (kind == SCALE_TENSOR) count = 1;
  if (kind == SCALE_ROW) count = rows;
  if (kind == SCALE_GROUP) count = (uint64_t)rows * ((cols - 1) / group + 1);
  if (scales > size || count * 4 > size - scales) return "the scales of a tensor lie outside";
  if (count != 0 && scales < *used) return "the scales of a tensor lie in other bytes of the model";
  if (count != 0) *used = scales + count * 4;
  if (data < *used) return "a tensor lies in other bytes of the model";
  *used = data + bytes;
  if (mode == ONEBIT_TERNARY && has_invalid_code(file + data, bytes)) return "a ternary code is 10";
  return NULL;
}

/* Walks along the tensor table. */
typedef struct {
  const uint8_t* file;
  uint64_t size;
  const uint8_t *entry, *end;
  uint64_t used; /* tensors lie one behind the other, in the order of the walk */
  const char* problem;
} Walk;

static void expect(Walk* walk, uint32_t rows, uint32_t cols, int is_vector) {
  if (walk->problem != NULL) return;
  if (walk->end - walk->entry < ENTRY_BYTES) {
    walk->problem = "the tensor table is cut off";
    return;
  }
  walk->problem =
      check_entry(walk->file, walk->size, walk->entry, rows, cols, is_vector, &walk->used);
  walk->entry += ENTRY_BYTES;
}

static void expect_linear(Walk* walk, uint32_t rows, uint32_t cols, int has_bias) {
  expect(walk, rows, cols, 0);
  if (has_bias) expect(walk, 1, rows, 1);
}

static void expect_norm(Walk* walk, uint32_t size, int present) {
  if (present) expect(walk, 1, size, 1);
}

static OnebitLayer layer_at(const uint8_t* file, const uint8_t* record) {
  OnebitLayer layer;
  layer.heads = load_u32(record);
  layer.kv_heads = load_u32(record + 4);
  layer.head_dim = load_u32(record + 8);
  layer.ffn_size = load_u32(record + 12);
  layer.window = load_u32(record + 16);
  layer.pairs = load_u32(record + 20);
  layer.activation = load_u32(record + 24);
  layer.flags = load_u32(record + 28);
  layer.rotation_scale = load_f32(record + 32);
  layer.attention_scale = load_f32(record + 36);
  layer.attention_soft_cap = load_f32(record + 40);
  layer.residual_scale = load_f32(record + 44);
  layer.rotation = file + load_u32(record + 48);
  layer.tensors = file + load_u32(record + 52);
  return layer;
}

static const char* check_layer(OnebitModel* model, const uint8_t* record, Walk* walk) {
  const uint32_t limit = 1u << 24; /* products of two sizes stay below 2^48 */
  const uint64_t rotation = load_u32(record + 48), tensors = load_u32(record + 52);
  OnebitLayer layer;
  uint32_t query, kv;
  if (rotation > model->size || tensors > model->size) return "a layer lies outside of the file";
  layer = layer_at(model->bytes, record);
  if (layer.heads == 0 || layer.heads > limit || layer.kv_heads == 0 || layer.head_dim == 0 ||
      layer.head_dim > limit || layer.ffn_size == 0 || layer.ffn_size > limit ||
      layer.heads % layer.kv_heads != 0 || (uint64_t)layer.heads * layer.head_dim > limit) {
    return "a layer has impossible sizes";
  }
  if (layer.pairs > layer.head_dim / 2 || (uint64_t)layer.pairs * 4 > model->size - rotation) {
    return "a rotation lies outside of the file";
  }
  if (layer.activation > ONEBIT_RELU || (layer.flags & ~(uint32_t)LAYER_FLAGS) != 0) {
    return "a layer needs what this reader does not know";
  }
  query = layer.heads * layer.head_dim;
  kv = layer.kv_heads * layer.head_dim;
  walk->entry = layer.tensors;
  expect_norm(walk, model->hidden_size, 1);
  expect_linear(walk, query, model->hidden_size, layer.flags & PROJECTION_BIAS);
  expect_linear(walk, kv, model->hidden_size, layer.flags & PROJECTION_BIAS);
  expect_linear(walk, kv, model->hidden_size, layer.flags & PROJECTION_BIAS);
  expect_norm(walk, layer.head_dim, layer.flags & HEAD_NORMS);
  expect_norm(walk, layer.head_dim, layer.flags & HEAD_NORMS);
  expect_norm(walk, query, layer.flags & SUB_NORMS);
  expect_linear(walk, model->hidden_size, query, layer.flags & OUTPUT_BIAS);
  expect_norm(walk, model->hidden_size, layer.flags & POST_NORMS);
  expect_norm(walk, model->hidden_size, 1);
  if (layer.flags & GATED) {
    expect_linear(walk, layer.ffn_size, model->hidden_size, layer.flags & FFN_BIAS);
  }
  expect_linear(walk, layer.ffn_size, model->hidden_size, layer.flags & FFN_BIAS);
  expect_norm(walk, layer.ffn_size, layer.flags & SUB_NORMS);
  expect_linear(walk, model->hidden_size, layer.ffn_size, layer.flags & FFN_BIAS);
  expect_norm(walk, model->hidden_size, layer.flags & POST_NORMS);
  if (query > model->largest_query) model->largest_query = query;
  if (kv > model->largest_kv) model->largest_kv = kv;
  if (layer.ffn_size > model->largest_ffn) model->largest_ffn = layer.ffn_size;
  return walk->problem;
}

const char* onebit_open(const uint8_t* bytes, size_t size, OnebitModel* model) {
  const uint32_t limit = 1u << 24;
  Walk walk;
  uint32_t i;
  memset(model, 0, sizeof(*model));
  if (size < HEADER_BYTES || memcmp(bytes, "1BIT", 4) != 0) return "this is no .1bit file";
  if (load_u32(bytes + 4) != 1) return "the file has another version than 1";
  if (load_u32(bytes + 8) != size) return "the file is cut off, or has something behind it";
  if (load_u32(bytes + 12) != crc32(bytes + 16, size - 16)) return "the checksum does not fit";
  model->bytes = bytes;
  model->size = size;
  model->vocab_size = load_u32(bytes + 16);
  model->hidden_size = load_u32(bytes + 20);
  model->layer_count = load_u32(bytes + 24);
  model->context_length = load_u32(bytes + 28);
  model->flags = load_u32(bytes + 32);
  model->norm_epsilon = load_f32(bytes + 36);
  model->embedding_scale = load_f32(bytes + 40);
  model->logit_soft_cap = load_f32(bytes + 44);
  if (model->vocab_size == 0 || model->vocab_size > limit || model->hidden_size == 0 ||
      model->hidden_size > limit || model->layer_count == 0 || model->layer_count > limit ||
      model->context_length == 0 || model->context_length > limit) {
    return "the model has impossible sizes";
  }
  if ((model->flags & ~(uint32_t)MODEL_FLAGS) != 0) {
    return "the model needs what this reader does not know";
  }
  if ((uint64_t)model->layer_count * LAYER_BYTES > size - HEADER_BYTES) {
    return "the layers are cut off";
  }
  walk.file = bytes;
  walk.size = size;
  walk.entry = bytes + HEADER_BYTES + (size_t)model->layer_count * LAYER_BYTES;
  walk.end = bytes + size;
  walk.used = (uint64_t)(walk.entry - bytes);
  walk.problem = NULL;
  {
    const uint8_t* first = walk.entry;
    expect(&walk, model->vocab_size, model->hidden_size, 0);
    expect_norm(&walk, model->hidden_size, 1);
    if (!(model->flags & TIED_HEAD)) expect(&walk, model->vocab_size, model->hidden_size, 0);
    if (model->flags & POSITION_EMBEDDING) {
      expect(&walk, model->context_length, model->hidden_size, 0);
    }
    if (walk.problem != NULL) return walk.problem;
    model->embedding = tensor_at(bytes, first);
    model->final_norm = tensor_at(bytes, first + ENTRY_BYTES);
    first += 2 * ENTRY_BYTES;
    model->head = model->embedding;
    if (!(model->flags & TIED_HEAD)) {
      model->head = tensor_at(bytes, first);
      first += ENTRY_BYTES;
    }
    if (model->flags & POSITION_EMBEDDING) model->position_embedding = tensor_at(bytes, first);
  }
  for (i = 0; i < model->layer_count; ++i) {
    const char* problem = check_layer(model, bytes + HEADER_BYTES + (size_t)i * LAYER_BYTES, &walk);
    if (problem != NULL) return problem;
  }
  return NULL;
}

/* ---- Numbers ---- */

static float f32_at(const uint8_t* data, size_t index) { return load_f32(data + 4 * index); }

static float f16_at(const uint8_t* data, size_t index) {
  const uint32_t half = (uint32_t)data[2 * index] | (uint32_t)data[2 * index + 1] << 8;
  const uint32_t exponent = half >> 10 & 31, mantissa = half & 1023;
  const float sign = half & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 0) return sign * (float)mantissa * 0x1p-24f;
  return sign * (float)(mantissa + 1024) * ldexpf(1.0f, (int)exponent - 25);
}

static int trit_at(uint32_t mode, const uint8_t* row, size_t col) {
  if (mode == ONEBIT_BINARY) return 2 * (row[col / 8] >> col % 8 & 1) - 1;
  {
    const int code = row[col / 4] >> 2 * (col % 4) & 3;
    return (code & 1) - (code & 2);
  }
}

/* The 16 lanes of a sum, in one fixed tree. */
static float sum_lanes(float* lane) {
  int l;
  for (l = 0; l < 8; ++l) lane[l] += lane[l + 8];
  for (l = 0; l < 4; ++l) lane[l] += lane[l + 4];
  return (lane[0] + lane[2]) + (lane[1] + lane[3]);
}

static float dot(const float* a, const float* b, size_t size) {
  float lane[LANES] = {0};
  size_t i;
  for (i = 0; i < size; ++i) lane[i % LANES] += a[i] * b[i];
  return sum_lanes(lane);
}

/* e^x: Cephes' polynomial on |r| <= ln(2) / 2, times 2^n in two halves. */
static float exponential(float x) {
  const float magic = 0x1.8p23f;
  float shifted, n, r, p;
  int32_t bits, low;
  uint32_t raw;
  if (x < -150.0f) x = -150.0f;
  if (x > 128.0f) x = 128.0f;
  shifted = x * 0x1.715476p+0f + magic;
  n = shifted - magic;
  memcpy(&raw, &shifted, 4);
  bits = (int32_t)(raw - 0x4B400000u);
  r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * (r * r) + r) + 1.0f;
  low = (bits - (bits & 1)) / 2;
  return p * power_of_two(low) * power_of_two(bits - low);
}

static void soft_cap(float* x, size_t size, float cap) {
  const float factor = 2.0f / cap;
  size_t i;
  for (i = 0; i < size; ++i) x[i] = cap * (1.0f - 2.0f / (exponential(x[i] * factor) + 1.0f));
}

static float activate(uint32_t activation, float x) {
  if (activation == ONEBIT_SILU) return x / (1.0f + exponential(0.0f - x));
  if (activation == ONEBIT_GELU) {
    const float inner = 1.0f + 0.044715f * (x * x);
    return x / (1.0f + exponential(-1.5957691216f * x * inner));
  }
  if (x < 0.0f) x = 0.0f;
  return activation == ONEBIT_RELU2 ? x * x : x;
}

static void rms_norm(const uint8_t* weight, const float* x, size_t size, float epsilon,
                     float* out) {
  float lane[LANES] = {0};
  float factor;
  size_t i;
  for (i = 0; i < size; ++i) lane[i % LANES] += x[i] * x[i];
  factor = 1.0f / sqrtf(sum_lanes(lane) / (float)size + epsilon);
  for (i = 0; i < size; ++i) out[i] = x[i] * factor * f32_at(weight, i);
}

static float scale_of(const OnebitTensor* tensor, size_t row, size_t group) {
  return f32_at(tensor->scales, row * tensor->scales_per_row + group);
}

static void copy_row(const OnebitTensor* tensor, size_t row, float* out) {
  const uint8_t* data = tensor->data + row * (size_t)row_bytes(tensor->mode, tensor->cols);
  size_t c;
  for (c = 0; c < tensor->cols; ++c) {
    const size_t group = tensor->group_size == 0 ? 0 : c / tensor->group_size;
    switch (tensor->mode) {
      case ONEBIT_F32:
        out[c] = f32_at(data, c);
        break;
      case ONEBIT_F16:
        out[c] = f16_at(data, c);
        break;
      case ONEBIT_INT8:
        out[c] = (float)(int8_t)data[c] * scale_of(tensor, row, 0);
        break;
      default:
        out[c] = (float)trit_at(tensor->mode, data, c) * scale_of(tensor, row, group);
    }
  }
}

/* ---- Linear layers ---- */

static float dense_row(const OnebitTensor* tensor, size_t row, const float* x) {
  const uint8_t* data = tensor->data + row * (size_t)row_bytes(tensor->mode, tensor->cols);
  float lane[LANES] = {0};
  float sum;
  size_t c;
  if (tensor->mode == ONEBIT_F32) {
    for (c = 0; c < tensor->cols; ++c) lane[c % LANES] += f32_at(data, c) * x[c];
    return sum_lanes(lane);
  }
  if (tensor->mode == ONEBIT_F16) {
    for (c = 0; c < tensor->cols; ++c) lane[c % LANES] += f16_at(data, c) * x[c];
    return sum_lanes(lane);
  }
  for (c = 0; c < tensor->cols; ++c) lane[c % LANES] += (float)(int8_t)data[c] * x[c];
  sum = sum_lanes(lane);
  return sum * scale_of(tensor, row, 0);
}

/* Codes of the input, [cols], and the number that they were multiplied by. */
static float quantize(const float* x, size_t size, int8_t* codes) {
  float largest = 1e-5f, factor;
  size_t i;
  for (i = 0; i < size; ++i) {
    if (fabsf(x[i]) > largest) largest = fabsf(x[i]);
  }
  factor = 127.0f * (1.0f / largest);
  for (i = 0; i < size; ++i) {
    const float code = nearbyintf(x[i] * factor);
    /* NaN, from weights that are none, becomes -128: no conversion is undefined. */
    codes[i] = (int8_t)(code > 127.0f ? 127.0f : code >= -128.0f ? code : -128.0f);
  }
  return factor;
}

/* With `codes`, sums of integers that are divided by `factor` at last; else sums of `x`. */
static float ternary_row(const OnebitTensor* tensor, size_t row, const float* x,
                         const int8_t* codes, float factor) {
  const uint8_t* data = tensor->data + row * (size_t)row_bytes(tensor->mode, tensor->cols);
  const size_t cols = tensor->cols;
  const size_t group_cols = tensor->group_size == 0 ? cols : tensor->group_size;
  float total = 0.0f;
  size_t group, begin;
  for (group = 0, begin = 0; begin < cols; ++group, begin += group_cols) {
    const size_t end = cols - begin < group_cols ? cols : begin + group_cols;
    size_t c;
    float sum = 0.0f;
    if (codes != NULL) {
      int32_t exact = 0;
      for (c = begin; c < end; ++c) exact += trit_at(tensor->mode, data, c) * codes[c];
      sum = (float)exact;
    } else {
      for (c = begin; c < end; ++c) sum += (float)trit_at(tensor->mode, data, c) * x[c];
    }
    total += sum * scale_of(tensor, row, group);
  }
  return codes != NULL ? total / factor : total;
}

/* out = weight * x. */
static void multiply(const OnebitState* state, const OnebitTensor* tensor, const float* x,
                     float* out) {
  const int is_ternary = tensor->mode >= ONEBIT_TERNARY;
  const int8_t* codes = NULL;
  float factor = 1.0f;
  size_t row;
  if (is_ternary && (state->model->flags & INT8_ACTIVATIONS)) {
    factor = quantize(x, tensor->cols, state->codes);
    codes = state->codes;
  }
  for (row = 0; row < tensor->rows; ++row) {
    out[row] = is_ternary ? ternary_row(tensor, row, x, codes, factor) : dense_row(tensor, row, x);
  }
}

/* Takes a linear layer from the table: out = weight * x + bias. */
static void linear(const OnebitState* state, const uint8_t** entry, int has_bias, const float* x,
                   float* out) {
  const OnebitTensor weight = tensor_at(state->model->bytes, *entry);
  *entry += ENTRY_BYTES;
  multiply(state, &weight, x, out);
  if (has_bias) {
    const OnebitTensor bias = tensor_at(state->model->bytes, *entry);
    size_t i;
    *entry += ENTRY_BYTES;
    for (i = 0; i < bias.cols; ++i) out[i] += f32_at(bias.data, i);
  }
}

/* Takes a norm from the table, where the layer has it, and applies it to `heads` parts of x. */
static void norm(const OnebitState* state, const uint8_t** entry, int present, const float* x,
                 size_t parts, float* out) {
  OnebitTensor weight;
  size_t part;
  if (!present) return;
  weight = tensor_at(state->model->bytes, *entry);
  *entry += ENTRY_BYTES;
  for (part = 0; part < parts; ++part) {
    rms_norm(weight.data, x + part * weight.cols, weight.cols, state->model->norm_epsilon,
             out + part * weight.cols);
  }
}

/* ---- Attention ---- */

static void find_angles(const OnebitLayer* layer, uint32_t position, float* angles) {
  size_t i;
  for (i = 0; i < layer->pairs; ++i) {
    const float angle = (float)position * f32_at(layer->rotation, i);
    angles[i] = cosf(angle) * layer->rotation_scale;
    angles[layer->pairs + i] = sinf(angle) * layer->rotation_scale;
  }
}

static void rotate(float* heads, size_t count, size_t head_dim, const float* angles, size_t pairs) {
  const float *cosines = angles, *sines = angles + pairs;
  size_t head, i;
  for (head = 0; head < count; ++head, heads += head_dim) {
    for (i = 0; i < pairs; ++i) {
      const float a = heads[i], b = heads[pairs + i];
      heads[i] = a * cosines[i] - b * sines[i];
      heads[pairs + i] = a * sines[i] + b * cosines[i];
    }
  }
}

/* One head: `keys` and `values` are those of the first token, `stride` floats lie between tokens.
 */
static void attend(const OnebitLayer* layer, const float* query, const float* keys,
                   const float* values, size_t stride, size_t begin, size_t end, float* scores,
                   float* out) {
  float lane[LANES] = {0};
  float largest = -INFINITY, sum;
  size_t t, i;
  const size_t count = end - begin;
  keys += begin * stride;
  values += begin * stride;
  for (t = 0; t < count; ++t) {
    scores[t] = dot(query, keys + t * stride, layer->head_dim) * layer->attention_scale;
  }
  if (layer->attention_soft_cap != 0.0f) soft_cap(scores, count, layer->attention_soft_cap);
  for (t = 0; t < count; ++t) {
    if (scores[t] > largest) largest = scores[t];
  }
  for (t = 0; t < count; ++t) {
    scores[t] = exponential(scores[t] - largest);
    lane[t % LANES] += scores[t];
  }
  sum = sum_lanes(lane);
  for (i = 0; i < layer->head_dim; ++i) out[i] = 0.0f;
  for (t = 0; t < count; ++t) {
    for (i = 0; i < layer->head_dim; ++i) out[i] += scores[t] * values[t * stride + i];
  }
  for (i = 0; i < layer->head_dim; ++i) out[i] /= sum;
}

/* ---- The forward pass ---- */

static void add_scaled(const float* delta, size_t size, float scale, float* x) {
  size_t i;
  for (i = 0; i < size; ++i) x[i] += delta[i] * scale;
}

static void run_attention(OnebitState* state, const OnebitLayer* layer, float* cache,
                          const uint8_t** entry) {
  const OnebitModel* model = state->model;
  const size_t kv = (size_t)layer->kv_heads * layer->head_dim;
  const size_t position = state->length, end = position + 1;
  const size_t begin = layer->window != 0 && end > layer->window ? end - layer->window : 0;
  const size_t share = layer->heads / layer->kv_heads;
  float *keys = cache, *values = cache + kv * state->context;
  float *key = keys + position * kv, *value = values + position * kv;
  const int biased = (layer->flags & PROJECTION_BIAS) != 0;
  size_t head;
  norm(state, entry, 1, state->hidden, 1, state->input);
  linear(state, entry, biased, state->input, state->query);
  linear(state, entry, biased, state->input, key);
  linear(state, entry, biased, state->input, value);
  norm(state, entry, layer->flags & HEAD_NORMS, state->query, layer->heads, state->query);
  norm(state, entry, layer->flags & HEAD_NORMS, key, layer->kv_heads, key);
  find_angles(layer, state->length, state->angles);
  rotate(state->query, layer->heads, layer->head_dim, state->angles, layer->pairs);
  rotate(key, layer->kv_heads, layer->head_dim, state->angles, layer->pairs);
  for (head = 0; head < layer->heads; ++head) {
    const size_t offset = head / share * layer->head_dim;
    attend(layer, state->query + head * layer->head_dim, keys + offset, values + offset, kv, begin,
           end, state->scores, state->input + head * layer->head_dim);
  }
  norm(state, entry, layer->flags & SUB_NORMS, state->input, 1, state->input);
  linear(state, entry, layer->flags & OUTPUT_BIAS, state->input, state->delta);
  norm(state, entry, layer->flags & POST_NORMS, state->delta, 1, state->delta);
  add_scaled(state->delta, model->hidden_size, layer->residual_scale, state->hidden);
}

static void run_ffn(OnebitState* state, const OnebitLayer* layer, const uint8_t** entry) {
  const int biased = (layer->flags & FFN_BIAS) != 0;
  size_t i;
  norm(state, entry, 1, state->hidden, 1, state->input);
  if (layer->flags & GATED) linear(state, entry, biased, state->input, state->gate);
  linear(state, entry, biased, state->input, state->up);
  for (i = 0; i < layer->ffn_size; ++i) {
    state->input[i] = layer->flags & GATED
                          ? activate(layer->activation, state->gate[i]) * state->up[i]
                          : activate(layer->activation, state->up[i]);
  }
  norm(state, entry, layer->flags & SUB_NORMS, state->input, 1, state->input);
  linear(state, entry, biased, state->input, state->delta);
  norm(state, entry, layer->flags & POST_NORMS, state->delta, 1, state->delta);
  add_scaled(state->delta, state->model->hidden_size, layer->residual_scale, state->hidden);
}

const char* onebit_forward(OnebitState* state, uint32_t token, float* logits) {
  const OnebitModel* model = state->model;
  float* cache = state->cache;
  size_t i;
  if (token >= model->vocab_size) return "the token is not in the vocabulary";
  if (state->length >= state->context) return "the context is full";
  copy_row(&model->embedding, token, state->hidden);
  for (i = 0; i < model->hidden_size; ++i) state->hidden[i] *= model->embedding_scale;
  if (model->flags & POSITION_EMBEDDING) {
    copy_row(&model->position_embedding, state->length, state->delta);
    add_scaled(state->delta, model->hidden_size, 1.0f, state->hidden);
  }
  for (i = 0; i < model->layer_count; ++i) {
    const OnebitLayer layer = layer_at(model->bytes, model->bytes + HEADER_BYTES + i * LAYER_BYTES);
    const uint8_t* entry = layer.tensors;
    run_attention(state, &layer, cache, &entry);
    run_ffn(state, &layer, &entry);
    cache += 2 * (size_t)layer.kv_heads * layer.head_dim * state->context;
  }
  ++state->length;
  if (logits != NULL) {
    rms_norm(model->final_norm.data, state->hidden, model->hidden_size, model->norm_epsilon,
             state->input);
    multiply(state, &model->head, state->input, logits);
    if (model->logit_soft_cap != 0.0f) soft_cap(logits, model->vocab_size, model->logit_soft_cap);
  }
  return NULL;
}

uint32_t onebit_argmax(const float* logits, uint32_t vocab_size) {
  uint32_t best = 0, i;
  for (i = 1; i < vocab_size; ++i) {
    if (logits[i] > logits[best]) best = i;
  }
  return best;
}

/* ---- Memory ---- */

/* The largest input of a linear layer. */
static uint32_t largest_input(const OnebitModel* model) {
  uint32_t largest = model->hidden_size;
  if (model->largest_query > largest) largest = model->largest_query;
  if (model->largest_ffn > largest) largest = model->largest_ffn;
  return largest;
}

static uint64_t cache_floats(const OnebitModel* model, uint32_t context) {
  uint64_t floats = 0;
  uint32_t i;
  for (i = 0; i < model->layer_count; ++i) {
    const uint8_t* record = model->bytes + HEADER_BYTES + (size_t)i * LAYER_BYTES;
    floats += 2 * (uint64_t)load_u32(record + 4) * load_u32(record + 8) * context; /* <= 2^49 */
    if (floats > (uint64_t)1 << 60) break; /* more than any memory: the sum must not wrap */
  }
  return floats;
}

size_t onebit_state_bytes(const OnebitModel* model, uint32_t context) {
  uint64_t floats, bytes;
  if (context == 0 || context > model->context_length) return 0;
  floats = 2 * (uint64_t)model->hidden_size + largest_input(model) +
           2 * (uint64_t)model->largest_query + 2 * (uint64_t)model->largest_ffn + context +
           cache_floats(model, context);
  bytes = floats * sizeof(float) + largest_input(model);
  return bytes > SIZE_MAX ? 0 : (size_t)bytes;
}

void onebit_begin(const OnebitModel* model, uint32_t context, void* memory, OnebitState* state) {
  float* next = memory;
  state->model = model;
  state->context = context;
  state->length = 0;
  state->hidden = next;
  state->delta = state->hidden + model->hidden_size;
  state->input = state->delta + model->hidden_size;
  state->query = state->input + largest_input(model);
  state->angles = state->query + model->largest_query; /* two for a pair: at most a head */
  state->gate = state->angles + model->largest_query;
  state->up = state->gate + model->largest_ffn;
  state->scores = state->up + model->largest_ffn;
  state->cache = state->scores + context;
  state->codes = (int8_t*)(state->cache + (size_t)cache_floats(model, context));
}
