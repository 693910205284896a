#define PGOLF_ISA avx512
#include "common/limits_body.inl"
