#define PGOLF_ISA avx512
#include "slot/slot_body.inl"
