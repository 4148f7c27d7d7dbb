// Attention of sequences with one query token for every architecture: cp.async.
#include "common/attention_decode.cuh"

ATTENTION_DECODE(attention_decode, SmallCopies, Bf16Cache)
ATTENTION_DECODE(attention_decode_e4m3, SmallCopies, E4m3Cache)
