//! Cases of dispatch and combine, and what must come out of them.
//!
//! Everything here is written from the contract alone, naively, with the standard library only: no
//! code under test is used, so that it can judge any implementation.
//!
//! A [`Case`] is a shape, a way to route and a seed. [`Case::inputs`] makes the tensors of one
//! operation, [`Oracle`] says what each rank receives and what combine returns, and
//! [`Oracle::check_dispatch`] and [`Oracle::check_combine`] compare.

#![allow(
    dead_code,
    reason = "shared by several test binaries, each of which uses a part"
)]

use std::collections::BTreeMap;
use std::fmt::Debug;

/// Channels that share a scale.
pub(crate) const BLOCK: usize = 128;

/// Infinities and NaNs of both signs.
const SPECIALS: [u16; 4] = [0x7f80, 0xff80, 0x7fc0, 0xffc0];

/// How tokens choose experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Routing {
    /// Every expert as likely as any other.
    Uniform,
    /// Expert of popularity rank i with a weight of 1 / (i + 1).
    Zipf,
    /// Three of four choices go to the experts of one rank.
    Hot,
    /// All tokens choose the same experts.
    One,
}

/// When routing weights are given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Weights {
    /// Never: all are 1.
    None,
    /// With the tokens.
    AtDispatch,
    /// With the combine.
    AtCombine,
}

/// What rows are on the wire and how scales are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Precision {
    /// As they are.
    Bf16,
    /// E4M3 with float32 scales.
    Fp8,
    /// E4M3 with float32 scales that are powers of two.
    Fp8Pow2,
    /// The same, stored as exponents, four in an int32.
    Fp8Ue8m0,
}

impl Precision {
    /// Bytes of a channel.
    pub(crate) fn bytes(self) -> usize {
        if self == Self::Bf16 { 2 } else { 1 }
    }

    /// 32-bit words of scales for each row.
    pub(crate) fn scale_words(self, hidden: usize) -> usize {
        match self {
            Self::Bf16 => 0,
            Self::Fp8 | Self::Fp8Pow2 => hidden / BLOCK,
            Self::Fp8Ue8m0 => hidden.div_ceil(4 * BLOCK),
        }
    }
}

/// Entries of `topk_idx` that are not a plain expert id.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Odd {
    /// -1 here and there.
    pub(crate) missing: bool,
    /// Ids that no expert has.
    pub(crate) out_of_range: bool,
    /// The same expert twice for a token.
    pub(crate) repeated: bool,
}

/// A family of operations on one buffer.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) ranks: usize,
    pub(crate) experts: usize,
    pub(crate) hidden: usize,
    pub(crate) top_k: usize,
    /// Most tokens of a rank; what the buffer is made for.
    pub(crate) max_tokens: usize,
    /// Tokens of each rank in the first operation; they move on by a rank with each operation.
    pub(crate) tokens: Vec<usize>,
    pub(crate) routing: Routing,
    pub(crate) weights: Weights,
    pub(crate) precision: Precision,
    pub(crate) odd: Odd,
    /// Infinities and NaNs among the channels of x and of expert outputs.
    pub(crate) specials: bool,
    pub(crate) seed: u64,
}

/// Tensors of one rank for one operation.
#[derive(Clone, Debug)]
pub(crate) struct Input {
    pub(crate) tokens: usize,
    /// bf16 `[tokens, hidden]`.
    pub(crate) x: Vec<u16>,
    /// `[tokens, top_k]`.
    pub(crate) topk_idx: Vec<i64>,
    /// `[tokens, top_k]`, made whether they are used or not.
    pub(crate) topk_weights: Vec<f32>,
}

impl Case {
    pub(crate) fn local_experts(&self) -> usize {
        self.experts / self.ranks
    }

    /// Rows that the output has for each expert.
    pub(crate) fn rows_per_expert(&self) -> usize {
        self.ranks * self.max_tokens
    }

