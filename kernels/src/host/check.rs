//! What a launch refuses: arguments of another version, shapes outside the limits, missing memory.

use std::mem::size_of;

use crate::ffi::{
    self, EP_COMBINE_RECV, EP_COMBINE_SEND, EP_COMBINE_WEIGHTS, EP_DISPATCH_FP8, EP_DISPATCH_POW2,
    EP_DISPATCH_RECV, EP_DISPATCH_SEND, EP_DISPATCH_UE8M0, EP_DISPATCH_WEIGHTS,
};
use crate::{Layout, Shape};

/// A shape within the limits of the contract.
#[derive(Clone, Copy, Debug)]
pub(super) struct Dims {
    pub(super) shape: Shape,
    pub(super) rank: usize,
    pub(super) ranks: usize,
    pub(super) experts: usize,
    pub(super) local_experts: usize,
    pub(super) max_tokens: usize,
    pub(super) hidden: usize,
    pub(super) max_top_k: usize,
    /// Tokens of this rank, of the handle.
    pub(super) tokens: usize,
    /// Experts per token, of the handle.
    pub(super) top_k: usize,
    /// Slot of the handle.
    pub(super) slot: usize,
}

impl Dims {
    /// Rows of one local expert in the output.
    pub(super) fn rows_per_expert(&self) -> usize {
        self.ranks * self.max_tokens
    }

    /// Rows of all local experts.
    pub(super) fn rows(&self) -> usize {
        self.local_experts * self.rows_per_expert()
    }

    /// Words of one row's entry in `recv_map`.
    pub(super) fn map_words(&self) -> usize {
        1 + self.max_top_k
    }

    /// Checks the part that all operations have in common.
    fn new(group: &ffi::ep_group, layout: &ffi::ep_layout) -> Option<Self> {
        let shape = Shape {
            num_ranks: group.num_ranks,
            num_experts: group.num_experts,
            max_tokens: group.max_tokens,
            hidden: group.hidden,
            max_top_k: group.max_top_k,
            slots: layout.slots,
            sends_in_flight: layout.ring / 2,
        };
        let expected = Layout::new(&shape).ok()?.raw();
        let addressable = [group.peer_table, group.control, group.faults].map(aligned::<u64>);
        let usable = layout_fields(&expected) == layout_fields(layout)
            && group.rank < group.num_ranks
            && group.timeout_ns > 0
            && addressable == [true; 3];
        usable.then_some(Self {
            shape,
            rank: group.rank as usize,
            ranks: group.num_ranks as usize,
            experts: group.num_experts as usize,
            local_experts: shape.local_experts() as usize,
            max_tokens: group.max_tokens as usize,
            hidden: group.hidden as usize,
            max_top_k: group.max_top_k as usize,
            tokens: 0,
            top_k: 0,
            slot: 0,
        })
    }

    /// Adds what the handle says.
    fn of_handle(self, handle: &ffi::ep_handle, layout: &ffi::ep_layout) -> Option<Self> {
        let dims = Self {
            tokens: handle.num_tokens as usize,
            top_k: handle.top_k as usize,
            slot: handle.slot as usize,
            ..self
        };
        let fits = dims.tokens <= dims.max_tokens
            && (1..=dims.max_top_k).contains(&dims.top_k)
            && handle.slot < layout.slots
            && aligned::<u32>(handle.route)
            && aligned::<u64>(handle.recv_map)
            && aligned::<u32>(handle.recv_rows);
        fits.then_some(dims)
    }

    /// Whether the address of an array with a row per token can be followed.
    fn per_token<T>(&self, address: u64) -> bool {
        self.tokens == 0 || aligned::<T>(address)
    }
}

