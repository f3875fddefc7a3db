#define AK_ISA avx2
#define AK_WIDTH 8
#define AK_PAIRS 0
#include "adapter_cpu_kernels.h"
