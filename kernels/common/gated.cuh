// The gated activation, and in which order its two inputs lie.
//
// Gate and up are one product, the weights of which are packed so that its columns take turns: 8 of gate, the 8 of up that
// belong to them, 8 of gate, and so on; of n < 8 last columns, n and n. A thread that holds sums of a product of tensor cores
// then has gate and up of the same columns.
#pragma once

#include "numbers.cuh"

/// gelu_tanh(gate) * up. With u = sqrt(2 / pi) * (g + 0.044715 g^3), gelu is g * e^2u / (1 + e^2u), which keeps its relative
/// precision for negative g; the exponent is kept below where the sum overflows.
DEVICE float gated(float gate, float up) {
  constexpr float kLinear = 2.0f * 0.7978845608f * kLog2E;
  const float e = exp2_approx(fminf(gate * (kLinear + kLinear * 0.044715f * (gate * gate)), 126.0f));
  return gate * (e * reciprocal_approx(1.0f + e)) * up;
}
