#define PGOLF_ISA amx
#include "leaky_relu2_mlp/leaky_relu2_mlp_body.inl"
