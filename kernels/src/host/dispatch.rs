//! Dispatch: tokens to the ranks of their experts, and from there to the experts' rows.

use std::iter;

use super::check::Dims;
use super::group::{Counter, Fault, Group, Part, Peer, Progress};
use super::memory::{DispatchMemory, DispatchRecv, DispatchSend, Window};
use super::wire::{self, Entry, NO_ROUTE, pair, unpair};
use crate::ffi::{
    EP_DISPATCH_FP8, EP_DISPATCH_POW2, EP_DISPATCH_UE8M0, EP_FAULT_EXPERT_RANGE,
    EP_FAULT_EXPERT_REPEATED, EP_MAX_TOP_K, EP_PHASE_COUNTS, EP_PHASE_ROWS, EP_PHASE_SEND,
    ep_dispatch_args,
};
use crate::numerics::{SCALE_BLOCK, ScaleRounding, quantize_block, ue8m0};

/// How rows travel and how their scales are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Bf16,
    Fp8 {
        rounding: ScaleRounding,
        packed: bool,
    },
}

impl Format {
    fn of(flags: u32) -> Self {
        let has = |flag| flags & flag != 0;
        let rounding = if has(EP_DISPATCH_POW2) {
            ScaleRounding::PowerOfTwo
        } else {
            ScaleRounding::Exact
        };
        if has(EP_DISPATCH_FP8) {
            Self::Fp8 {
                rounding,
                packed: has(EP_DISPATCH_UE8M0),
            }
        } else {
            Self::Bf16
        }
    }
}

pub(super) fn run(args: &ep_dispatch_args, dims: &Dims, memory: DispatchMemory<'_>) {
    let group = Group::new(&args.group, &args.layout, dims, memory.group);
    let format = Format::of(args.flags);
    if let Some(mut memory) = memory.send {
        send(&group.begin(Counter::DispatchSend), format, &mut memory);
    }
    if let Some(mut memory) = memory.recv {
        receive(&group.begin(Counter::DispatchRecv), format, &mut memory);
    }
}

fn send(part: &Part<'_>, format: Format, memory: &mut DispatchSend<'_>) {
    let (group, dims) = (part.group, part.group.dims);
    let plan = Plan::new(part, memory);
    for (owner, window) in group.present() {
        let experts = owner * dims.local_experts..(owner + 1) * dims.local_experts;
        let counts = [plan.rows[owner]]
            .into_iter()
            .chain(plan.tokens[experts].iter().copied());
        let first = group.regions.counts(part.epoch, dims.rank);
        for (count, at) in counts.zip((first..).step_by(8)) {
            window.publish(at, pair(count, part.epoch as u32));
        }
    }

    let mut fp8 = Fp8Row::new(dims.hidden);
    let mut header = [0; 1 + EP_MAX_TOP_K as usize];
    for entries in plan.entries.chunk_by(|a, b| a.token == b.token) {
        let token = entries[0].token;
        let x = &memory.x[token * dims.hidden..][..dims.hidden];
        if let Format::Fp8 { rounding, .. } = format {
            fp8.quantize(x, rounding);
        }
        for (i, first) in entries.iter().enumerate() {
            if entries[..i].iter().any(|entry| entry.owner == first.owner) {
                continue;
            }
            let Peer::Present(window) = group.peer(first.owner) else {
                continue;
            };
            let mut words = 1;
            for routed in entries[i..]
                .iter()
                .filter(|entry| entry.owner == first.owner)
            {
                header[words] = routed.entry.pack();
                words += 1;
            }
            header[0] = pair(token as u32, words as u32 - 1);
            let row = group.regions.row(part.epoch, dims.rank, first.slot);
            let payload = group.regions.payload(row);
            part.push(window, row, |window| {
                window.write(row.data(), &header[..words]);
                match format {
                    Format::Bf16 => window.write(payload, x),
                    Format::Fp8 { .. } => {
                        window.write(payload, &fp8.codes);
                        window.write(payload + dims.hidden as u64, &fp8.scales);
                    }
                }
            });
        }
    }
}

