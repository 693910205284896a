#define PGOLF_ISA avx512
#include "int6_linear/int6_linear_body.inl"
