// What launchers use of CUDA's header of this name is in cuda_runtime.h.
#pragma once
