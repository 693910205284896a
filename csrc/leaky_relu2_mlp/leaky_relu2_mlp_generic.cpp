#define PGOLF_ISA generic
#include "leaky_relu2_mlp/leaky_relu2_mlp_body.inl"
