#define PGOLF_ISA amx
#include "causal_attention/causal_attention_body.inl"
