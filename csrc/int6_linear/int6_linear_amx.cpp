#define PGOLF_ISA amx
#include "int6_linear/int6_linear_body.inl"
