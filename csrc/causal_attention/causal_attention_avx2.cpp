#define PGOLF_ISA avx2
#include "causal_attention/causal_attention_body.inl"
