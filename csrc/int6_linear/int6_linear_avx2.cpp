#define PGOLF_ISA avx2
#include "int6_linear/int6_linear_body.inl"
