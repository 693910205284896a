#define PGOLF_ISA avx512bf16
#include "leaky_relu2_mlp/leaky_relu2_mlp_body.inl"
