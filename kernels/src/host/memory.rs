//! From addresses to memory: the one place where the host kernels are unsafe.
//!
//! An address in the arguments is either memory of this rank, which nobody else touches while the
//! call runs and which becomes a slice, or memory that other ranks and the host read and write at
//! the same time, which becomes a [`Window`]. The promise of [`Kernels`](crate::Kernels) is spent
//! once, in the constructors here; what follows is safe code.

#![allow(
    unsafe_code,
    reason = "arguments are addresses; this file turns them into memory"
)]

use std::ptr;
use std::slice;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use super::check::Dims;
use crate::ffi::{
    self, EP_COMBINE_RECV, EP_COMBINE_SEND, EP_COMBINE_WEIGHTS, EP_DISPATCH_FP8, EP_DISPATCH_RECV,
    EP_DISPATCH_SEND, EP_DISPATCH_UE8M0, EP_DISPATCH_WEIGHTS, EP_FAULT_BYTES, EP_FAULT_RING,
};
use crate::numerics::SCALE_BLOCK;

/// Numbers without padding, of which every bit pattern is a value.
///
/// # Safety
/// Holds for the implementing type.
pub(super) unsafe trait Plain: Copy {}

// SAFETY: an integer or float: no padding, every bit pattern a value.
unsafe impl Plain for u8 {}
// SAFETY: as above.
unsafe impl Plain for u16 {}
// SAFETY: as above.
unsafe impl Plain for u64 {}
// SAFETY: as above.
unsafe impl Plain for f32 {}

/// Memory that other ranks, or the host, read and write at the same time.
///
/// Words are atomic. Bytes are copied, and guarded by a flag word in front of them: the writer calls
/// [`begin`](Self::begin), copies, and calls [`publish`](Self::publish); the reader waits for the
/// flag with [`load`](Self::load), copies, and asks [`unchanged`](Self::unchanged) whether what it
/// copied was whole. By the protocol a writer never meets a reader; it can only when one of them had
/// been given up, and then the reader discards the copy.
///
/// Offsets are computed from checked shapes; one outside the window panics, as a slice index does.
#[derive(Clone, Copy, Debug)]
pub(super) struct Window {
    base: *mut u8,
    bytes: u64,
}

impl Window {
    /// # Safety
    /// `address` is aligned to 8 bytes, and `bytes` bytes from it can be read and written until the
    /// window is dropped, by other threads and processes too.
    unsafe fn new(address: u64, bytes: u64) -> Self {
        Self {
            base: ptr::with_exposed_provenance_mut(address as usize),
            bytes,
        }
    }

    /// Reads a word and orders all later reads after it.
    pub(super) fn load(&self, at: u64) -> u64 {
        self.word(at).load(Ordering::Acquire)
    }

    /// Reads a 32-bit word.
    pub(super) fn load_u32(&self, at: u64) -> u32 {
        // SAFETY: `part` checked bounds and alignment, and the memory outlives the window; all
        // accesses to it while windows exist are atomic.
        let word = unsafe { AtomicU32::from_ptr(self.part(at, 1)) };
        word.load(Ordering::Acquire)
    }

    /// Writes a word after everything that was written before.
    pub(super) fn publish(&self, at: u64, value: u64) {
        self.word(at).store(value, Ordering::Release);
    }

    /// Writes a word in no particular order.
    pub(super) fn store_relaxed(&self, at: u64, value: u64) {
        self.word(at).store(value, Ordering::Relaxed);
    }

    /// Adds one to a word that only this rank writes, and returns the sum.
    pub(super) fn increment(&self, at: u64) -> u64 {
        self.word(at)
            .fetch_add(1, Ordering::Relaxed)
            .wrapping_add(1)
    }

    /// Clears the flag at `at` before everything that is written later.
    pub(super) fn begin(&self, at: u64) {
        self.store_relaxed(at, 0);
        fence(Ordering::Release);
    }

