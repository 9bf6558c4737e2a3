//! A group of ranks in this process: their memory, and calls of the kernels that the test
//! binary names (`crate::kernels`) on it.

#![allow(
    unsafe_code,
    reason = "the contract's calls are unsafe; the memory behind them is here"
)]
#![allow(
    dead_code,
    reason = "shared by several test binaries, each of which uses a part"
)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ep_kernels::{Kernels, LaunchError, Layout, Shape, ffi};

use crate::common::{BadEntry, Case, DispatchOutput, Input, Precision, Weights};

/// What outputs hold before an operation.
pub(crate) const POISON: u8 = 0xa5;

/// Words that kernels write through their addresses while others read them, with guards around.
#[derive(Debug)]
pub(crate) struct Memory {
    words: Box<[AtomicU64]>,
    bytes: usize,
}

impl Memory {
    const GUARD_WORDS: usize = 16;
    const GUARD: u64 = 0xfeed_f00d_dead_beef;

    /// Zeroed memory.
    pub(crate) fn new(bytes: u64) -> Self {
        Self::filled(bytes as usize, 0)
    }

    pub(crate) fn filled(bytes: usize, byte: u8) -> Self {
        let guards = || std::iter::repeat_n(Self::GUARD, Self::GUARD_WORDS);
        let words = std::iter::repeat_n(u64::from_le_bytes([byte; 8]), bytes.div_ceil(8));
        Self {
            words: guards()
                .chain(words)
                .chain(guards())
                .map(AtomicU64::new)
                .collect(),
            bytes,
        }
    }

    pub(crate) fn poisoned(bytes: usize) -> Self {
        Self::filled(bytes, POISON)
    }

    pub(crate) fn of<const N: usize, T: Copy>(
        values: &[T],
        to_bytes: impl Fn(T) -> [u8; N],
    ) -> Self {
        let memory = Self::filled(values.len() * N, 0);
        let mut bytes: Vec<u8> = values.iter().flat_map(|&value| to_bytes(value)).collect();
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        for (word, chunk) in memory.inner().iter().zip(bytes.chunks_exact(8)) {
            word.store(
                u64::from_le_bytes(chunk.try_into().unwrap()),
                Ordering::Relaxed,
            );
        }
        memory
    }

    fn inner(&self) -> &[AtomicU64] {
        &self.words[Self::GUARD_WORDS..self.words.len() - Self::GUARD_WORDS]
    }

    pub(crate) fn address(&self) -> u64 {
        self.inner().as_ptr().expose_provenance() as u64
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn word(&self, at: u64) -> u64 {
        self.inner()[at as usize / 8].load(Ordering::Acquire)
    }

    pub(crate) fn set_word(&self, at: u64, value: u64) {
        self.inner()[at as usize / 8].store(value, Ordering::Release);
    }

    pub(crate) fn fill(&self, byte: u8) {
        for word in self.inner() {
            word.store(u64::from_le_bytes([byte; 8]), Ordering::Relaxed);
        }
    }

    pub(crate) fn values<const N: usize, T>(&self, from_bytes: impl Fn([u8; N]) -> T) -> Vec<T> {
        let mut bytes = Vec::with_capacity(self.inner().len() * 8);
        for word in self.inner() {
            bytes.extend_from_slice(&word.load(Ordering::Relaxed).to_le_bytes());
        }
        bytes.truncate(self.bytes);
        bytes
            .chunks_exact(N)
            .map(|value| from_bytes(value.try_into().unwrap()))
            .collect()
    }

    /// Whether nothing was written around it.
    pub(crate) fn intact(&self) -> bool {
        let (front, back) = (
            &self.words[..Self::GUARD_WORDS],
            self.words.len() - Self::GUARD_WORDS,
        );
        front
            .iter()
            .chain(&self.words[back..])
            .all(|w| w.load(Ordering::Relaxed) == Self::GUARD)
    }
}

/// What one rank has for the life of a buffer.
#[derive(Debug)]
pub(crate) struct Rank {
    pub(crate) rank: usize,
    pub(crate) symmetric: Memory,
    pub(crate) table: Memory,
    pub(crate) control: Memory,
    pub(crate) faults: Memory,
    /// `route`, `recv_map` and `recv_rows` of each slot.
    pub(crate) handles: Vec<[Memory; 3]>,
    pub(crate) outputs: Vec<Outputs>,
}

/// Outputs of dispatch, one set per slot.
#[derive(Debug)]
pub(crate) struct Outputs {
    pub(crate) recv_x: Memory,
    pub(crate) recv_scales: Memory,
    pub(crate) recv_count: Memory,
    pub(crate) src_info: Memory,
    pub(crate) layout_range: Memory,
}

impl Outputs {
    fn new(shape: &Shape, precision: Precision) -> Self {
        let local = shape.local_experts() as usize;
        let rows = local * shape.rows_per_expert() as usize;
        let hidden = shape.hidden as usize;
        Self {
            recv_x: Memory::poisoned(rows * hidden * precision.bytes()),
            recv_scales: Memory::poisoned(rows * precision.scale_words(hidden) * 4),
            recv_count: Memory::poisoned(local * 4),
            src_info: Memory::poisoned(rows * 4),
            layout_range: Memory::poisoned(local * shape.num_ranks as usize * 8),
        }
    }

