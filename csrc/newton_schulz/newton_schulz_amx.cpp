#define PGOLF_ISA amx
#include "newton_schulz/newton_schulz_body.inl"
