#define PGOLF_ISA amx
#include "slot/slot_body.inl"