    fn all(&self) -> [&Memory; 5] {
        [
            &self.recv_x,
            &self.recv_scales,
            &self.recv_count,
            &self.src_info,
            &self.layout_range,
        ]
    }

    pub(crate) fn poison(&self) {
        self.all()
            .into_iter()
            .for_each(|memory| memory.fill(POISON));
    }

    pub(crate) fn intact(&self) -> bool {
        self.all().into_iter().all(Memory::intact)
    }
}

/// Ranks with their buffers connected.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) shape: Shape,
    pub(crate) layout: ffi::ep_layout,
    pub(crate) ranks: Vec<Rank>,
    pub(crate) timeout: Duration,
    pub(crate) case: Case,
}

/// Inputs of a rank's operation, where kernels can read them.
#[derive(Debug)]
pub(crate) struct Tensors {
    pub(crate) tokens: u32,
    pub(crate) x: Memory,
    pub(crate) topk_idx: Memory,
    pub(crate) topk_weights: Memory,
}

impl Tensors {
    pub(crate) fn new(input: &Input) -> Self {
        Self {
            tokens: input.tokens as u32,
            x: Memory::of(&input.x, u16::to_le_bytes),
            topk_idx: Memory::of(&input.topk_idx, i64::to_le_bytes),
            topk_weights: Memory::of(&input.topk_weights, f32::to_le_bytes),
        }
    }
}

/// A record of the fault ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) sequence: u64,
    pub(crate) epoch: u64,
    pub(crate) fault: u32,
    pub(crate) op: u32,
    pub(crate) phase: u32,
    pub(crate) peer: u32,
    pub(crate) token: u64,
    pub(crate) value: i64,
}

impl World {
    pub(crate) fn new(case: &Case, slots: u32, sends_in_flight: u32, timeout: Duration) -> Self {
        // Room for more top-k than the case has, as a buffer may be made for.
        let max_top_k = (case.top_k as u32 + 1).min(ffi::EP_MAX_TOP_K);
        let shape = Shape {
            num_ranks: case.ranks as u32,
            num_experts: case.experts as u32,
            max_tokens: case.max_tokens as u32,
            hidden: case.hidden as u32,
            max_top_k,
            slots,
            sends_in_flight,
        };
        let layout = Layout::new(&shape).unwrap();
        let ranks: Vec<Rank> = (0..case.ranks)
            .map(|rank| {
                let control = Memory::new(shape.control_bytes());
                let active = Memory::of(&vec![1; case.ranks], u32::to_le_bytes);
                for at in (0..4 * case.ranks as u64).step_by(8) {
                    control.set_word(at, active.word(at));
                }
                Rank {
                    rank,
                    symmetric: Memory::new(layout.bytes()),
                    table: Memory::new(8 * case.ranks as u64),
                    control,
                    faults: Memory::new((ffi::EP_FAULT_BYTES * ffi::EP_FAULT_RING).into()),
                    handles: (0..slots)
                        .map(|_| shape.handle_bytes().map(|n| Memory::poisoned(n as usize)))
                        .collect(),
                    outputs: (0..slots)
                        .map(|_| Outputs::new(&shape, case.precision))
                        .collect(),
                }
            })
            .collect();
        for (rank, peer) in ranks.iter().flat_map(|a| ranks.iter().map(move |b| (a, b))) {
            rank.table
                .set_word(8 * peer.rank as u64, peer.symmetric.address());
        }
        Self {
            shape,
            layout: layout.raw(),
            ranks,
            timeout,
            case: case.clone(),
        }
    }