    /// The tensors of all ranks for an operation.
    pub(crate) fn inputs(&self, operation: usize) -> Vec<Input> {
        (0..self.ranks)
            .map(|rank| self.input(operation, rank))
            .collect()
    }

    fn input(&self, operation: usize, rank: usize) -> Input {
        let tokens = self.tokens[(rank + operation) % self.ranks];
        let mut rng = Rng::new(&[self.seed, 1, operation as u64, rank as u64]);
        let x = (0..tokens).flat_map(|_| self.row(&mut rng)).collect();
        let topk_idx = (0..tokens).flat_map(|_| self.choose(&mut rng)).collect();
        let topk_weights = (0..tokens * self.top_k).map(|_| weight(&mut rng)).collect();
        Input {
            tokens,
            x,
            topk_idx,
            topk_weights,
        }
    }

    /// A token: zeros, magnitudes at the ends of the range, or any in between.
    fn row(&self, rng: &mut Rng) -> Vec<u16> {
        let (low, high) = match rng.below(8) {
            0 => return vec![0; self.hidden],
            1 => (100, 126),
            2 => (-132, -110),
            3 => (-40, 40),
            _ => (-6, 2),
        };
        (0..self.hidden)
            .map(|_| match rng.below(64) {
                0 => rng.pick(&[0x0000, 0x8000]),
                1 if self.specials => rng.pick(&SPECIALS),
                _ => rng.bf16(low, high),
            })
            .collect()
    }

    /// The entries of a token.
    fn choose(&self, rng: &mut Rng) -> Vec<i64> {
        let mut ids: Vec<i64> = Vec::new();
        for k in 0..self.top_k {
            let fresh = if k < self.experts {
                self.draw(rng, k, &ids)
            } else {
                -1
            };
            let beyond = [
                self.experts as i64,
                -2,
                i64::MIN,
                i64::MAX,
                1 << 32,
                (1 << 32) + 1,
            ];
            ids.push(match rng.below(8) {
                0 if self.odd.missing => -1,
                1 if self.odd.out_of_range => rng.pick(&beyond),
                2 if self.odd.repeated && k > 0 => ids[rng.below(k as u64) as usize],
                _ => fresh,
            });
        }
        ids
    }

    /// An expert that the token does not have yet.
    fn draw(&self, rng: &mut Rng, k: usize, taken: &[i64]) -> i64 {
        let experts = self.experts as u64;
        let hot = self.seed % self.ranks as u64 * self.local_experts() as u64;
        let mut attempts = 0;
        loop {
            attempts += 1;
            // A popular expert may be taken already; do not draw it for ever.
            let expert = match self.routing {
                _ if attempts > 64 => attempts % experts,
                Routing::Uniform => rng.below(experts),
                Routing::Zipf => zipf(rng, experts),
                Routing::Hot if rng.below(4) > 0 => hot + rng.below(self.local_experts() as u64),
                Routing::Hot => rng.below(experts),
                Routing::One => (hot + k as u64 + attempts - 1) % experts,
            };
            if !taken.contains(&(expert as i64)) {
                return expert as i64;
            }
        }
    }

    /// The output of an expert for a token: independent of where the row stands.
    pub(crate) fn expert_output(
        &self,
        operation: usize,
        source: usize,
        token: usize,
        expert: usize,
    ) -> Vec<u16> {
        // Experts of a token share a magnitude, so that their sum has something to round.
        let place = [self.seed, 2, operation as u64, source as u64, token as u64];
        let (low, high) = match Rng::new(&place).below(8) {
            0 => (-132, -118),
            1 => (90, 100),
            2 => (-30, 30),
            _ => (-4, 2),
        };
        let mut rng = Rng::new(&[
            place[1],
            expert as u64,
            place[0],
            place[2],
            place[3],
            place[4],
        ]);
        (0..self.hidden)
            .map(|_| match rng.below(64) {
                0 => rng.pick(&[0x0000, 0x8000]),
                1 if self.specials => rng.pick(&SPECIALS),
                _ => rng.bf16(low, high),
            })
            .collect()
    }
}

