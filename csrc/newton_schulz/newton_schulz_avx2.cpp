#define PGOLF_ISA avx2
#include "newton_schulz/newton_schulz_body.inl"