    /// Takes the way between two ranks away.
    pub(crate) fn cut(&self, a: usize, b: usize) {
        self.ranks[a].table.set_word(8 * b as u64, 0);
        self.ranks[b].table.set_word(8 * a as u64, 0);
    }

    /// Calls off what a rank runs and will run.
    pub(crate) fn abort(&self, rank: usize) {
        let control = &self.ranks[rank].control;
        for at in self.shape.control_waits() {
            control.set_word(at, ffi::EP_ABORTED.into());
            control.set_word(at + 8, ffi::EP_ABORTED.into());
        }
    }

    /// Sets whether `rank` counts `peer` in.
    pub(crate) fn set_active(&self, rank: usize, peer: usize, active: bool) {
        let (at, shift) = (4 * peer as u64 / 8 * 8, peer % 2 * 32);
        let control = &self.ranks[rank].control;
        let others = control.word(at) & !(0xffff_ffff << shift);
        control.set_word(at, others | u64::from(active) << shift);
    }

    pub(crate) fn group(&self, rank: usize) -> ffi::ep_group {
        let memory = &self.ranks[rank];
        ffi::ep_group {
            peer_table: memory.table.address(),
            control: memory.control.address(),
            faults: memory.faults.address(),
            timeout_ns: self.timeout.as_nanos() as u64,
            rank: rank as u32,
            num_ranks: self.shape.num_ranks,
            num_experts: self.shape.num_experts,
            max_tokens: self.shape.max_tokens,
            hidden: self.shape.hidden,
            max_top_k: self.shape.max_top_k,
            device: -1,
            num_sms: 0,
        }
    }

    fn handle(&self, rank: usize, slot: usize, tokens: u32) -> ffi::ep_handle {
        let [route, recv_map, recv_rows] = &self.ranks[rank].handles[slot];
        ffi::ep_handle {
            route: route.address(),
            recv_map: recv_map.address(),
            recv_rows: recv_rows.address(),
            slot: slot as u32,
            num_tokens: tokens,
            top_k: self.case.top_k as u32,
            reserved: 0,
        }
    }

    pub(crate) fn dispatch_args(
        &self,
        rank: usize,
        slot: usize,
        tensors: &Tensors,
        parts: u32,
    ) -> ffi::ep_dispatch_args {
        let outputs = &self.ranks[rank].outputs[slot];
        let weights = self.case.weights == Weights::AtDispatch;
        let mut flags = parts;
        flags |= if weights { ffi::EP_DISPATCH_WEIGHTS } else { 0 };
        flags |= match self.case.precision {
            Precision::Bf16 => 0,
            Precision::Fp8 => ffi::EP_DISPATCH_FP8,
            Precision::Fp8Pow2 => ffi::EP_DISPATCH_FP8 | ffi::EP_DISPATCH_POW2,
            Precision::Fp8Ue8m0 => {
                ffi::EP_DISPATCH_FP8 | ffi::EP_DISPATCH_POW2 | ffi::EP_DISPATCH_UE8M0
            }
        };
        ffi::ep_dispatch_args {
            struct_size: size_of::<ffi::ep_dispatch_args>() as u32,
            flags,
            group: self.group(rank),
            layout: self.layout,
            handle: self.handle(rank, slot, tensors.tokens),
            x: tensors.x.address(),
            topk_idx: tensors.topk_idx.address(),
            topk_weights: if weights {
                tensors.topk_weights.address()
            } else {
                0
            },
            recv_x: outputs.recv_x.address(),
            recv_scales: outputs.recv_scales.address(),
            recv_count: outputs.recv_count.address(),
            src_info: outputs.src_info.address(),
            layout_range: outputs.layout_range.address(),
            total_count: 0,
            wait_ns: 0,
        }
    }

