#define PGOLF_ISA generic
#include "causal_attention/causal_attention_body.inl"
