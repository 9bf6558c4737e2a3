//! Combine: expert outputs are summed by their owner and return to the tokens' ranks.

use super::check::Dims;
use super::group::{Counter, Group, Part, Peer, Progress};
use super::memory::{CombineMemory, CombineRecv, CombineSend, GivenWeights, Window};
use super::wire::{NO_ROUTE, unpair, unroute};
use crate::ffi::{
    EP_MAX_TOP_K, EP_PHASE_PARTIALS, EP_PHASE_SEND, EP_PHASE_WEIGHTS, ep_combine_args,
};
use crate::numerics::{bf16_from_f32, bf16_to_f32};

pub(super) fn run(args: &ep_combine_args, dims: &Dims, memory: CombineMemory<'_>) {
    let group = Group::new(&args.group, &args.layout, dims, memory.group);
    if let Some(memory) = memory.send {
        send(&group.begin(Counter::CombineSend), &memory);
    }
    if let Some(mut memory) = memory.recv {
        receive(&group.begin(Counter::CombineRecv), &mut memory);
    }
}

fn send(part: &Part<'_>, memory: &CombineSend<'_>) {
    let (group, dims) = (part.group, part.group.dims);
    // All of them before any wait: ranks wait for each other's.
    if let Some(weights) = &memory.weights {
        send_weights(part, weights);
    }
    let mut sender = Sender {
        part,
        memory,
        sum: Sum::new(dims.hidden),
    };
    let mut pending = Vec::new();
    for source in 0..dims.ranks {
        let rows = (memory.recv_rows[source] as usize).min(dims.max_tokens);
        let window = match group.peer(source) {
            Peer::Present(window) => window,
            Peer::Masked => continue,
            Peer::Unreachable => {
                if rows > 0 {
                    part.unreachable(EP_PHASE_SEND, source, 0);
                }
                continue;
            }
        };
        pending.extend((0..rows).map(|slot| (window, source, slot)));
    }
    // Others' rows do not wait for the weights of a rank that is late: these ranks might give this
    // one up.
    let mut given_up = vec![false; dims.ranks];
    group.wait(|| {
        pending.retain(|&(window, source, slot)| {
            let progress = sender.send(window, source, slot);
            given_up[source] |= progress == Progress::Passed;
            progress == Progress::Pending
        });
        if pending.is_empty() {
            Progress::Arrived
        } else {
            Progress::Pending
        }
    });
    for (_, source, _) in pending {
        given_up[source] = true;
    }
    for source in (0..dims.ranks).filter(|&source| given_up[source]) {
        part.timed_out(EP_PHASE_WEIGHTS, source);
    }
}

/// Reduces rows and sends them back.
struct Sender<'s> {
    part: &'s Part<'s>,
    memory: &'s CombineSend<'s>,
    sum: Sum,
}

impl Sender<'_> {
    /// Sends a row, if it has entries and its weights have come, or need not.
    fn send(&mut self, window: &Window, source: usize, slot: usize) -> Progress {
        let (part, memory) = (self.part, self.memory);
        let (group, dims) = (part.group, part.group.dims);
        let Some(mut row) = Row::of(memory, dims, source, slot) else {
            return Progress::Arrived;
        };
        if memory.weights.is_some() {
            let progress = row.receive_weights(part, source, slot);
            if progress != Progress::Arrived {
                return progress;
            }
        }
        self.sum.clear();
        for &(at, weight) in row.entries() {
            self.sum
                .add_weighted(weight, &memory.y[at * dims.hidden..][..dims.hidden]);
        }
        let partial = group.regions.partial(dims.slot, dims.rank, slot);
        part.push(window, partial, |window| {
            window.write(partial.data(), self.sum.round())
        });
        Progress::Arrived
    }
}