    pub(crate) fn combine_args(
        &self,
        rank: usize,
        slot: usize,
        tensors: &Tensors,
        y: &Memory,
        out: &Memory,
        parts: u32,
    ) -> ffi::ep_combine_args {
        let weights = self.case.weights == Weights::AtCombine;
        ffi::ep_combine_args {
            struct_size: size_of::<ffi::ep_combine_args>() as u32,
            flags: parts | if weights { ffi::EP_COMBINE_WEIGHTS } else { 0 },
            group: self.group(rank),
            layout: self.layout,
            handle: self.handle(rank, slot, tensors.tokens),
            y: y.address(),
            topk_weights: if weights {
                tensors.topk_weights.address()
            } else {
                0
            },
            out: out.address(),
        }
    }

    pub(crate) fn barrier_args(&self, rank: usize, spin_ns: u64) -> ffi::ep_barrier_args {
        ffi::ep_barrier_args {
            struct_size: size_of::<ffi::ep_barrier_args>() as u32,
            reserved: 0,
            group: self.group(rank),
            layout: self.layout,
            spin_ns,
        }
    }

    /// Where a row of a source stands in every buffer in an operation.
    pub(crate) fn row(&self, epoch: u64, source: usize, slot: usize) -> u64 {
        let layout = &self.layout;
        layout.rows
            + epoch % u64::from(layout.ring) * layout.rows_ring_stride
            + source as u64 * layout.rows_source_stride
            + slot as u64 * layout.row_stride
    }

    /// Where a packet of a source's counts stands in every buffer in an operation: 0 tells its rows.
    pub(crate) fn packet(&self, epoch: u64, source: usize, packet: usize) -> u64 {
        let layout = &self.layout;
        layout.counts
            + epoch % u64::from(layout.ring) * layout.counts_ring_stride
            + source as u64 * layout.counts_source_stride
            + 8 * packet as u64
    }

    /// Makes lines of a rank's buffer, all that are written at a time, those of an epoch.
    pub(crate) fn set_epoch(&self, rank: usize, from: u64, bytes: u64, epoch: u64) {
        let buffer = &self.ranks[rank].symmetric;
        if !crate::EVERY_LINE_HAS_AN_EPOCH {
            return buffer.set_word(from, epoch);
        }
        for line in (from..from + bytes).step_by(ffi::EP_LINE_BYTES as usize) {
            buffer.set_word(line + u64::from(ffi::EP_LINE_DATA_BYTES), epoch);
        }
    }

    /// Writes a row to a rank's buffer as its source would, but with any header.
    pub(crate) fn put_row(
        &self,
        rank: usize,
        (epoch, source, slot): (u64, usize, usize),
        header: &[u64],
    ) {
        let row = self.row(epoch, source, slot);
        for (word, i) in header.iter().zip(0..) {
            let at = if crate::EVERY_LINE_HAS_AN_EPOCH {
                8 * (i + i / 15)
            } else {
                8 * (i + 1)
            };
            self.ranks[rank].symmetric.set_word(row + at, *word);
        }
        self.set_epoch(rank, row, self.layout.row_stride, epoch);
    }

    /// The rows from each source that a slot's dispatch left for its combine.
    pub(crate) fn rows_from_sources(&self, rank: usize, slot: usize) -> Vec<u32> {
        let mut rows = self.ranks[rank].handles[slot][2].values(u32::from_le_bytes);
        let given_up = |rows: &&mut u32| **rows & ffi::EP_ROWS_GIVEN_UP != 0;
        rows.iter_mut().filter(given_up).for_each(|rows| *rows = 0);
        rows
    }

