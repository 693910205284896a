#define PGOLF_ISA amx
#include "softcapped_cross_entropy/softcapped_cross_entropy_body.inl"