/// A routing weight: mostly what a gate gives, now and then zero or negative.
fn weight(rng: &mut Rng) -> f32 {
    match rng.below(16) {
        0 => 0.0,
        1 => -rng.unit(),
        _ => rng.unit(),
    }
}

fn zipf(rng: &mut Rng, experts: u64) -> u64 {
    let total: f64 = (0..experts).map(|i| 1.0 / (i + 1) as f64).sum();
    let mut left = f64::from(rng.unit()) * total;
    for i in 0..experts {
        left -= 1.0 / (i + 1) as f64;
        if left < 0.0 {
            // Popular experts lie on all ranks.
            return (i * 7 + 3) % experts;
        }
    }
    0
}

/// A small generator (SplitMix64), so that cases are the same everywhere.
#[derive(Clone, Debug)]
pub(crate) struct Rng(u64);

impl Rng {
    /// A generator for a place, which is any list of numbers.
    pub(crate) fn new(place: &[u64]) -> Self {
        let mut rng = Self(0x243f_6a88_85a3_08d3);
        for &number in place {
            rng.0 ^= number;
            rng.0 = rng.next();
        }
        rng
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// In [0, 1), a multiple of 2^-24.
    pub(crate) fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 24) as f32
    }

    /// A bf16 of either sign with an exponent in `low..=high`; below -126 subnormal.
    pub(crate) fn bf16(&mut self, low: i32, high: i32) -> u16 {
        let exponent = low + self.below((high - low + 1) as u64) as i32;
        let magnitude = (1.0 + self.below(128) as f64 / 128.0) * 2f64.powi(exponent);
        let sign = self.below(2) as u16;
        sign << 15 | bf16_round(magnitude as f32)
    }
}

/// Which ranks reach which.
#[derive(Clone, Debug)]
pub(crate) struct Links(Vec<Vec<bool>>);

impl Links {
    pub(crate) fn all(ranks: usize) -> Self {
        Self(vec![vec![true; ranks]; ranks])
    }

    /// Takes a rank out.
    pub(crate) fn without(mut self, rank: usize) -> Self {
        for peer in 0..self.0.len() {
            self = self.cut(rank, peer);
        }
        self
    }

    /// Cuts a pair, both ways.
    pub(crate) fn cut(mut self, a: usize, b: usize) -> Self {
        self.0[a][b] = false;
        self.0[b][a] = false;
        self
    }

    pub(crate) fn has(&self, a: usize, b: usize) -> bool {
        self.0[a][b]
    }
}

/// A row that an expert receives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Received {
    pub(crate) source: usize,
    pub(crate) token: usize,
    /// Which of the token's entries chose the expert.
    pub(crate) k: usize,
}

/// An entry of `topk_idx` that is skipped and reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum BadEntry {
    Range { token: u64, id: i64 },
    Repeated { token: u64, id: i64 },
}

/// What an operation must give.
#[derive(Debug)]
pub(crate) struct Oracle<'a> {
    pub(crate) case: &'a Case,
    pub(crate) operation: usize,
    pub(crate) inputs: &'a [Input],
    /// Rows by expert, in the order in which they stand.
    pub(crate) rows: Vec<Vec<Received>>,
    links: Links,
    encoded: BTreeMap<(usize, usize), Encoded>,
}

/// What dispatch gave a rank.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DispatchOutput<'a> {
    /// Bytes `[local experts, rows, hidden]` of the data type.
    pub(crate) recv_x: &'a [u8],
    /// Words, float32 or packed, `[local experts, scale words, rows]`.
    pub(crate) recv_scales: &'a [u32],
    pub(crate) recv_count: &'a [i32],
    pub(crate) src_info: &'a [i32],
    pub(crate) layout_range: &'a [i64],
}

