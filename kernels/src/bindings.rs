//! Generated from `include/ep_kernels.h` by `cargo xtask codegen`; do not edit.

#![allow(
    clippy::allow_attributes_without_reason,
    unsafe_code,
    reason = "what bindgen writes; the functions are unsafe to call"
)]

pub const EP_KERNELS_ABI_VERSION: u32 = 3;
pub const EP_MAX_LOCAL_EXPERTS: u32 = 2048;
pub const EP_MAX_EXPERTS: u32 = 8192;
pub const EP_MAX_TOP_K: u32 = 32;
pub const EP_MAX_HIDDEN: u32 = 65536;
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
pub const EP_LAUNCH_TOO_LARGE: i32 = 4;
pub const EP_FAULT_NONE: u32 = 0;
pub const EP_FAULT_TIMEOUT: u32 = 1;
pub const EP_FAULT_EXPERT_RANGE: u32 = 2;
pub const EP_FAULT_EXPERT_REPEATED: u32 = 3;
pub const EP_FAULT_UNREACHABLE: u32 = 4;
pub const EP_FAULT_ABORTED: u32 = 5;
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
pub const EP_CONTROL_WAITS: u32 = 5;
pub const EP_ABORTED: u32 = 1;
pub const EP_ROWS_GIVEN_UP: u32 = 2147483648;
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
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of ep_fault"][::core::mem::size_of::<ep_fault>() - 48usize];
    ["Alignment of ep_fault"][::core::mem::align_of::<ep_fault>() - 8usize];
    ["Offset of field: ep_fault::sequence"][::core::mem::offset_of!(ep_fault, sequence) - 0usize];
    ["Offset of field: ep_fault::epoch"][::core::mem::offset_of!(ep_fault, epoch) - 8usize];
    ["Offset of field: ep_fault::fault"][::core::mem::offset_of!(ep_fault, fault) - 16usize];
    ["Offset of field: ep_fault::op"][::core::mem::offset_of!(ep_fault, op) - 20usize];
    ["Offset of field: ep_fault::phase"][::core::mem::offset_of!(ep_fault, phase) - 24usize];
    ["Offset of field: ep_fault::peer"][::core::mem::offset_of!(ep_fault, peer) - 28usize];
    ["Offset of field: ep_fault::token"][::core::mem::offset_of!(ep_fault, token) - 32usize];
    ["Offset of field: ep_fault::value"][::core::mem::offset_of!(ep_fault, value) - 40usize];
};
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
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of ep_layout"][::core::mem::size_of::<ep_layout>() - 152usize];
    ["Alignment of ep_layout"][::core::mem::align_of::<ep_layout>() - 8usize];
    ["Offset of field: ep_layout::counts"][::core::mem::offset_of!(ep_layout, counts) - 0usize];
    ["Offset of field: ep_layout::counts_source_stride"]
        [::core::mem::offset_of!(ep_layout, counts_source_stride) - 8usize];
    ["Offset of field: ep_layout::counts_ring_stride"]
        [::core::mem::offset_of!(ep_layout, counts_ring_stride) - 16usize];
    ["Offset of field: ep_layout::rows"][::core::mem::offset_of!(ep_layout, rows) - 24usize];
    ["Offset of field: ep_layout::row_stride"]
        [::core::mem::offset_of!(ep_layout, row_stride) - 32usize];
    ["Offset of field: ep_layout::rows_source_stride"]
        [::core::mem::offset_of!(ep_layout, rows_source_stride) - 40usize];
    ["Offset of field: ep_layout::rows_ring_stride"]
        [::core::mem::offset_of!(ep_layout, rows_ring_stride) - 48usize];
    ["Offset of field: ep_layout::weights"][::core::mem::offset_of!(ep_layout, weights) - 56usize];
    ["Offset of field: ep_layout::weight_stride"]
        [::core::mem::offset_of!(ep_layout, weight_stride) - 64usize];
    ["Offset of field: ep_layout::weights_source_stride"]
        [::core::mem::offset_of!(ep_layout, weights_source_stride) - 72usize];
    ["Offset of field: ep_layout::weights_slot_stride"]
        [::core::mem::offset_of!(ep_layout, weights_slot_stride) - 80usize];
    ["Offset of field: ep_layout::partials"]
        [::core::mem::offset_of!(ep_layout, partials) - 88usize];
    ["Offset of field: ep_layout::partial_stride"]
        [::core::mem::offset_of!(ep_layout, partial_stride) - 96usize];
    ["Offset of field: ep_layout::partials_source_stride"]
        [::core::mem::offset_of!(ep_layout, partials_source_stride) - 104usize];
    ["Offset of field: ep_layout::partials_slot_stride"]
        [::core::mem::offset_of!(ep_layout, partials_slot_stride) - 112usize];
    ["Offset of field: ep_layout::barrier"][::core::mem::offset_of!(ep_layout, barrier) - 120usize];
    ["Offset of field: ep_layout::bytes"][::core::mem::offset_of!(ep_layout, bytes) - 128usize];
    ["Offset of field: ep_layout::ring"][::core::mem::offset_of!(ep_layout, ring) - 136usize];
    ["Offset of field: ep_layout::slots"][::core::mem::offset_of!(ep_layout, slots) - 140usize];
    ["Offset of field: ep_layout::header_lines"]
        [::core::mem::offset_of!(ep_layout, header_lines) - 144usize];
    ["Offset of field: ep_layout::weight_lines"]
        [::core::mem::offset_of!(ep_layout, weight_lines) - 148usize];
};
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
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of ep_group"][::core::mem::size_of::<ep_group>() - 64usize];
    ["Alignment of ep_group"][::core::mem::align_of::<ep_group>() - 8usize];
    ["Offset of field: ep_group::peer_table"]
        [::core::mem::offset_of!(ep_group, peer_table) - 0usize];
    ["Offset of field: ep_group::control"][::core::mem::offset_of!(ep_group, control) - 8usize];
    ["Offset of field: ep_group::faults"][::core::mem::offset_of!(ep_group, faults) - 16usize];
    ["Offset of field: ep_group::timeout_ns"]
        [::core::mem::offset_of!(ep_group, timeout_ns) - 24usize];
    ["Offset of field: ep_group::rank"][::core::mem::offset_of!(ep_group, rank) - 32usize];
    ["Offset of field: ep_group::num_ranks"]
        [::core::mem::offset_of!(ep_group, num_ranks) - 36usize];
    ["Offset of field: ep_group::num_experts"]
        [::core::mem::offset_of!(ep_group, num_experts) - 40usize];
    ["Offset of field: ep_group::max_tokens"]
        [::core::mem::offset_of!(ep_group, max_tokens) - 44usize];
    ["Offset of field: ep_group::hidden"][::core::mem::offset_of!(ep_group, hidden) - 48usize];
    ["Offset of field: ep_group::max_top_k"]
        [::core::mem::offset_of!(ep_group, max_top_k) - 52usize];
    ["Offset of field: ep_group::device"][::core::mem::offset_of!(ep_group, device) - 56usize];
    ["Offset of field: ep_group::num_sms"][::core::mem::offset_of!(ep_group, num_sms) - 60usize];
};
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
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of ep_handle"][::core::mem::size_of::<ep_handle>() - 40usize];
    ["Alignment of ep_handle"][::core::mem::align_of::<ep_handle>() - 8usize];
    ["Offset of field: ep_handle::route"][::core::mem::offset_of!(ep_handle, route) - 0usize];
    ["Offset of field: ep_handle::recv_map"][::core::mem::offset_of!(ep_handle, recv_map) - 8usize];
    ["Offset of field: ep_handle::recv_rows"]
        [::core::mem::offset_of!(ep_handle, recv_rows) - 16usize];
    ["Offset of field: ep_handle::slot"][::core::mem::offset_of!(ep_handle, slot) - 24usize];
    ["Offset of field: ep_handle::num_tokens"]
        [::core::mem::offset_of!(ep_handle, num_tokens) - 28usize];
    ["Offset of field: ep_handle::top_k"][::core::mem::offset_of!(ep_handle, top_k) - 32usize];
    ["Offset of field: ep_handle::reserved"]
        [::core::mem::offset_of!(ep_handle, reserved) - 36usize];
};
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
    pub total_count: u64,
    pub wait_ns: u64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of ep_dispatch_args"][::core::mem::size_of::<ep_dispatch_args>() - 344usize];
    ["Alignment of ep_dispatch_args"][::core::mem::align_of::<ep_dispatch_args>() - 8usize];
    ["Offset of field: ep_dispatch_args::struct_size"]
        [::core::mem::offset_of!(ep_dispatch_args, struct_size) - 0usize];
    ["Offset of field: ep_dispatch_args::flags"]
        [::core::mem::offset_of!(ep_dispatch_args, flags) - 4usize];
    ["Offset of field: ep_dispatch_args::group"]
        [::core::mem::offset_of!(ep_dispatch_args, group) - 8usize];
    ["Offset of field: ep_dispatch_args::layout"]
        [::core::mem::offset_of!(ep_dispatch_args, layout) - 72usize];
    ["Offset of field: ep_dispatch_args::handle"]
        [::core::mem::offset_of!(ep_dispatch_args, handle) - 224usize];
    ["Offset of field: ep_dispatch_args::x"]
        [::core::mem::offset_of!(ep_dispatch_args, x) - 264usize];
    ["Offset of field: ep_dispatch_args::topk_idx"]
        [::core::mem::offset_of!(ep_dispatch_args, topk_idx) - 272usize];
    ["Offset of field: ep_dispatch_args::topk_weights"]
        [::core::mem::offset_of!(ep_dispatch_args, topk_weights) - 280usize];
    ["Offset of field: ep_dispatch_args::recv_x"]
        [::core::mem::offset_of!(ep_dispatch_args, recv_x) - 288usize];
    ["Offset of field: ep_dispatch_args::recv_scales"]
        [::core::mem::offset_of!(ep_dispatch_args, recv_scales) - 296usize];
    ["Offset of field: ep_dispatch_args::recv_count"]
        [::core::mem::offset_of!(ep_dispatch_args, recv_count) - 304usize];
    ["Offset of field: ep_dispatch_args::src_info"]
        [::core::mem::offset_of!(ep_dispatch_args, src_info) - 312usize];
    ["Offset of field: ep_dispatch_args::layout_range"]
        [::core::mem::offset_of!(ep_dispatch_args, layout_range) - 320usize];
    ["Offset of field: ep_dispatch_args::total_count"]
        [::core::mem::offset_of!(ep_dispatch_args, total_count) - 328usize];
    ["Offset of field: ep_dispatch_args::wait_ns"]
        [::core::mem::offset_of!(ep_dispatch_args, wait_ns) - 336usize];
};
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
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of ep_combine_args"][::core::mem::size_of::<ep_combine_args>() - 288usize];
    ["Alignment of ep_combine_args"][::core::mem::align_of::<ep_combine_args>() - 8usize];
    ["Offset of field: ep_combine_args::struct_size"]
        [::core::mem::offset_of!(ep_combine_args, struct_size) - 0usize];
    ["Offset of field: ep_combine_args::flags"]
        [::core::mem::offset_of!(ep_combine_args, flags) - 4usize];
    ["Offset of field: ep_combine_args::group"]
        [::core::mem::offset_of!(ep_combine_args, group) - 8usize];
    ["Offset of field: ep_combine_args::layout"]
        [::core::mem::offset_of!(ep_combine_args, layout) - 72usize];
    ["Offset of field: ep_combine_args::handle"]
        [::core::mem::offset_of!(ep_combine_args, handle) - 224usize];
    ["Offset of field: ep_combine_args::y"][::core::mem::offset_of!(ep_combine_args, y) - 264usize];
    ["Offset of field: ep_combine_args::topk_weights"]
        [::core::mem::offset_of!(ep_combine_args, topk_weights) - 272usize];
    ["Offset of field: ep_combine_args::out"]
        [::core::mem::offset_of!(ep_combine_args, out) - 280usize];
};
#[repr(C)]
#[derive(Debug, Default, Copy, Clone)]
pub struct ep_barrier_args {
    pub struct_size: u32,
    pub reserved: u32,
    pub group: ep_group,
    pub layout: ep_layout,
    pub spin_ns: u64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of ep_barrier_args"][::core::mem::size_of::<ep_barrier_args>() - 232usize];
    ["Alignment of ep_barrier_args"][::core::mem::align_of::<ep_barrier_args>() - 8usize];
    ["Offset of field: ep_barrier_args::struct_size"]
        [::core::mem::offset_of!(ep_barrier_args, struct_size) - 0usize];
    ["Offset of field: ep_barrier_args::reserved"]
        [::core::mem::offset_of!(ep_barrier_args, reserved) - 4usize];
    ["Offset of field: ep_barrier_args::group"]
        [::core::mem::offset_of!(ep_barrier_args, group) - 8usize];
    ["Offset of field: ep_barrier_args::layout"]
        [::core::mem::offset_of!(ep_barrier_args, layout) - 72usize];
    ["Offset of field: ep_barrier_args::spin_ns"]
        [::core::mem::offset_of!(ep_barrier_args, spin_ns) - 224usize];
};
#[repr(C)]
#[derive(Debug, Default, Copy, Clone)]
pub struct ep_empty_args {
    pub struct_size: u32,
    pub device: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of ep_empty_args"][::core::mem::size_of::<ep_empty_args>() - 8usize];
    ["Alignment of ep_empty_args"][::core::mem::align_of::<ep_empty_args>() - 4usize];
    ["Offset of field: ep_empty_args::struct_size"]
        [::core::mem::offset_of!(ep_empty_args, struct_size) - 0usize];
    ["Offset of field: ep_empty_args::device"]
        [::core::mem::offset_of!(ep_empty_args, device) - 4usize];
};
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
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of ep_dequantize_args"][::core::mem::size_of::<ep_dequantize_args>() - 48usize];
    ["Alignment of ep_dequantize_args"][::core::mem::align_of::<ep_dequantize_args>() - 8usize];
    ["Offset of field: ep_dequantize_args::struct_size"]
        [::core::mem::offset_of!(ep_dequantize_args, struct_size) - 0usize];
    ["Offset of field: ep_dequantize_args::device"]
        [::core::mem::offset_of!(ep_dequantize_args, device) - 4usize];
    ["Offset of field: ep_dequantize_args::x"]
        [::core::mem::offset_of!(ep_dequantize_args, x) - 8usize];
    ["Offset of field: ep_dequantize_args::scales"]
        [::core::mem::offset_of!(ep_dequantize_args, scales) - 16usize];
    ["Offset of field: ep_dequantize_args::scale_stride"]
        [::core::mem::offset_of!(ep_dequantize_args, scale_stride) - 24usize];
    ["Offset of field: ep_dequantize_args::out"]
        [::core::mem::offset_of!(ep_dequantize_args, out) - 32usize];
    ["Offset of field: ep_dequantize_args::rows"]
        [::core::mem::offset_of!(ep_dequantize_args, rows) - 40usize];
    ["Offset of field: ep_dequantize_args::hidden"]
        [::core::mem::offset_of!(ep_dequantize_args, hidden) - 44usize];
};
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
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of ep_swiglu_args"][::core::mem::size_of::<ep_swiglu_args>() - 32usize];
    ["Alignment of ep_swiglu_args"][::core::mem::align_of::<ep_swiglu_args>() - 8usize];
    ["Offset of field: ep_swiglu_args::struct_size"]
        [::core::mem::offset_of!(ep_swiglu_args, struct_size) - 0usize];
    ["Offset of field: ep_swiglu_args::device"]
        [::core::mem::offset_of!(ep_swiglu_args, device) - 4usize];
    ["Offset of field: ep_swiglu_args::gate_up"]
        [::core::mem::offset_of!(ep_swiglu_args, gate_up) - 8usize];
    ["Offset of field: ep_swiglu_args::out"]
        [::core::mem::offset_of!(ep_swiglu_args, out) - 16usize];
    ["Offset of field: ep_swiglu_args::rows"]
        [::core::mem::offset_of!(ep_swiglu_args, rows) - 24usize];
    ["Offset of field: ep_swiglu_args::intermediate"]
        [::core::mem::offset_of!(ep_swiglu_args, intermediate) - 28usize];
};
#[cfg(feature = "cuda")]
unsafe extern "C" {
    pub fn ep_kernels_abi_version() -> u32;
    pub fn ep_kernels_load(device: i32, cuda_error: *mut i32) -> i32;
    pub fn ep_dispatch_launch(
        args: *const ep_dispatch_args,
        stream: *mut ::core::ffi::c_void,
        cuda_error: *mut i32,
    ) -> i32;
    pub fn ep_combine_launch(
        args: *const ep_combine_args,
        stream: *mut ::core::ffi::c_void,
        cuda_error: *mut i32,
    ) -> i32;
    pub fn ep_barrier_launch(
        args: *const ep_barrier_args,
        stream: *mut ::core::ffi::c_void,
        cuda_error: *mut i32,
    ) -> i32;
    pub fn ep_empty_launch(
        args: *const ep_empty_args,
        stream: *mut ::core::ffi::c_void,
        cuda_error: *mut i32,
    ) -> i32;
    pub fn ep_dequantize_launch(
        args: *const ep_dequantize_args,
        stream: *mut ::core::ffi::c_void,
        cuda_error: *mut i32,
    ) -> i32;
    pub fn ep_swiglu_launch(
        args: *const ep_swiglu_args,
        stream: *mut ::core::ffi::c_void,
        cuda_error: *mut i32,
    ) -> i32;
}
