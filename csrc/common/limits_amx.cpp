#define PGOLF_ISA amx
#include "common/limits_body.inl"
