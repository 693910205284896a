#define PGOLF_ISA avx512bf16
#include "causal_attention/causal_attention_body.inl"
