#define PGOLF_ISA generic
#include "softcapped_cross_entropy/softcapped_cross_entropy_body.inl"
