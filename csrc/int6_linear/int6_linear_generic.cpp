#define PGOLF_ISA generic
#include "int6_linear/int6_linear_body.inl"
