#define PGOLF_ISA generic
#include "newton_schulz/newton_schulz_body.inl"
