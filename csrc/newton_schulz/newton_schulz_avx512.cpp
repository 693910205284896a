#define PGOLF_ISA avx512
#include "newton_schulz/newton_schulz_body.inl"
