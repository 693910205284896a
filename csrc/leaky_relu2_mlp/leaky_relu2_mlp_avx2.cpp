#define PGOLF_ISA avx2
#include "leaky_relu2_mlp/leaky_relu2_mlp_body.inl"
