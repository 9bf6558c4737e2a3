//! NVML: fabric information.
