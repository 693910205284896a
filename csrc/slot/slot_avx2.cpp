#define PGOLF_ISA avx2
#include "slot/slot_body.inl"