/// A token's way to one expert.
#[derive(Clone, Copy, Debug)]
struct Routed {
    token: usize,
    owner: usize,
    /// Which of the rows for this owner it is.
    slot: usize,
    entry: Entry,
}

/// Where everything goes, known before anything is sent.
#[derive(Debug)]
struct Plan {
    /// Tokens ascending, then top-k order.
    entries: Vec<Routed>,
    /// Rows per rank.
    rows: Vec<u32>,
    /// Tokens per expert.
    tokens: Vec<u32>,
}

impl Plan {
    /// Reads the expert ids, fills `route`, and reports the ids that are none.
    fn new(part: &Part<'_>, memory: &mut DispatchSend<'_>) -> Self {
        let (group, dims) = (part.group, part.group.dims);
        let mut plan = Self {
            entries: Vec::with_capacity(memory.topk_idx.len()),
            rows: vec![0; dims.ranks],
            tokens: vec![0; dims.experts],
        };
        let mut unreachable = vec![false; dims.ranks];
        memory.route.fill(NO_ROUTE);
        for token in 0..dims.tokens {
            let ids = &memory.topk_idx[token * dims.top_k..][..dims.top_k];
            let first = plan.entries.len();
            for (k, &id) in ids.iter().enumerate() {
                let bad = |fault| Fault {
                    fault,
                    phase: EP_PHASE_SEND,
                    peer: dims.rank,
                    token,
                    value: id,
                };
                if id == -1 {
                    continue;
                }
                let Some(expert) = usize::try_from(id).ok().filter(|&id| id < dims.experts) else {
                    part.report(bad(EP_FAULT_EXPERT_RANGE));
                    continue;
                };
                if ids[..k].contains(&id) {
                    part.report(bad(EP_FAULT_EXPERT_REPEATED));
                    continue;
                }
                let owner = expert / dims.local_experts;
                match group.peer(owner) {
                    Peer::Present(_) => {}
                    Peer::Masked => continue,
                    Peer::Unreachable => {
                        if !unreachable[owner] {
                            unreachable[owner] = true;
                            part.unreachable(EP_PHASE_SEND, owner, token);
                        }
                        continue;
                    }
                }
                let known = plan.entries[first..]
                    .iter()
                    .find(|entry| entry.owner == owner);
                let slot = match known {
                    Some(entry) => entry.slot,
                    None => next(&mut plan.rows[owner]) as usize,
                };
                let weights = memory.topk_weights.as_ref();
                let entry = Entry {
                    expert: (expert % dims.local_experts) as u32,
                    k: k as u32,
                    position: next(&mut plan.tokens[expert]),
                    weight: weights.map_or(1.0, |weights| weights[token * dims.top_k + k]),
                };
                plan.entries.push(Routed {
                    token,
                    owner,
                    slot,
                    entry,
                });
                memory.route[token * dims.max_top_k + k] = wire::route(owner, slot);
            }
        }
        plan
    }
}

/// Counts one more; what had been counted before.
fn next(count: &mut u32) -> u32 {
    *count += 1;
    *count - 1
}

/// A quantised token.
#[derive(Debug)]
struct Fp8Row {
    codes: Vec<u8>,
    scales: Vec<f32>,
}

impl Fp8Row {
    fn new(hidden: usize) -> Self {
        Self {
            codes: vec![0; hidden],
            scales: vec![0.0; hidden / SCALE_BLOCK],
        }
    }

    fn quantize(&mut self, x: &[u16], rounding: ScaleRounding) {
        let blocks = x
            .chunks_exact(SCALE_BLOCK)
            .zip(self.codes.chunks_exact_mut(SCALE_BLOCK));
        for ((x, codes), scale) in blocks.zip(&mut self.scales) {
            *scale = quantize_block(x, rounding, codes);
        }
    }
}