    /// What a slot's dispatch gave a rank.
    pub(crate) fn with_output<T>(
        &self,
        rank: usize,
        slot: usize,
        check: impl FnOnce(&DispatchOutput<'_>) -> T,
    ) -> T {
        let outputs = &self.ranks[rank].outputs[slot];
        check(&DispatchOutput {
            recv_x: &outputs.recv_x.values(u8::from_le_bytes),
            recv_scales: &outputs.recv_scales.values(u32::from_le_bytes),
            recv_count: &outputs.recv_count.values(i32::from_le_bytes),
            src_info: &outputs.src_info.values(i32::from_le_bytes),
            layout_range: &outputs.layout_range.values(i64::from_le_bytes),
        })
    }

    /// Records of a rank's fault ring, oldest first.
    pub(crate) fn faults(&self, rank: usize) -> Vec<Fault> {
        let words = self.ranks[rank].faults.values(u64::from_le_bytes);
        let mut faults: Vec<Fault> = words
            .chunks_exact(6)
            .filter(|record| record[0] != 0)
            .map(|record| Fault {
                sequence: record[0],
                epoch: record[1],
                fault: record[2] as u32,
                op: (record[2] >> 32) as u32,
                phase: record[3] as u32,
                peer: (record[3] >> 32) as u32,
                token: record[4],
                value: record[5] as i64,
            })
            .collect();
        faults.sort_by_key(|fault| fault.sequence);
        faults
    }

    /// Faults of a rank that are not bad entries.
    pub(crate) fn waits_given_up(&self, rank: usize) -> Vec<Fault> {
        let mut faults = self.faults(rank);
        faults.retain(|fault| {
            !matches!(
                fault.fault,
                ffi::EP_FAULT_EXPERT_RANGE | ffi::EP_FAULT_EXPERT_REPEATED
            )
        });
        faults
    }

    pub(crate) fn clear_faults(&self) {
        self.ranks.iter().for_each(|rank| rank.faults.fill(0));
    }

    /// Whether no memory of any rank was written beyond its ends.
    pub(crate) fn intact(&self) -> bool {
        self.ranks.iter().all(|rank| {
            [&rank.symmetric, &rank.table, &rank.control, &rank.faults]
                .into_iter()
                .chain(rank.handles.iter().flatten())
                .all(Memory::intact)
                && rank.outputs.iter().all(Outputs::intact)
        })
    }
}

/// Bad entries among the records of one operation, sorted.
pub(crate) fn bad_entries(faults: &[Fault], rank: usize, epoch: u64) -> Vec<BadEntry> {
    let mut bad: Vec<BadEntry> = faults
        .iter()
        .filter(|fault| (fault.op, fault.epoch) == (ffi::EP_OP_DISPATCH, epoch))
        .filter_map(|fault| {
            let (token, id) = (fault.token, fault.value);
            let entry = match fault.fault {
                ffi::EP_FAULT_EXPERT_RANGE => BadEntry::Range { token, id },
                ffi::EP_FAULT_EXPERT_REPEATED => BadEntry::Repeated { token, id },
                _ => return None,
            };
            assert_eq!((fault.peer, fault.phase), (rank as u32, ffi::EP_PHASE_SEND));
            Some(entry)
        })
        .collect();
    bad.sort();
    bad
}

pub(crate) fn dispatch(args: &ffi::ep_dispatch_args) -> Result<(), LaunchError> {
    // SAFETY: the addresses are those of memory in the tests' worlds, which outlive the call.
    unsafe { crate::kernels().dispatch(args, 0) }
}

pub(crate) fn combine(args: &ffi::ep_combine_args) -> Result<(), LaunchError> {
    // SAFETY: the addresses are those of memory in the tests' worlds, which outlive the call.
    unsafe { crate::kernels().combine(args, 0) }
}

pub(crate) fn barrier(args: &ffi::ep_barrier_args) -> Result<(), LaunchError> {
    // SAFETY: the addresses are those of memory in the tests' worlds, which outlive the call.
    unsafe { crate::kernels().barrier(args, 0) }
}