impl<'a> Oracle<'a> {
    pub(crate) fn new(case: &'a Case, operation: usize, inputs: &'a [Input], links: Links) -> Self {
        let mut rows = vec![Vec::new(); case.experts];
        let mut encoded = BTreeMap::new();
        for (source, input) in inputs.iter().enumerate() {
            for token in 0..input.tokens {
                for (k, expert) in valid(case, input, token) {
                    if links.has(source, expert / case.local_experts()) {
                        rows[expert].push(Received { source, token, k });
                        encoded.entry((source, token)).or_insert_with(|| {
                            let x = &input.x[token * case.hidden..][..case.hidden];
                            Encoded::new(case.precision, x)
                        });
                    }
                }
            }
        }
        Self {
            case,
            operation,
            inputs,
            rows,
            links,
            encoded,
        }
    }

    /// Rows of a local expert of a rank.
    fn local(&self, rank: usize, local: usize) -> &[Received] {
        &self.rows[rank * self.case.local_experts() + local]
    }

    /// Compares what dispatch gave a rank, and that rows which nobody filled still hold `poison`.
    pub(crate) fn check_dispatch(
        &self,
        rank: usize,
        output: &DispatchOutput<'_>,
        poison: u8,
    ) -> Result<(), String> {
        let (case, rows) = (self.case, self.case.rows_per_expert());
        let row_bytes = case.hidden * case.precision.bytes();
        let scale_words = case.precision.scale_words(case.hidden);
        same(
            "recv_x values",
            output.recv_x.len(),
            case.local_experts() * rows * row_bytes,
        )?;
        same(
            "scales",
            output.recv_scales.len(),
            case.local_experts() * rows * scale_words,
        )?;
        let poisoned = u32::from_le_bytes([poison; 4]);
        for local in 0..case.local_experts() {
            let at = |what: &str| format!("{what} of rank {rank}, local expert {local}");
            let received = self.local(rank, local);
            same(
                &at("recv_count"),
                output.recv_count[local],
                received.len() as i32,
            )?;
            let mut begin = 0;
            for source in 0..case.ranks {
                let count = received.iter().filter(|row| row.source == source).count() as i64;
                let range = output.layout_range[local * case.ranks + source];
                same(&at("layout_range"), range, begin << 32 | count)?;
                begin += count;
            }
            for row in 0..rows {
                let place = || at(&format!("row {row}"));
                let index = local * rows + row;
                let bytes = &output.recv_x[index * row_bytes..][..row_bytes];
                let scales = (0..scale_words)
                    .map(|word| output.recv_scales[(local * scale_words + word) * rows + row]);
                let Some(from) = received.get(row) else {
                    if bytes.iter().any(|&byte| byte != poison) {
                        return Err(format!("{} was written", place()));
                    }
                    same(&place(), scales.filter(|&word| word != poisoned).count(), 0)?;
                    same(&place(), output.src_info[index], poisoned as i32)?;
                    continue;
                };
                let expected = &self.encoded[&(from.source, from.token)];
                same(&place(), output.src_info[index], from.token as i32)?;
                if bytes != expected.bytes {
                    let channel = bytes.iter().zip(&expected.bytes).position(|(a, b)| a != b);
                    return Err(format!("{} differs from {from:?} at {channel:?}", place()));
                }
                same(&place(), scales.collect(), expected.scales.clone())?;
            }
        }
        Ok(())
    }

    /// Expert outputs of a rank, bf16 `[local experts, rows, hidden]`: NaN where no row is.
    pub(crate) fn expert_outputs(&self, rank: usize) -> Vec<u16> {
        let (case, rows) = (self.case, self.case.rows_per_expert());
        let mut y = vec![0x7fff; case.local_experts() * rows * case.hidden];
        for local in 0..case.local_experts() {
            let expert = rank * case.local_experts() + local;
            for (row, from) in self.local(rank, local).iter().enumerate() {
                let output = case.expert_output(self.operation, from.source, from.token, expert);
                y[(local * rows + row) * case.hidden..][..case.hidden].copy_from_slice(&output);
            }
        }
        y
    }

