#define PGOLF_ISA avx512bf16
#include "newton_schulz/newton_schulz_body.inl"
