// SPDX-License-Identifier: Apache-2.0
// Rotary position embedding (Su et al. 2021), the half-split form of GPT-NeoX and Hugging Face
// Llama.
#pragma once

#include <cstddef>

namespace tf {

// Rotates one head of 2 * half values in place: pairs (head[i], head[half + i]) by the angle whose
// cosine and sine are cos[i], sin[i].
void RotateHalves(float* head, const float* cos, const float* sin, size_t half);

}  // namespace tf