    /// Whether the flag at `at` still has a value, after everything that was read before.
    pub(super) fn unchanged(&self, at: u64, value: u64) -> bool {
        fence(Ordering::Acquire);
        self.word(at).load(Ordering::Relaxed) == value
    }

    /// Copies into the window, under a flag.
    pub(super) fn write<T: Plain>(&self, at: u64, from: &[T]) {
        let to = self.part(at, from.len());
        // SAFETY: `part` checked the bounds and alignment of `to`; `from` is a slice of plain
        // numbers of this rank, which no window overlaps.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) };
    }

    /// Copies out of the window, under a flag.
    pub(super) fn read<T: Plain>(&self, at: u64, into: &mut [T]) {
        let from = self.part::<T>(at, into.len());
        // SAFETY: `part` checked the bounds and alignment of `from`; every bit pattern is a `T`,
        // and no window overlaps the slice.
        unsafe { ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
    }

    fn word(&self, at: u64) -> &AtomicU64 {
        // SAFETY: `part` checked bounds and alignment, and the memory outlives the window; flag
        // words and counters are only accessed atomically.
        unsafe { AtomicU64::from_ptr(self.part(at, 1)) }
    }

    /// The address of `len` values at an offset.
    fn part<T>(&self, at: u64, len: usize) -> *mut T {
        let end = at.saturating_add((len * size_of::<T>()) as u64);
        assert!(end <= self.bytes && at.is_multiple_of(align_of::<T>() as u64));
        self.base.wrapping_add(at as usize).cast()
    }
}

/// The group as every operation sees it.
#[derive(Debug)]
pub(super) struct GroupMemory {
    /// Symmetric buffers by rank; `None` where the table has no address.
    pub(super) buffers: Vec<Option<Window>>,
    pub(super) control: Window,
    pub(super) faults: Window,
}

impl GroupMemory {
    /// # Safety
    /// As for [`Kernels::dispatch`](crate::Kernels::dispatch); `dims` is the shape of `group`.
    unsafe fn new(group: &ffi::ep_group, layout: &ffi::ep_layout, dims: &Dims) -> Self {
        // SAFETY: the table has a word per rank, and changes only between operations.
        let table: &[u64] = unsafe { array(group.peer_table, dims.ranks) };
        let buffer = |&address: &u64| {
            // SAFETY: an address in the table is a symmetric buffer of this layout.
            (address != 0).then(|| unsafe { Window::new(address, layout.bytes) })
        };
        let faults = u64::from(EP_FAULT_BYTES) * u64::from(EP_FAULT_RING);
        Self {
            buffers: table.iter().map(buffer).collect(),
            // SAFETY: the control block has these bytes.
            control: unsafe { Window::new(group.control, dims.shape.control_bytes()) },
            // SAFETY: the fault ring has these bytes.
            faults: unsafe { Window::new(group.faults, faults) },
        }
    }
}

/// What the send part of a dispatch reads and writes on its own rank.
#[derive(Debug)]
pub(super) struct DispatchSend<'a> {
    pub(super) x: &'a [u16],
    pub(super) topk_idx: &'a [i64],
    pub(super) topk_weights: Option<&'a [f32]>,
    pub(super) route: &'a mut [u32],
}

/// What the receive part of a dispatch writes.
#[derive(Debug)]
pub(super) struct DispatchRecv<'a> {
    /// Rows as bytes, of either data type.
    pub(super) recv_x: &'a mut [u8],
    /// Words of scales, of either kind; empty without FP8.
    pub(super) recv_scales: &'a mut [u32],
    pub(super) recv_count: &'a mut [i32],
    pub(super) src_info: &'a mut [i32],
    pub(super) layout_range: &'a mut [i64],
    /// `recv_count` is added to it, where it is given.
    pub(super) total_count: Option<&'a mut [i64]>,
    /// What the counts of each source took is added to it, where it is given.
    pub(super) wait_ns: Option<&'a mut [i64]>,
    pub(super) recv_map: &'a mut [u64],
    pub(super) recv_rows: &'a mut [u32],
}

