#define AK_ISA avx512
#define AK_WIDTH 16
#define AK_PAIRS 0
#include "adapter_cpu_kernels.h"
