#define PGOLF_ISA generic
#include "slot/slot_body.inl"
