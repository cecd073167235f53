#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#include "cpu.h"

#define ISA avx2
#include "f16c.inc"
#include "cpu.inc"
#endif