/// The shape of a dispatch that can be run.
pub(super) fn dispatch(args: &ffi::ep_dispatch_args) -> Option<Dims> {
    const FP8: u32 = EP_DISPATCH_FP8;
    const POW2: u32 = FP8 | EP_DISPATCH_POW2;
    const UE8M0: u32 = POW2 | EP_DISPATCH_UE8M0;
    const PARTS: u32 = EP_DISPATCH_SEND | EP_DISPATCH_RECV;
    if args.struct_size as usize != size_of::<ffi::ep_dispatch_args>() {
        return None;
    }
    let dims = Dims::new(&args.group, &args.layout)?.of_handle(&args.handle, &args.layout)?;
    let has = |flags| args.flags & flags == flags;
    let known = args.flags & !(UE8M0 | PARTS | EP_DISPATCH_WEIGHTS) == 0
        && args.flags & PARTS != 0
        && matches!(args.flags & UE8M0, 0 | FP8 | POW2 | UE8M0);
    let weights = !has(EP_DISPATCH_WEIGHTS) || dims.per_token::<f32>(args.topk_weights);
    let send = !has(EP_DISPATCH_SEND)
        || dims.per_token::<u16>(args.x) && dims.per_token::<i64>(args.topk_idx);
    let recv = !has(EP_DISPATCH_RECV)
        || aligned::<u16>(args.recv_x)
            && (!has(FP8) || aligned::<u32>(args.recv_scales))
            && aligned::<i32>(args.recv_count)
            && aligned::<i32>(args.src_info)
            && aligned::<i64>(args.layout_range)
            && absent_or_aligned::<i64>(args.total_count)
            && absent_or_aligned::<i64>(args.wait_ns);
    (known && weights && send && recv).then_some(dims)
}

/// The shape of a combine that can be run.
pub(super) fn combine(args: &ffi::ep_combine_args) -> Option<Dims> {
    const PARTS: u32 = EP_COMBINE_SEND | EP_COMBINE_RECV;
    if args.struct_size as usize != size_of::<ffi::ep_combine_args>() {
        return None;
    }
    let dims = Dims::new(&args.group, &args.layout)?.of_handle(&args.handle, &args.layout)?;
    let has = |flag| args.flags & flag != 0;
    let known = args.flags & !(PARTS | EP_COMBINE_WEIGHTS) == 0 && has(PARTS);
    let weights = !has(EP_COMBINE_WEIGHTS) || dims.per_token::<f32>(args.topk_weights);
    let send = !has(EP_COMBINE_SEND) || aligned::<u16>(args.y);
    let recv = !has(EP_COMBINE_RECV) || dims.per_token::<u16>(args.out);
    (known && weights && send && recv).then_some(dims)
}

/// The shape of a barrier that can be run.
pub(super) fn barrier(args: &ffi::ep_barrier_args) -> Option<Dims> {
    (args.struct_size as usize == size_of::<ffi::ep_barrier_args>())
        .then(|| Dims::new(&args.group, &args.layout))?
}

/// Whether an address is not null and aligned for `T`.
fn aligned<T>(address: u64) -> bool {
    address != 0 && address.is_multiple_of(align_of::<T>() as u64)
}

/// Whether the address of an array that may be left out can be followed.
fn absent_or_aligned<T>(address: u64) -> bool {
    address == 0 || aligned::<T>(address)
}

/// A layout as values that compare.
fn layout_fields(layout: &ffi::ep_layout) -> [u64; 21] {
    let ffi::ep_layout {
        counts,
        counts_source_stride,
        counts_ring_stride,
        rows,
        row_stride,
        rows_source_stride,
        rows_ring_stride,
        weights,
        weight_stride,
        weights_source_stride,
        weights_slot_stride,
        partials,
        partial_stride,
        partials_source_stride,
        partials_slot_stride,
        barrier,
        bytes,
        ring,
        slots,
        header_lines,
        weight_lines,
    } = *layout;
    [
        counts,
        counts_source_stride,
        counts_ring_stride,
        rows,
        row_stride,
        rows_source_stride,
        rows_ring_stride,
        weights,
        weight_stride,
        weights_source_stride,
        weights_slot_stride,
        partials,
        partial_stride,
        partials_source_stride,
        partials_slot_stride,
        barrier,
        bytes,
        ring.into(),
        slots.into(),
        header_lines.into(),
        weight_lines.into(),
    ]
}
