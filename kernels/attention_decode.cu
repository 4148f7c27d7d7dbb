// Attention of sequences with one query token for every architecture: cp.async.
#include "common/attention_decode.cuh"

ATTENTION_DECODE(attention_decode, SmallCopies)