    /// Compares what combine gave a rank: bit for bit with the arithmetic of the contract, and with
    /// a sum in float64 within the bound that the arithmetic has.
    pub(crate) fn check_combine(&self, rank: usize, out: &[u16]) -> Result<(), String> {
        let (case, input) = (self.case, &self.inputs[rank]);
        same("values of out", out.len(), input.tokens * case.hidden)?;
        for (token, out) in out.chunks_exact(case.hidden).enumerate() {
            let owners = self.contributions(rank, token);
            for (channel, &bits) in out.iter().enumerate() {
                let place = || format!("token {token} of rank {rank}, channel {channel}");
                let exact = combine_exact(&owners, channel);
                if bits != exact {
                    return Err(format!("{}: {bits:#06x}, not {exact:#06x}", place()));
                }
                let (dense, bound) = combine_dense(&owners, channel);
                if !dense.is_finite() {
                    continue;
                }
                let error = (f64::from(bf16_value(bits)) - dense).abs();
                if error > bound || error.is_nan() {
                    return Err(format!("{}: off by {error:e}, over {bound:e}", place()));
                }
            }
        }
        Ok(())
    }

    /// By owner, ascending: weights and expert outputs of a token, in top-k order.
    fn contributions(&self, rank: usize, token: usize) -> Vec<Vec<Term>> {
        let (case, input) = (self.case, &self.inputs[rank]);
        let mut owners: BTreeMap<usize, Vec<_>> = BTreeMap::new();
        for (k, expert) in valid(case, input, token) {
            let owner = expert / case.local_experts();
            if self.links.has(rank, owner) {
                let weight = match case.weights {
                    Weights::None => 1.0,
                    _ => input.topk_weights[token * case.top_k + k],
                };
                let y = case.expert_output(self.operation, rank, token, expert);
                owners.entry(owner).or_default().push((weight, y));
            }
        }
        owners.into_values().collect()
    }

    /// Entries of a rank that are skipped and reported, sorted.
    pub(crate) fn bad_entries(&self, rank: usize) -> Vec<BadEntry> {
        let (case, input) = (self.case, &self.inputs[rank]);
        let mut bad = Vec::new();
        for token in 0..input.tokens {
            let ids = &input.topk_idx[token * case.top_k..][..case.top_k];
            for (k, &id) in ids.iter().enumerate() {
                let token = token as u64;
                if id < -1 || id >= case.experts as i64 {
                    bad.push(BadEntry::Range { token, id });
                } else if id >= 0 && ids[..k].contains(&id) {
                    bad.push(BadEntry::Repeated { token, id });
                }
            }
        }
        bad.sort();
        bad
    }

    /// Ranks that tokens of a rank have experts on, reachable or not.
    pub(crate) fn owners(&self, rank: usize) -> Vec<usize> {
        let input = &self.inputs[rank];
        let mut owners: Vec<usize> = (0..input.tokens)
            .flat_map(|token| valid(self.case, input, token))
            .map(|(_, expert)| expert / self.case.local_experts())
            .collect();
        owners.sort_unstable();
        owners.dedup();
        owners
    }
}

/// Experts of a token with their top-k index: ids in range, the first of each.
pub(crate) fn valid(case: &Case, input: &Input, token: usize) -> Vec<(usize, usize)> {
    let mut experts: Vec<(usize, usize)> = Vec::new();
    for k in 0..case.top_k {
        let id = input.topk_idx[token * case.top_k + k];
        if (0..case.experts as i64).contains(&id)
            && experts.iter().all(|&(_, expert)| expert != id as usize)
        {
            experts.push((k, id as usize));
        }
    }
    experts
}

fn same<T: PartialEq + Debug>(what: &str, found: T, expected: T) -> Result<(), String> {
    if found == expected {
        Ok(())
    } else {
        Err(format!("{what}: {found:?}, not {expected:?}"))
    }
}

/// A token as it is received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Encoded {
    pub(crate) bytes: Vec<u8>,
    pub(crate) scales: Vec<u32>,
}

