#include "cpu.h"

#define ISA base
#include "cpu.inc"
