#define PGOLF_ISA avx512bf16
#include "slot/slot_body.inl"