/// Memory of a dispatch; the parts that were asked for.
#[derive(Debug)]
pub(super) struct DispatchMemory<'a> {
    pub(super) group: GroupMemory,
    pub(super) send: Option<DispatchSend<'a>>,
    pub(super) recv: Option<DispatchRecv<'a>>,
}

impl<'a> DispatchMemory<'a> {
    /// # Safety
    /// As for [`Kernels::dispatch`](crate::Kernels::dispatch); `dims` is the checked shape of
    /// `args`.
    pub(super) unsafe fn new(args: &'a ffi::ep_dispatch_args, dims: &Dims) -> Self {
        let has = |flag| args.flags & flag != 0;
        let (rows, entries) = (dims.rows(), dims.tokens * dims.top_k);
        let row_bytes = dims.hidden * if has(EP_DISPATCH_FP8) { 1 } else { 2 };
        let scales = match (has(EP_DISPATCH_FP8), has(EP_DISPATCH_UE8M0)) {
            (false, _) => 0,
            (true, false) => rows * (dims.hidden / SCALE_BLOCK),
            (true, true) => rows * dims.hidden.div_ceil(4 * SCALE_BLOCK),
        };
        Self {
            // SAFETY: the caller's promise.
            group: unsafe { GroupMemory::new(&args.group, &args.layout, dims) },
            send: has(EP_DISPATCH_SEND).then(|| DispatchSend {
                // SAFETY: bf16 [T, H], of this rank.
                x: unsafe { array(args.x, dims.tokens * dims.hidden) },
                // SAFETY: i64 [T, K], of this rank.
                topk_idx: unsafe { array(args.topk_idx, entries) },
                topk_weights: has(EP_DISPATCH_WEIGHTS).then(|| {
                    // SAFETY: f32 [T, K], of this rank.
                    unsafe { array(args.topk_weights, entries) }
                }),
                // SAFETY: u32 [M, max_top_k], written by this call alone.
                route: unsafe { array_mut(args.handle.route, dims.tokens * dims.max_top_k) },
            }),
            recv: has(EP_DISPATCH_RECV).then(|| DispatchRecv {
                // SAFETY: [L, R*M, H] of the data type, written by this call alone.
                recv_x: unsafe { array_mut(args.recv_x, rows * row_bytes) },
                // SAFETY: one word per scale or four, written by this call alone.
                recv_scales: unsafe { array_mut(args.recv_scales, scales) },
                // SAFETY: i32 [L], written by this call alone.
                recv_count: unsafe { array_mut(args.recv_count, dims.local_experts) },
                // SAFETY: i32 [L, R*M], written by this call alone.
                src_info: unsafe { array_mut(args.src_info, rows) },
                // SAFETY: i64 [L, R], written by this call alone.
                layout_range: unsafe {
                    array_mut(args.layout_range, dims.local_experts * dims.ranks)
                },
                total_count: (args.total_count != 0).then(|| {
                    // SAFETY: i64 [L], read and written by this call alone.
                    unsafe { array_mut(args.total_count, dims.local_experts) }
                }),
                wait_ns: (args.wait_ns != 0).then(|| {
                    // SAFETY: i64 [R], read and written by this call alone.
                    unsafe { array_mut(args.wait_ns, dims.ranks) }
                }),
                // SAFETY: u64 [R, M, 1 + max_top_k], written by this call alone.
                recv_map: unsafe {
                    array_mut(
                        args.handle.recv_map,
                        dims.rows_per_expert() * dims.map_words(),
                    )
                },
                // SAFETY: u32 [R], written by this call alone.
                recv_rows: unsafe { array_mut(args.handle.recv_rows, dims.ranks) },
            }),
        }
    }
}

/// Weights that come with the combine.
#[derive(Debug)]
pub(super) struct GivenWeights<'a> {
    pub(super) topk_weights: &'a [f32],
    pub(super) route: &'a [u32],
}