fn receive(part: &Part<'_>, format: Format, memory: &mut DispatchRecv<'_>) {
    let (group, dims) = (part.group, part.group.dims);
    let mut counts = Counts::new(dims);
    if let Some(own) = group.own() {
        counts.receive(part, own, |source, arrived| {
            if let Some(wait_ns) = &mut memory.wait_ns {
                add(&mut wait_ns[source], group.waited_ns());
            }
            if !arrived {
                part.timed_out(EP_PHASE_COUNTS, source);
            }
        });
    }
    memory.recv_rows.copy_from_slice(&counts.rows);
    let begins = counts.lay_out(dims, memory);

    let Some(own) = group.own() else { return };
    let mut rows = RowReader {
        part,
        own,
        format,
        begins: &begins,
        counts: &counts,
        scales: vec![0.0; dims.hidden / SCALE_BLOCK],
    };
    for source in 0..dims.ranks {
        let mut given_up = false;
        for slot in 0..counts.rows[source] as usize {
            if !rows.receive(source, slot, memory) && !given_up {
                given_up = true;
                part.timed_out(EP_PHASE_ROWS, source);
                // With all its rows, as on GPUs, where warps that have parts of a row do not know
                // of each other.
                memory.recv_rows[source] = 0;
            }
        }
    }
}

/// Adds to a number of the caller's, which may be any.
fn add(sum: &mut i64, value: i64) {
    *sum = sum.wrapping_add(value);
}

/// What the sources announced.
#[derive(Debug)]
struct Counts {
    /// Rows from each source.
    rows: Vec<u32>,
    /// Tokens `[source, local expert]`.
    tokens: Vec<u32>,
}

impl Counts {
    fn new(dims: &Dims) -> Self {
        Self {
            rows: vec![0; dims.ranks],
            tokens: vec![0; dims.ranks * dims.local_experts],
        }
    }

    /// Waits for the packets of all sources at once, so that a late one hides no other. Tells of each
    /// source, as soon as that is settled, whether its packets came; all or none of them count.
    fn receive(&mut self, part: &Part<'_>, own: &Window, mut settled: impl FnMut(usize, bool)) {
        let group = part.group;
        let mut pending: Vec<_> = group.present().map(|(source, _)| source).collect();
        group.wait(|| {
            pending.retain(|&source| match self.poll(part, own, source) {
                Progress::Pending => true,
                Progress::Arrived => {
                    settled(source, true);
                    false
                }
                Progress::Passed => {
                    self.forget(group.dims, source);
                    settled(source, false);
                    false
                }
            });
            if pending.is_empty() {
                Progress::Arrived
            } else {
                Progress::Pending
            }
        });
        for source in pending {
            self.forget(group.dims, source);
            settled(source, false);
        }
    }

    /// Reads the packets of a source, as far as they have come.
    fn poll(&mut self, part: &Part<'_>, own: &Window, source: usize) -> Progress {
        let (group, dims) = (part.group, part.group.dims);
        let first = group.regions.counts(part.epoch, source);
        let (rows, tokens) = self.of_source(dims, source);
        for (to, at) in iter::once(rows).chain(tokens).zip((first..).step_by(8)) {
            let (count, epoch) = unpair(own.load(at));
            match epoch.wrapping_sub(part.epoch as u32) as i32 {
                // Never beyond what the output holds, whatever the peer says.
                0 => *to = count.min(dims.max_tokens as u32),
                1.. => return Progress::Passed,
                _ => return Progress::Pending,
            }
        }
        Progress::Arrived
    }

    /// Drops what came of a source that is given up.
    fn forget(&mut self, dims: &Dims, source: usize) {
        let (rows, tokens) = self.of_source(dims, source);
        *rows = 0;
        tokens.fill(0);
    }

    fn of_source(&mut self, dims: &Dims, source: usize) -> (&mut u32, &mut [u32]) {
        let first = source * dims.local_experts;
        (
            &mut self.rows[source],
            &mut self.tokens[first..][..dims.local_experts],
        )
    }