/// Gives the owners the weights of the rows they got, in the rows' entry order.
fn send_weights(part: &Part<'_>, memory: &GivenWeights<'_>) {
    let (group, dims) = (part.group, part.group.dims);
    for token in 0..dims.tokens {
        let route = &memory.route[token * dims.max_top_k..][..dims.top_k];
        let weights = &memory.topk_weights[token * dims.top_k..][..dims.top_k];
        for (k, &to) in route.iter().enumerate() {
            if to == NO_ROUTE || route[..k].contains(&to) {
                continue;
            }
            let Some((owner, slot)) = checked(to, dims) else {
                continue;
            };
            let Peer::Present(window) = group.peer(owner) else {
                continue;
            };
            let mut row = [0.0; EP_MAX_TOP_K as usize];
            let mut len = 0;
            for (&weight, _) in weights[k..]
                .iter()
                .zip(&route[k..])
                .filter(|(_, r)| **r == to)
            {
                row[len] = weight;
                len += 1;
            }
            let data = group.regions.weights(dims.slot, dims.rank, slot);
            part.push(window, data, |window| {
                window.write(data.data(), &row[..len])
            });
        }
    }
}

/// A row that was received: its places in the expert outputs and their weights.
#[derive(Debug)]
struct Row {
    entries: [(usize, f32); EP_MAX_TOP_K as usize],
    len: usize,
}

impl Row {
    /// The row of a slot; `None` if it has no entries.
    fn of(memory: &CombineSend<'_>, dims: &Dims, source: usize, slot: usize) -> Option<Self> {
        let map = (source * dims.max_tokens + slot) * dims.map_words();
        let words = &memory.recv_map[map..][..dims.map_words()];
        let (_, len) = unpair(words[0]);
        let len = (len as usize).min(dims.max_top_k);
        let mut row = Self {
            entries: [(0, 0.0); EP_MAX_TOP_K as usize],
            len,
        };
        for (entry, &word) in row.entries.iter_mut().zip(&words[1..][..len]) {
            let (at, weight) = unpair(word);
            *entry = (at as usize, f32::from_bits(weight));
        }
        let usable = len > 0 && row.entries().iter().all(|&(at, _)| at < dims.rows());
        usable.then_some(row)
    }

    /// Reads the weights that the source gives for this row, if they have come.
    fn receive_weights(&mut self, part: &Part<'_>, source: usize, slot: usize) -> Progress {
        let group = part.group;
        let Some(own) = group.own() else {
            return Progress::Passed;
        };
        let data = group.regions.weights(group.dims.slot, source, slot);
        let progress = part.progress(own, data);
        if progress != Progress::Arrived {
            return progress;
        }
        let mut weights = [0.0; EP_MAX_TOP_K as usize];
        own.read(data.data(), &mut weights[..self.len]);
        for ((_, weight), given) in self.entries.iter_mut().zip(weights) {
            *weight = given;
        }
        if part.whole(own, data) {
            Progress::Arrived
        } else {
            Progress::Passed
        }
    }

    fn entries(&self) -> &[(usize, f32)] {
        &self.entries[..self.len]
    }
}

fn receive(part: &Part<'_>, memory: &mut CombineRecv<'_>) {
    let dims = part.group.dims;
    let mut partials = Partials {
        part,
        given_up: vec![false; dims.ranks],
        row: vec![0; dims.hidden],
    };
    let mut sum = Sum::new(dims.hidden);
    for (token, out) in memory.out.chunks_exact_mut(dims.hidden).enumerate() {
        let route = &memory.route[token * dims.max_top_k..][..dims.top_k];
        sum.clear();
        for (owner, slot) in Owners::of(route, dims).ascending() {
            if let Some(partial) = partials.receive(token, owner, slot) {
                sum.add(partial);
            }
        }
        out.copy_from_slice(sum.round());
    }
}

/// The owners of a token's experts.
#[derive(Debug)]
struct Owners {
    /// `route` entries, of which the owner is the upper half.
    routes: [u32; EP_MAX_TOP_K as usize],
    len: usize,
}

