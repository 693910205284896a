#define PGOLF_ISA avx512
#include "causal_attention/causal_attention_body.inl"