impl Encoded {
    pub(crate) fn new(precision: Precision, x: &[u16]) -> Self {
        if precision == Precision::Bf16 {
            let bytes = x.iter().flat_map(|value| value.to_le_bytes()).collect();
            return Self {
                bytes,
                scales: Vec::new(),
            };
        }
        let values = e4m3_values();
        let (mut bytes, mut inverses) = (Vec::new(), Vec::new());
        for block in x.chunks(BLOCK) {
            let mut amax: f32 = 1e-4;
            for &channel in block {
                let magnitude = bf16_value(channel).abs();
                if magnitude > amax {
                    amax = magnitude;
                }
            }
            let mut inverse = amax * (1.0f32 / 448.0f32);
            let mut scale = 448.0f32 / amax;
            if precision != Precision::Fp8 {
                let mut power = 2f64.powi(-60);
                while power < f64::from(inverse) {
                    power *= 2.0;
                }
                inverse = power as f32;
                scale = 1.0 / inverse;
            }
            for &channel in block {
                let sign = (channel >> 8) as u8 & 0x80;
                let magnitude = bf16_value(channel & 0x7fff);
                let code = e4m3_magnitude(&values, magnitude * scale);
                bytes.push(if code == 0x7f { code } else { sign | code });
            }
            inverses.push(inverse);
        }
        let scales = if precision == Precision::Fp8Ue8m0 {
            let exponents: Vec<u8> = inverses
                .iter()
                .map(|&inverse| exponent_byte(inverse))
                .collect();
            let word = |four: &[u8]| {
                let mut bytes = [0; 4];
                bytes[..four.len()].copy_from_slice(four);
                u32::from_le_bytes(bytes)
            };
            exponents.chunks(4).map(word).collect()
        } else {
            inverses.iter().map(|inverse| inverse.to_bits()).collect()
        };
        Self { bytes, scales }
    }
}

/// The exponent of a power of two, plus 127.
fn exponent_byte(power_of_two: f32) -> u8 {
    if power_of_two.is_infinite() {
        255
    } else {
        (power_of_two.log2() + 127.0) as u8
    }
}

/// The finite magnitudes of E4M3, ascending: codes 0 to 0x7e.
pub(crate) fn e4m3_values() -> Vec<f64> {
    (0..0x7f)
        .map(|code| {
            let (exponent, mantissa) = (code / 8, f64::from(code % 8));
            if exponent == 0 {
                mantissa / 8.0 * 2f64.powi(-6)
            } else {
                (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7)
            }
        })
        .collect()
}

/// The code of the nearest magnitude; of two that are as near, the even code.
fn e4m3_magnitude(values: &[f64], magnitude: f32) -> u8 {
    if magnitude.is_nan() {
        return 0x7f;
    }
    let magnitude = f64::from(magnitude).min(448.0);
    let above = values.partition_point(|&value| value < magnitude);
    let below = above.saturating_sub(1);
    let (to_above, to_below) = (values[above] - magnitude, magnitude - values[below]);
    let even = if above % 2 == 0 { above } else { below };
    let nearest = if to_above < to_below { above } else { below };
    if to_above == to_below {
        even as u8
    } else {
        nearest as u8
    }
}

