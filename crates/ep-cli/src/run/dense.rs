//! The matrix product that the reference (in f64) and the simulator's experts (in f32) share:
//! weights are made block by block and used for every token before they are forgotten.

use std::ops::{AddAssign, Mul};

/// What a product is accumulated in.
pub(crate) trait Real: Copy + Default + AddAssign + Mul<Output = Self> {}
impl Real for f32 {}
impl Real for f64 {}

/// Columns of a block of weights: with 64 rows of f64 it stays in a core's second-level cache, and
/// the tokens beside it in the first.
const DEPTH: usize = 512;
/// Partial sums per product, so that they fill vector registers.
const LANES: usize = 4;
/// Rows of weights and tokens that meet in registers.
const TILE: usize = 2;

/// `tokens · weightsᵀ`, row-major `[tokens, rows]`.
///
/// `weights(row, column, out)` writes a part of a row, from `column`, a multiple of 8.
pub(crate) fn product<T: Real>(
    rows: usize,
    depth: usize,
    tokens: &[&[T]],
    mut weights: impl FnMut(usize, usize, &mut [T]),
) -> Vec<T> {
    let mut out = vec![T::default(); tokens.len() * rows];
    let mut block = vec![T::default(); rows * DEPTH.min(depth)];
    for begin in (0..depth).step_by(DEPTH) {
        let width = DEPTH.min(depth - begin);
        let block = &mut block[..rows * width];
        for (row, part) in block.chunks_exact_mut(width).enumerate() {
            weights(row, begin, part);
        }
        for (pair, out) in tokens.chunks(TILE).zip(out.chunks_mut(TILE * rows)) {
            match pair {
                [a, b] => add_pair([a, b].map(|x| &x[begin..begin + width]), block, out),
                _ => {
                    for (x, out) in pair.iter().zip(out.chunks_mut(rows)) {
                        add_one(&x[begin..begin + width], block, out);
                    }
                }
            }
        }
    }
    out
}

/// Adds two tokens' products with a block into their two rows of `out`.
fn add_pair<T: Real>(x: [&[T]; TILE], block: &[T], out: &mut [T]) {
    let width = x[0].len();
    let rows = out.len() / TILE;
    let (first, second) = out.split_at_mut(rows);
    let targets = first.chunks_mut(TILE).zip(second.chunks_mut(TILE));
    for (weights, (first, second)) in block.chunks(TILE * width).zip(targets) {
        match (first, second) {
            ([a0, a1], [b0, b1]) => {
                let (w0, w1) = weights.split_at(width);
                let sums = tile([w0, w1], x);
                *a0 += sums[0][0];
                *a1 += sums[1][0];
                *b0 += sums[0][1];
                *b1 += sums[1][1];
            }
            (first, second) => {
                add_one(x[0], weights, first);
                add_one(x[1], weights, second);
            }
        }
    }
}

fn add_one<T: Real>(x: &[T], block: &[T], out: &mut [T]) {
    for (weights, out) in block.chunks_exact(x.len()).zip(out) {
        *out += tile([weights], [x])[0][0];
    }
}

/// Dot products of `R` rows of weights with `N` tokens, all of one length.
fn tile<T: Real, const R: usize, const N: usize>(w: [&[T]; R], x: [&[T]; N]) -> [[T; N]; R] {
    let w = w.map(|row| row.as_chunks::<LANES>());
    let x = x.map(|row| row.as_chunks::<LANES>());
    let mut lanes = [[[T::default(); LANES]; N]; R];
    for step in 0..w[0].0.len() {
        // Read once; the products below then stay in registers.
        let w: [[T; LANES]; R] = std::array::from_fn(|r| w[r].0[step]);
        let x: [[T; LANES]; N] = std::array::from_fn(|n| x[n].0[step]);
        for r in 0..R {
            for n in 0..N {
                for lane in 0..LANES {
                    lanes[r][n][lane] += w[r][lane] * x[n][lane];
                }
            }
        }
    }
    std::array::from_fn(|r| {
        std::array::from_fn(|n| {
            let mut sum = T::default();
            for lane in lanes[r][n] {
                sum += lane;
            }
            for (&w, &x) in w[r].1.iter().zip(x[n].1) {
                sum += w * x;
            }
            sum
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Small integers, whose sums are exact in any order.
    fn value(i: usize) -> f64 {
        (i * 2_654_435_761 % 17) as f64 - 8.0
    }

    #[test]
    fn equals_the_definition_for_odd_and_even_shapes() {
        for (rows, depth, count) in [(1, 1, 1), (2, 8, 2), (5, 13, 3), (6, 1100, 4), (3, 512, 5)] {
            let tokens: Vec<Vec<f64>> = (0..count)
                .map(|t| (0..depth).map(|k| value(t * 31 + k)).collect())
                .collect();
            let views: Vec<&[f64]> = tokens.iter().map(Vec::as_slice).collect();
            let weight = |row: usize, k: usize| value(row * 1009 + k * 3);
            let out = product(rows, depth, &views, |row, column, part: &mut [f64]| {
                for (k, w) in part.iter_mut().enumerate() {
                    *w = weight(row, column + k);
                }
            });
            for t in 0..count {
                for row in 0..rows {
                    let sum: f64 = (0..depth).map(|k| tokens[t][k] * weight(row, k)).sum();
                    assert_eq!(
                        out[t * rows + row],
                        sum,
                        "{rows} {depth} {count}: {t} {row}"
                    );
                }
            }
        }
    }

    #[test]
    fn no_tokens_make_no_rows() {
        let out = product(4, 16, &[], |_, _, part: &mut [f32]| part.fill(1.0));
        assert!(out.is_empty());
    }
}
