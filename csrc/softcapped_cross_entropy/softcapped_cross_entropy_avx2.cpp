#define PGOLF_ISA avx2
#include "softcapped_cross_entropy/softcapped_cross_entropy_body.inl"
