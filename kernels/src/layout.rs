//! Where things lie in every rank's symmetric buffer: a function of the shape alone, so that all
//! ranks derive the same offsets.

use crate::ffi::{
    self, EP_HIDDEN_MULTIPLE, EP_LINE_BYTES, EP_LINE_DATA_BYTES, EP_MAX_EXPERTS, EP_MAX_HIDDEN,
    EP_MAX_LOCAL_EXPERTS, EP_MAX_RANKS, EP_MAX_TOKENS, EP_MAX_TOP_K,
};

/// What a buffer is made for. Equal on every rank of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Ranks in the group.
    pub num_ranks: u32,
    /// Experts of the layer, over all ranks; a multiple of `num_ranks`.
    pub num_experts: u32,
    /// Most tokens that one rank dispatches at once.
    pub max_tokens: u32,
    /// Channels of a token; a multiple of 128.
    pub hidden: u32,
    /// Most experts of a token.
    pub max_top_k: u32,
    /// Dispatches that can be alive (dispatched and not yet combined) at once.
    pub slots: u32,
    /// Dispatches that can be between their send and their receive part at once; 1 without split.
    pub sends_in_flight: u32,
}

/// Why a shape cannot be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ShapeError {
    /// A value lies outside its limits.
    #[error("{field} is {value}; it must be {min}..={max}")]
    Range {
        /// Field of [`Shape`].
        field: &'static str,
        /// Its value.
        value: u64,
        /// Smallest allowed.
        min: u64,
        /// Largest allowed.
        max: u64,
    },
    /// A value is not a multiple.
    #[error("{field} is {value}; it must be a multiple of {of}")]
    Multiple {
        /// Field of [`Shape`].
        field: &'static str,
        /// Its value.
        value: u32,
        /// What it must be a multiple of.
        of: u32,
    },
    /// A row index (ranks times tokens) would not fit into 31 bits.
    #[error("num_ranks * max_tokens is {rows}; at most {max} rows can be addressed")]
    TooManyRows {
        /// Rows an expert could receive.
        rows: u64,
        /// Most that can be addressed.
        max: u64,
    },
}

impl Shape {
    /// Checks the limits of the wire format.
    pub fn validate(&self) -> Result<(), ShapeError> {
        let range = |field, value: u32, min: u32, max: u32| {
            if (min..=max).contains(&value) {
                Ok(())
            } else {
                Err(ShapeError::Range {
                    field,
                    value: value.into(),
                    min: min.into(),
                    max: max.into(),
                })
            }
        };
        range("num_ranks", self.num_ranks, 1, EP_MAX_RANKS)?;
        range("max_tokens", self.max_tokens, 1, EP_MAX_TOKENS)?;
        range("hidden", self.hidden, EP_HIDDEN_MULTIPLE, EP_MAX_HIDDEN)?;
        range("max_top_k", self.max_top_k, 1, EP_MAX_TOP_K)?;
        range("slots", self.slots, 1, 64)?;
        range("sends_in_flight", self.sends_in_flight, 1, 64)?;
        if !self.hidden.is_multiple_of(EP_HIDDEN_MULTIPLE) {
            return Err(ShapeError::Multiple {
                field: "hidden",
                value: self.hidden,
                of: EP_HIDDEN_MULTIPLE,
            });
        }
        range(
            "num_experts",
            self.num_experts,
            self.num_ranks,
            EP_MAX_EXPERTS.min(EP_MAX_LOCAL_EXPERTS * self.num_ranks),
        )?;
        if !self.num_experts.is_multiple_of(self.num_ranks) {
            return Err(ShapeError::Multiple {
                field: "num_experts",
                value: self.num_experts,
                of: self.num_ranks,
            });
        }
        let rows = u64::from(self.local_experts()) * u64::from(self.rows_per_expert());
        let max = (1 << 31) - 1;
        if rows > max {
            return Err(ShapeError::TooManyRows { rows, max });
        }
        Ok(())
    }

    /// Experts on each rank.
    pub fn local_experts(&self) -> u32 {
        self.num_experts / self.num_ranks
    }

    /// Rows that one expert's part of the output holds: every rank may send it every token.
    pub fn rows_per_expert(&self) -> u32 {
        self.num_ranks * self.max_tokens
    }

    /// Bytes of the control block.
    pub fn control_bytes(&self) -> u64 {
        u64::from(ffi::EP_CONTROL_FIXED_BYTES) + 128 * u64::from(self.num_ranks)
    }

    /// Where in it the pairs of words are in which [`EP_ABORTED`](ffi::EP_ABORTED) calls operations
    /// off.
    pub fn control_waits(&self) -> [u64; ffi::EP_CONTROL_WAITS as usize] {
        std::array::from_fn(|i| self.control_part(i as u64) + 8)
    }

    /// Where in it a part of an operation has its words: its epoch, then those that call it off.
    pub(crate) fn control_part(&self, part: u64) -> u64 {
        (4 * u64::from(self.num_ranks)).next_multiple_of(128) + 32 * part
    }

