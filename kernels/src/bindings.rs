//! Generated from `include/ep_kernels.h` by `cargo xtask codegen`; do not edit.

pub const EP_KERNELS_ABI_VERSION: u32 = 1;
pub const EP_MAX_LOCAL_EXPERTS: u32 = 2048;
pub const EP_MAX_EXPERTS: u32 = 8192;
pub const EP_MAX_TOP_K: u32 = 32;
pub const EP_MAX_TOKENS: u32 = 65536;
pub const EP_MAX_RANKS: u32 = 1024;
pub const EP_HIDDEN_MULTIPLE: u32 = 128;
pub const EP_LINE_BYTES: u32 = 128;
pub const EP_LINE_DATA_BYTES: u32 = 120;
pub const EP_DISPATCH_FP8: u32 = 1;
pub const EP_DISPATCH_WEIGHTS: u32 = 2;
pub const EP_DISPATCH_SEND: u32 = 4;
pub const EP_DISPATCH_RECV: u32 = 8;
pub const EP_DISPATCH_POW2: u32 = 16;
pub const EP_DISPATCH_UE8M0: u32 = 32;
pub const EP_COMBINE_WEIGHTS: u32 = 1;
pub const EP_COMBINE_SEND: u32 = 4;
pub const EP_COMBINE_RECV: u32 = 8;
pub const EP_LAUNCH_OK: i32 = 0;
pub const EP_LAUNCH_CUDA_ERROR: i32 = 1;
pub const EP_LAUNCH_BAD_ARGS: i32 = 2;
pub const EP_LAUNCH_UNSUPPORTED: i32 = 3;
pub const EP_FAULT_NONE: u32 = 0;
pub const EP_FAULT_TIMEOUT: u32 = 1;
pub const EP_FAULT_EXPERT_RANGE: u32 = 2;
pub const EP_FAULT_EXPERT_REPEATED: u32 = 3;
pub const EP_FAULT_UNREACHABLE: u32 = 4;
pub const EP_OP_DISPATCH: u32 = 1;
pub const EP_OP_COMBINE: u32 = 2;
pub const EP_OP_BARRIER: u32 = 3;
pub const EP_PHASE_SEND: u32 = 1;
pub const EP_PHASE_COUNTS: u32 = 2;
pub const EP_PHASE_ROWS: u32 = 3;
pub const EP_PHASE_WEIGHTS: u32 = 4;
pub const EP_PHASE_PARTIALS: u32 = 5;
pub const EP_PHASE_BARRIER: u32 = 6;
pub const EP_FAULT_BYTES: u32 = 48;
pub const EP_FAULT_RING: u32 = 64;
pub const EP_CONTROL_FIXED_BYTES: u32 = 1024;
#[repr(C)]
#[derive(Debug, Default, Copy, Clone)]
pub struct ep_fault {
    pub sequence: u64,
    pub epoch: u64,
    pub fault: u32,
    pub op: u32,
    pub phase: u32,
    pub peer: u32,
    pub token: u64,
    pub value: i64,
}
#[repr(C)]
#[derive(Debug, Default, Copy, Clone)]
pub struct ep_layout {
    pub counts: u64,
    pub counts_source_stride: u64,
    pub counts_ring_stride: u64,
    pub rows: u64,
    pub row_stride: u64,
    pub rows_source_stride: u64,
    pub rows_ring_stride: u64,
    pub weights: u64,
    pub weight_stride: u64,
    pub weights_source_stride: u64,
    pub weights_slot_stride: u64,
    pub partials: u64,
    pub partial_stride: u64,
    pub partials_source_stride: u64,
    pub partials_slot_stride: u64,
    pub barrier: u64,
    pub bytes: u64,
    pub ring: u32,
    pub slots: u32,
    pub header_lines: u32,
    pub weight_lines: u32,
}
#[repr(C)]
#[derive(Debug, Default, Copy, Clone)]
pub struct ep_group {
    pub peer_table: u64,
    pub control: u64,
    pub faults: u64,
    pub timeout_ns: u64,
    pub rank: u32,
    pub num_ranks: u32,
    pub num_experts: u32,
    pub max_tokens: u32,
    pub hidden: u32,
    pub max_top_k: u32,
    pub device: i32,
    pub num_sms: u32,
}
#[repr(C)]
#[derive(Debug, Default, Copy, Clone)]
pub struct ep_handle {
    pub route: u64,
    pub recv_map: u64,
    pub recv_rows: u64,
    pub slot: u32,
    pub num_tokens: u32,
    pub top_k: u32,
    pub reserved: u32,
}
#[repr(C)]
#[derive(Debug, Default, Copy, Clone)]
pub struct ep_dispatch_args {
    pub struct_size: u32,
    pub flags: u32,
    pub group: ep_group,
    pub layout: ep_layout,
    pub handle: ep_handle,
    pub x: u64,
    pub topk_idx: u64,
    pub topk_weights: u64,
    pub recv_x: u64,
    pub recv_scales: u64,
    pub recv_count: u64,
    pub src_info: u64,
    pub layout_range: u64,
}
#[repr(C)]
#[derive(Debug, Default, Copy, Clone)]
pub struct ep_combine_args {
    pub struct_size: u32,
    pub flags: u32,
    pub group: ep_group,
    pub layout: ep_layout,
    pub handle: ep_handle,
    pub y: u64,
    pub topk_weights: u64,
    pub out: u64,
}
#[repr(C)]
#[derive(Debug, Default, Copy, Clone)]
pub struct ep_barrier_args {
    pub struct_size: u32,
    pub reserved: u32,
    pub group: ep_group,
    pub layout: ep_layout,
    pub spin_ns: u64,
}
#[repr(C)]
#[derive(Debug, Default, Copy, Clone)]
pub struct ep_dequantize_args {
    pub struct_size: u32,
    pub device: i32,
    pub x: u64,
    pub scales: u64,
    pub scale_stride: u64,
    pub out: u64,
    pub rows: u32,
    pub hidden: u32,
}
#[repr(C)]
#[derive(Debug, Default, Copy, Clone)]
pub struct ep_swiglu_args {
    pub struct_size: u32,
    pub device: i32,
    pub gate_up: u64,
    pub out: u64,
    pub rows: u32,
    pub intermediate: u32,
}