    /// Writes counts and ranges; returns where each range begins, `[source, local expert]`.
    fn lay_out(&self, dims: &Dims, memory: &mut DispatchRecv<'_>) -> Vec<u32> {
        let mut begins = vec![0; self.tokens.len()];
        for local in 0..dims.local_experts {
            let mut begin = 0;
            for source in 0..dims.ranks {
                let at = source * dims.local_experts + local;
                let count = self.tokens[at];
                begins[at] = begin;
                memory.layout_range[local * dims.ranks + source] =
                    i64::from(begin) << 32 | i64::from(count);
                begin += count;
            }
            memory.recv_count[local] = begin as i32;
            if let Some(total_count) = &mut memory.total_count {
                add(&mut total_count[local], i64::from(begin));
            }
        }
        begins
    }
}

/// Brings rows from the wire to where they belong.
#[derive(Debug)]
struct RowReader<'r> {
    part: &'r Part<'r>,
    own: &'r Window,
    format: Format,
    begins: &'r [u32],
    counts: &'r Counts,
    /// Scales of the row in hand.
    scales: Vec<f32>,
}

impl RowReader<'_> {
    /// Waits for a row and copies it to each of its experts. A row that did not arrive, or arrived
    /// with a header that no rank writes, has no entries in `recv_map`.
    fn receive(&mut self, source: usize, slot: usize, memory: &mut DispatchRecv<'_>) -> bool {
        let dims = self.part.group.dims;
        let row = self.part.group.regions.row(self.part.epoch, source, slot);
        let map = (source * dims.max_tokens + slot) * dims.map_words();
        memory.recv_map[map] = 0;
        if !self.part.wait_for(self.own, row) {
            return false;
        }
        let mut header = [0; 1 + EP_MAX_TOP_K as usize];
        self.own.read(row.data(), &mut header[..dims.map_words()]);
        let (token, entries) = unpair(header[0]);
        if token as usize >= dims.max_tokens || !(1..=dims.max_top_k).contains(&(entries as usize))
        {
            return false;
        }
        let payload = self.part.group.regions.payload(row);
        if matches!(self.format, Format::Fp8 { .. }) {
            self.own
                .read(payload + dims.hidden as u64, &mut self.scales);
        }
        let mut received = 0;
        for entry in header[1..][..entries as usize]
            .iter()
            .map(|&word| Entry::unpack(word))
        {
            let local = entry.expert as usize;
            let range = source * dims.local_experts + local;
            if local >= dims.local_experts || entry.position >= self.counts.tokens[range] {
                continue;
            }
            let index = (self.begins[range] + entry.position) as usize;
            self.store(local, index, payload, memory);
            let to = local * dims.rows_per_expert() + index;
            memory.src_info[to] = token as i32;
            received += 1;
            memory.recv_map[map + received] = pair(to as u32, entry.weight.to_bits());
        }
        let whole = self.part.whole(self.own, row);
        if whole {
            memory.recv_map[map] = pair(token, received as u32);
        }
        whole && received > 0
    }

    /// Copies payload and scales to a row of an expert.
    fn store(&self, local: usize, index: usize, payload: u64, memory: &mut DispatchRecv<'_>) {
        let dims = self.part.group.dims;
        let per_expert = dims.rows_per_expert();
        let to = local * per_expert + index;
        let Format::Fp8 { packed, .. } = self.format else {
            let bytes = 2 * dims.hidden;
            self.own
                .read(payload, &mut memory.recv_x[to * bytes..][..bytes]);
            return;
        };
        self.own.read(
            payload,
            &mut memory.recv_x[to * dims.hidden..][..dims.hidden],
        );
        // Token stride 1: consecutive scales of a row lie a whole expert's rows apart.
        let column = |block, columns: usize| (local * columns + block) * per_expert + index;
        if packed {
            let columns = self.scales.len().div_ceil(4);
            for (i, four) in self.scales.chunks(4).enumerate() {
                let word = four
                    .iter()
                    .rev()
                    .fold(0, |word, &s| word << 8 | u32::from(ue8m0(s)));
                memory.recv_scales[column(i, columns)] = word;
            }
        } else {
            for (i, scale) in self.scales.iter().enumerate() {
                memory.recv_scales[column(i, self.scales.len())] = scale.to_bits();
            }
        }
    }
}
