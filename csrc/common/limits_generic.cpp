#define PGOLF_ISA generic
#include "common/limits_body.inl"
