#define PGOLF_ISA avx512bf16
#include "softcapped_cross_entropy/softcapped_cross_entropy_body.inl"
