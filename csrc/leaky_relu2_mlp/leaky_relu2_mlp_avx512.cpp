#define PGOLF_ISA avx512
#include "leaky_relu2_mlp/leaky_relu2_mlp_body.inl"
