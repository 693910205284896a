#define PGOLF_ISA avx512bf16
#include "int6_linear/int6_linear_body.inl"
