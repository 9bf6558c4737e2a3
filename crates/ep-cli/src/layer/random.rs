//! Counter-based randomness: a word is a hash of its stream and its position, so that any part of
//! any tensor can be made again, by anyone, in any order.

/// A sequence of 64-bit words, addressed by position.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stream(u64);

/// The increment of SplitMix64, whose finaliser `mix` is.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

impl Stream {
    pub(crate) fn new(seed: u64) -> Self {
        Self(mix(seed.wrapping_add(GOLDEN)))
    }

    /// The sub-stream named `tag`.
    pub(crate) fn child(self, tag: u64) -> Self {
        Self(mix(self.0 ^ mix(tag.wrapping_add(GOLDEN))))
    }

    pub(crate) fn word(self, position: u64) -> u64 {
        mix(self.0.wrapping_add(position.wrapping_mul(GOLDEN)))
    }

    /// A number in `0..bound`. The bias of the remainder is below 2⁻³² for the bounds used here.
    pub(crate) fn below(self, position: u64, bound: usize) -> usize {
        (self.word(position) % bound as u64) as usize
    }

    /// Fills `out` with entries of `table` picked by the bytes of this stream, starting with the
    /// byte at `first` (a multiple of 8): a table of 256 values is the cheapest exact source of
    /// any distribution.
    pub(crate) fn fill<T: Copy>(self, table: &[T; 256], first: usize, out: &mut [T]) {
        debug_assert!(first.is_multiple_of(8), "words are not split");
        for (position, chunk) in (first as u64 / 8..).zip(out.chunks_mut(8)) {
            for (value, byte) in chunk.iter_mut().zip(self.word(position).to_le_bytes()) {
                *value = table[usize::from(byte)];
            }
        }
    }

    /// A value of nearly normal distribution, mean 0 and variance 1 (a sum of four uniforms).
    pub(crate) fn normal(self, position: u64) -> f64 {
        let word = self.word(position);
        let sum: u64 = (0..4).map(|part| (word >> (16 * part)) & 0xffff).sum();
        // Four uniforms on 0..65536 have mean 4 * 65535 / 2 and variance 4 * 65536² / 12.
        (sum as f64 - 131_070.0) / (65_536.0 / 3.0_f64.sqrt())
    }
}

/// Shuffles `0..n`.
pub(crate) fn permutation(stream: Stream, n: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    for last in (1..n).rev() {
        order.swap(last, stream.below(last as u64, last + 1));
    }
    order
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fill_does_not_depend_on_where_it_starts() {
        let table: [u16; 256] = std::array::from_fn(|i| i as u16);
        let stream = Stream::new(7).child(3);
        let mut whole = [0; 40];
        stream.fill(&table, 0, &mut whole);
        let mut tail = [0; 21];
        stream.fill(&table, 16, &mut tail);
        assert_eq!(whole[16..37], tail);
    }

    #[test]
    fn streams_differ_by_seed_and_by_name() {
        let words = [
            Stream::new(1).word(0),
            Stream::new(1).word(1),
            Stream::new(2).word(0),
            Stream::new(1).child(0).word(0),
            Stream::new(1).child(1).word(0),
            Stream::new(1).child(1).child(0).word(0),
        ];
        for (i, a) in words.iter().enumerate() {
            assert!(words[i + 1..].iter().all(|b| a != b));
        }
    }

    #[test]
    fn normal_has_mean_zero_and_variance_one() {
        let stream = Stream::new(5);
        let values: Vec<f64> = (0..40_000).map(|i| stream.normal(i)).collect();
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let variance = values.iter().map(|v| v * v).sum::<f64>() / values.len() as f64;
        assert!(mean.abs() < 0.02, "{mean}");
        assert!((variance - 1.0).abs() < 0.03, "{variance}");
    }

    #[test]
    fn permutation_keeps_every_element() {
        let mut order = permutation(Stream::new(9), 100);
        assert_ne!(order, (0..100).collect::<Vec<_>>());
        order.sort_unstable();
        assert_eq!(order, (0..100).collect::<Vec<_>>());
    }
}