impl Owners {
    fn of(route: &[u32], dims: &Dims) -> Self {
        let mut owners = Self {
            routes: [0; EP_MAX_TOP_K as usize],
            len: 0,
        };
        for &to in route {
            let known = owners.routes[..owners.len].contains(&to);
            if to != NO_ROUTE && !known && checked(to, dims).is_some() {
                owners.routes[owners.len] = to;
                owners.len += 1;
            }
        }
        owners.routes[..owners.len].sort_unstable();
        owners
    }

    fn ascending(&self) -> impl Iterator<Item = (usize, usize)> {
        self.routes[..self.len].iter().map(|&to| unroute(to))
    }
}

/// Owner and slot of an entry of `route`, if the group has them.
fn checked(route: u32, dims: &Dims) -> Option<(usize, usize)> {
    Some(unroute(route)).filter(|&(owner, slot)| owner < dims.ranks && slot < dims.max_tokens)
}

/// Partial sums as they come in.
#[derive(Debug)]
struct Partials<'p> {
    part: &'p Part<'p>,
    /// Owners that have been reported.
    given_up: Vec<bool>,
    /// The partial in hand.
    row: Vec<u16>,
}

impl Partials<'_> {
    /// Waits for an owner's partial of a token.
    fn receive(&mut self, token: usize, owner: usize, slot: usize) -> Option<&[u16]> {
        let group = self.part.group;
        match group.peer(owner) {
            Peer::Present(_) => {}
            Peer::Masked => return None,
            Peer::Unreachable => {
                if self.gives_up(owner) {
                    self.part.unreachable(EP_PHASE_PARTIALS, owner, token);
                }
                return None;
            }
        }
        let own = group.own()?;
        if !self.copy(own, owner, slot) {
            if self.gives_up(owner) {
                self.part.timed_out(EP_PHASE_PARTIALS, owner);
            }
            return None;
        }
        Some(&self.row)
    }

    fn copy(&mut self, own: &Window, owner: usize, slot: usize) -> bool {
        let group = self.part.group;
        let partial = group.regions.partial(group.dims.slot, owner, slot);
        if !self.part.wait_for(own, partial) {
            return false;
        }
        own.read(partial.data(), &mut self.row);
        self.part.whole(own, partial)
    }

    /// Marks an owner; whether it is the first time.
    fn gives_up(&mut self, owner: usize) -> bool {
        !std::mem::replace(&mut self.given_up[owner], true)
    }
}

/// A row being summed in float32. The first summand starts the sum: nothing is added to zero, which
/// would lose the sign of a negative zero.
#[derive(Debug)]
struct Sum {
    empty: bool,
    sum: Vec<f32>,
    rounded: Vec<u16>,
}

impl Sum {
    fn new(hidden: usize) -> Self {
        Self {
            empty: true,
            sum: vec![0.0; hidden],
            rounded: vec![0; hidden],
        }
    }

    fn clear(&mut self) {
        self.empty = true;
    }

    /// Adds `weight * y`, fused.
    fn add_weighted(&mut self, weight: f32, y: &[u16]) {
        let channels = self.sum.iter_mut().zip(y);
        if std::mem::take(&mut self.empty) {
            channels.for_each(|(sum, &y)| *sum = weight * bf16_to_f32(y));
        } else {
            channels.for_each(|(sum, &y)| *sum = weight.mul_add(bf16_to_f32(y), *sum));
        }
    }

    fn add(&mut self, partial: &[u16]) {
        let channels = self.sum.iter_mut().zip(partial);
        if std::mem::take(&mut self.empty) {
            channels.for_each(|(sum, &p)| *sum = bf16_to_f32(p));
        } else {
            channels.for_each(|(sum, &p)| *sum += bf16_to_f32(p));
        }
    }

    /// The sum in bf16; zeros if nothing was added.
    fn round(&mut self) -> &[u16] {
        if self.empty {
            self.rounded.fill(0);
        } else {
            for (rounded, &sum) in self.rounded.iter_mut().zip(&self.sum) {
                *rounded = bf16_from_f32(sum);
            }
        }
        &self.rounded
    }
}