/// The value of a bf16.
pub(crate) fn bf16_value(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// The nearest bf16; of two that are as near, the even one. NaN is 0x7fff.
pub(crate) fn bf16_round(value: f32) -> u16 {
    if value.is_nan() {
        return 0x7fff;
    }
    let towards_zero = (value.to_bits() >> 16) as u16;
    if value.is_infinite() {
        return towards_zero;
    }
    let away = towards_zero + 1;
    let magnitude = |bits: u16| {
        let bits = bits & 0x7fff;
        // What would follow the largest finite value is where overflow rounds to infinity.
        if bits == 0x7f80 {
            2f64.powi(128)
        } else {
            f64::from(bf16_value(bits))
        }
    };
    let value = f64::from(value.abs());
    let (low, high) = (value - magnitude(towards_zero), magnitude(away) - value);
    if low < high || low == high && towards_zero.is_multiple_of(2) {
        towards_zero
    } else {
        away
    }
}

/// A routing weight, and the expert output that it weighs.
pub(crate) type Term = (f32, Vec<u16>);

/// The arithmetic of combine, bit for bit, on the terms of a token by owner.
///
/// Each owner multiplies its first term in float32, adds the others by fused multiply-adds, and
/// rounds to bf16; the token's rank adds the owners in float32 and rounds to bf16.
pub(crate) fn combine_exact(owners: &[Vec<Term>], channel: usize) -> u16 {
    let mut total: Option<f32> = None;
    for terms in owners {
        let mut sum: Option<f32> = None;
        for (weight, y) in terms {
            let y = bf16_value(y[channel]);
            sum = Some(match sum {
                None => weight * y,
                Some(sum) => weight.mul_add(y, sum),
            });
        }
        let Some(sum) = sum else { continue };
        let partial = bf16_value(bf16_round(sum));
        total = Some(total.map_or(partial, |total| total + partial));
    }
    total.map_or(0, bf16_round)
}

/// The sum in float64, and how far the arithmetic of combine can be from it.
///
/// Let u = 2^-24 and v = 2^-8 be the unit roundoffs of float32 and bf16, and γ(n) = nu / (1 - nu).
///
/// 1. An owner with n terms makes one rounding per term (a product, then n - 1 fused
///    multiply-adds). Its float32 sum ŝ of the terms w·y, whose exact sum is s, obeys
///    |ŝ - s| ≤ γ(n) A with A = Σ|w·y|, since no term goes through more than n roundings.
/// 2. Rounded to bf16: |p̂ - ŝ| ≤ v|ŝ|, so |p̂ - s| ≤ e = γ(n) A + v (|s| + γ(n) A).
/// 3. Adding m partials takes m - 1 roundings: |t̂ - Σp̂| ≤ γ(m - 1) Σ|p̂|, and |p̂| ≤ |s| + e, so
///    |t̂ - Σs| ≤ E = Σe + γ(m - 1) Σ(|s| + e).
/// 4. Rounded to bf16 at last: |out - Σs| ≤ E + v (|Σs| + E).
///
/// Below the normal range a rounding is off by half a subnormal instead of a part of the value:
/// 2^-150 for a product in float32 (sums are exact there) and 2^-134 for bf16. That is added for
/// every rounding, doubled to cover its growth in the later steps. The float64 sum itself is off by
/// less than 2^-40 of ΣA, which is added too. Nothing overflows in these cases; a sum of infinities
/// or NaNs has no bound.
pub(crate) fn combine_dense(owners: &[Vec<Term>], channel: usize) -> (f64, f64) {
    let (u, v) = (2f64.powi(-24), 2f64.powi(-8));
    let gamma = |n: usize| n as f64 * u / (1.0 - n as f64 * u);
    let (mut dense, mut absolute, mut error, mut partials, mut tiny) = (0.0, 0.0, 0.0, 0.0, 0.0);
    for terms in owners {
        let product = |(w, y): &Term| f64::from(*w) * f64::from(bf16_value(y[channel]));
        let s: f64 = terms.iter().map(product).sum();
        let a: f64 = terms.iter().map(|term| product(term).abs()).sum();
        let in_f32 = gamma(terms.len()) * a;
        let e = in_f32 + v * (s.abs() + in_f32);
        dense += s;
        absolute += a;
        error += e;
        partials += s.abs() + e;
        tiny += terms.len() as f64 * 2f64.powi(-150) + 2f64.powi(-134);
    }
    error += gamma(owners.len().saturating_sub(1)) * partials;
    error += v * (dense.abs() + error);
    error += 2.0 * (tiny + 2f64.powi(-134)) + 2f64.powi(-40) * absolute;
    (dense, error)
}