    /// Bytes of a handle's `route`, `recv_map` and `recv_rows`, in this order.
    pub fn handle_bytes(&self) -> [u64; 3] {
        let (m, k, r) = (
            u64::from(self.max_tokens),
            u64::from(self.max_top_k),
            u64::from(self.num_ranks),
        );
        [m * k * 4, r * m * (1 + k) * 8, r * 4]
    }
}

/// Lines that carry `bytes` of data.
fn lines(bytes: u64) -> u64 {
    bytes.div_ceil(EP_LINE_DATA_BYTES.into())
}

/// The layout of a shape.
#[derive(Clone, Copy, Debug)]
pub struct Layout(ffi::ep_layout);

impl Layout {
    /// Lays out the symmetric buffer of a shape.
    pub fn new(shape: &Shape) -> Result<Self, ShapeError> {
        shape.validate()?;
        let (r, m) = (u64::from(shape.num_ranks), u64::from(shape.max_tokens));
        let line = u64::from(EP_LINE_BYTES);
        let k = u64::from(shape.max_top_k);
        // A bf16 row is never smaller than an FP8 row with its scales.
        let payload = lines(2 * u64::from(shape.hidden));
        let header_lines = lines(8 * (1 + k));
        let weight_lines = lines(4 * k);
        // With `s` sends in flight, a peer may still be reading operation n - 2s + 1 while this rank
        // sends operation n: twice as many buffers keep every write clear of every read.
        // A power of two, because kernels take the epoch modulo the ring.
        let ring = (2 * shape.sends_in_flight).next_power_of_two();

        let mut at = 0;
        let mut region = |bytes: u64| {
            let start = at;
            at += bytes.next_multiple_of(line);
            start
        };
        let barrier = region(line * r);
        let counts_source_stride =
            (8 * (u64::from(shape.local_experts()) + 1)).next_multiple_of(line);
        let counts_ring_stride = r * counts_source_stride;
        let counts = region(u64::from(ring) * counts_ring_stride);
        let weight_stride = weight_lines * line;
        let weights_source_stride = m * weight_stride;
        let weights_slot_stride = r * weights_source_stride;
        let weights = region(u64::from(shape.slots) * weights_slot_stride);
        let row_stride = (header_lines + payload) * line;
        let rows_source_stride = m * row_stride;
        let rows_ring_stride = r * rows_source_stride;
        let rows = region(u64::from(ring) * rows_ring_stride);
        let partial_stride = payload * line;
        let partials_source_stride = m * partial_stride;
        let partials_slot_stride = r * partials_source_stride;
        let partials = region(u64::from(shape.slots) * partials_slot_stride);
        Ok(Self(ffi::ep_layout {
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
            bytes: at,
            ring,
            slots: shape.slots,
            header_lines: header_lines as u32,
            weight_lines: weight_lines as u32,
        }))
    }

    /// Bytes of the symmetric buffer, on every rank.
    pub fn bytes(&self) -> u64 {
        self.0.bytes
    }

    /// The layout as the kernels take it.
    pub fn raw(&self) -> ffi::ep_layout {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DECODE: Shape = Shape {
        num_ranks: 4,
        num_experts: 256,
        max_tokens: 128,
        hidden: 7168,
        max_top_k: 8,
        slots: 2,
        sends_in_flight: 1,
    };

    #[test]
    fn decode_buffer_is_small() {
        let bytes = Layout::new(&DECODE).unwrap().bytes();
        assert!(bytes < 40_000_000, "{bytes}");
    }

    #[test]
    fn regions_do_not_overlap() {
        let l = Layout::new(&DECODE).unwrap().raw();
        let ends = [
            (l.barrier, 128 * 4),
            (l.counts, l.counts_ring_stride * u64::from(l.ring)),
            (l.weights, l.weights_slot_stride * u64::from(l.slots)),
            (l.rows, l.rows_ring_stride * u64::from(l.ring)),
            (l.partials, l.partials_slot_stride * u64::from(l.slots)),
        ];
        for pair in ends.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0);
            assert!(pair[1].0.is_multiple_of(128));
        }
        assert_eq!(ends[4].0 + ends[4].1, l.bytes);
    }

    #[test]
    fn limits_are_named() {
        let field = |s: Shape| match s.validate() {
            Err(ShapeError::Range { field, .. } | ShapeError::Multiple { field, .. }) => field,
            other => panic!("{other:?}"),
        };
        assert_eq!(
            field(Shape {
                hidden: 7000,
                ..DECODE
            }),
            "hidden"
        );
        assert_eq!(
            field(Shape {
                max_top_k: 33,
                ..DECODE
            }),
            "max_top_k"
        );
        assert_eq!(
            field(Shape {
                num_experts: 255,
                ..DECODE
            }),
            "num_experts"
        );
        assert_eq!(
            field(Shape {
                max_tokens: 0,
                ..DECODE
            }),
            "max_tokens"
        );
    }
}
