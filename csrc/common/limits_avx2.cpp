#define PGOLF_ISA avx2
#include "common/limits_body.inl"