/// What the send part of a combine reads on its own rank.
#[derive(Debug)]
pub(super) struct CombineSend<'a> {
    pub(super) y: &'a [u16],
    pub(super) recv_map: &'a [u64],
    pub(super) recv_rows: &'a [u32],
    pub(super) weights: Option<GivenWeights<'a>>,
}

/// What the receive part of a combine reads and writes on its own rank.
#[derive(Debug)]
pub(super) struct CombineRecv<'a> {
    pub(super) route: &'a [u32],
    pub(super) out: &'a mut [u16],
}

/// Memory of a combine; the parts that were asked for.
#[derive(Debug)]
pub(super) struct CombineMemory<'a> {
    pub(super) group: GroupMemory,
    pub(super) send: Option<CombineSend<'a>>,
    pub(super) recv: Option<CombineRecv<'a>>,
}

impl<'a> CombineMemory<'a> {
    /// # Safety
    /// As for [`Kernels::combine`](crate::Kernels::combine); `dims` is the checked shape of `args`.
    pub(super) unsafe fn new(args: &'a ffi::ep_combine_args, dims: &Dims) -> Self {
        let has = |flag| args.flags & flag != 0;
        let route = || {
            // SAFETY: u32 [M, max_top_k], written by the dispatch and only read since.
            unsafe { array(args.handle.route, dims.tokens * dims.max_top_k) }
        };
        Self {
            // SAFETY: the caller's promise.
            group: unsafe { GroupMemory::new(&args.group, &args.layout, dims) },
            send: has(EP_COMBINE_SEND).then(|| CombineSend {
                // SAFETY: bf16 [L, R*M, H], of this rank.
                y: unsafe { array(args.y, dims.rows() * dims.hidden) },
                // SAFETY: u64 [R, M, 1 + max_top_k], written by the dispatch.
                recv_map: unsafe {
                    array(
                        args.handle.recv_map,
                        dims.rows_per_expert() * dims.map_words(),
                    )
                },
                // SAFETY: u32 [R], written by the dispatch.
                recv_rows: unsafe { array(args.handle.recv_rows, dims.ranks) },
                weights: has(EP_COMBINE_WEIGHTS).then(|| GivenWeights {
                    // SAFETY: f32 [T, K], of this rank.
                    topk_weights: unsafe { array(args.topk_weights, dims.tokens * dims.top_k) },
                    route: route(),
                }),
            }),
            recv: has(EP_COMBINE_RECV).then(|| CombineRecv {
                route: route(),
                // SAFETY: bf16 [T, H], written by this call alone.
                out: unsafe { array_mut(args.out, dims.tokens * dims.hidden) },
            }),
        }
    }
}

/// Memory of a barrier.
#[derive(Debug)]
pub(super) struct BarrierMemory {
    pub(super) group: GroupMemory,
}

impl BarrierMemory {
    /// # Safety
    /// As for [`Kernels::barrier`](crate::Kernels::barrier); `dims` is the checked shape of `args`.
    pub(super) unsafe fn new(args: &ffi::ep_barrier_args, dims: &Dims) -> Self {
        // SAFETY: the caller's promise.
        let group = unsafe { GroupMemory::new(&args.group, &args.layout, dims) };
        Self { group }
    }
}

/// # Safety
/// Unless `len` is 0, `address` is that of `len` numbers, aligned, which nobody writes during `'a`.
unsafe fn array<'a, T>(address: u64, len: usize) -> &'a [T] {
    if len == 0 {
        return &[];
    }
    // SAFETY: the caller's promise, which is that of this function.
    unsafe { slice::from_raw_parts(ptr::with_exposed_provenance(address as usize), len) }
}

/// # Safety
/// Unless `len` is 0, `address` is that of `len` numbers, aligned, which nobody else reads or writes
/// during `'a`.
unsafe fn array_mut<'a, T>(address: u64, len: usize) -> &'a mut [T] {
    if len == 0 {
        return &mut [];
    }
    // SAFETY: the caller's promise, which is that of this function.
    unsafe { slice::from_raw_parts_mut(ptr::with_exposed_provenance_mut(address as usize), len) }
}
