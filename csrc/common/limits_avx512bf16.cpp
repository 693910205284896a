#define PGOLF_ISA avx512bf16
#include "common/limits_body.inl"
