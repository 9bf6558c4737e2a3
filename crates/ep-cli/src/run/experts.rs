//! The experts on the host, for the simulated cluster: SwiGLU on the rows that dispatch received,
//! with the roundings of the GPU's (bf16 between products, float32 within).

use half::bf16;

use super::dense;
use super::e4m3;
use crate::layer::job::Job;
use crate::layer::model::{Experts, Matrix, Model};
use crate::layer::parallel;

/// Channels that share a scale.
const SCALE_BLOCK: usize = 128;

/// What dispatch received: `counts[l]` rows of each local expert, at the start of its part.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Received<'a> {
    pub(crate) rows: Rows<'a>,
    /// `[local experts]`
    pub(crate) counts: &'a [i32],
}

/// Received rows, `[local experts, capacity, hidden]`.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Rows<'a> {
    Bf16(&'a [bf16]),
    Fp8 {
        /// E4M3.
        codes: &'a [u8],
        /// `[local experts, hidden / 128, capacity]`
        scales: &'a [f32],
    },
}

/// The experts of one rank.
#[derive(Debug)]
pub(crate) struct HostExperts {
    weights: Experts<f32>,
    first: usize,
    hidden: usize,
    intermediate: usize,
    threads: usize,
}

impl HostExperts {
    pub(crate) fn new(job: &Job, model: &Model, rank: usize) -> Self {
        Self {
            weights: model.experts(),
            first: rank * job.local_experts(),
            hidden: job.hidden,
            intermediate: job.intermediate,
            threads: job.threads,
        }
    }

    /// Writes the experts' outputs where `received` has their inputs.
    pub(crate) fn forward(&self, received: &Received<'_>, y: &mut [bf16]) {
        let part = y.len() / received.counts.len().max(1);
        let parts = y.chunks_exact_mut(part.max(1)).enumerate().collect();
        parallel::for_each(self.threads, parts, |(local, y): (usize, &mut [bf16])| {
            let count = usize::try_from(received.counts[local]).unwrap_or(0);
            let rows: Vec<Vec<f32>> = (0..count)
                .map(|row| self.row(received, part / self.hidden, local, row))
                .collect();
            let views: Vec<&[f32]> = rows.iter().map(Vec::as_slice).collect();
            let out = self.swiglu(self.first + local, &views);
            for (y, out) in y.iter_mut().zip(out) {
                *y = bf16::from_f32(out);
            }
        });
    }

    fn row(&self, received: &Received<'_>, capacity: usize, local: usize, row: usize) -> Vec<f32> {
        let begin = (local * capacity + row) * self.hidden;
        match received.rows {
            Rows::Bf16(x) => x[begin..begin + self.hidden]
                .iter()
                .map(|v| v.to_f32())
                .collect(),
            Rows::Fp8 { codes, scales } => {
                let blocks = self.hidden / SCALE_BLOCK;
                codes[begin..begin + self.hidden]
                    .chunks_exact(SCALE_BLOCK)
                    .enumerate()
                    .flat_map(|(block, codes)| {
                        let scale = scales[(local * blocks + block) * capacity + row];
                        codes
                            .iter()
                            .map(move |&c| round(e4m3::VALUES[usize::from(c)] * scale))
                    })
                    .collect()
            }
        }
    }

    fn swiglu(&self, expert: usize, x: &[&[f32]]) -> Vec<f32> {
        let width = 2 * self.intermediate;
        let fill = |row, column, out: &mut [f32]| {
            let matrix = if row < self.intermediate {
                Matrix::Gate
            } else {
                Matrix::Up
            };
            self.weights
                .fill(expert, matrix, row % self.intermediate, column, out);
        };
        let mut gate_up = dense::product(width, self.hidden, x, fill);
        for row in gate_up.chunks_exact_mut(width) {
            let (gate, up) = row.split_at_mut(self.intermediate);
            for (gate, up) in gate.iter_mut().zip(up) {
                let g = round(*gate);
                *gate = round(g / (1.0 + (-g).exp()) * round(*up));
            }
        }
        let activated: Vec<&[f32]> = gate_up
            .chunks_exact(width)
            .map(|row| &row[..self.intermediate])
            .collect();
        dense::product(
            self.hidden,
            self.intermediate,
            &activated,
            |row, column, out| {
                self.weights.fill(expert, Matrix::Down, row, column, out);
            },
        )
    }
}

/// To bf16 and back.
fn round(value: f32) -> f32 {
    bf16::from_f32(value).to_f32()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::job::tests::small;

    /// An expert's output for a row, straight from the definition.
    fn expected(job: &Job, expert: usize, x: &[f64]) -> Vec<f64> {
        let weights = Model::new(job).experts::<f64>();
        let times = |matrix, rows: usize, x: &[f64]| -> Vec<f64> {
            let mut row = vec![0.0; x.len()];
            (0..rows)
                .map(|i| {
                    weights.fill(expert, matrix, i, 0, &mut row);
                    row.iter().zip(x).map(|(w, x)| w * x).sum()
                })
                .collect()
        };
        let gate = times(Matrix::Gate, job.intermediate, x);
        let up = times(Matrix::Up, job.intermediate, x);
        let activated: Vec<f64> = gate
            .iter()
            .zip(up)
            .map(|(g, u)| g / (1.0 + (-g).exp()) * u)
            .collect();
        times(Matrix::Down, job.hidden, &activated)
    }

    fn error(y: &[bf16], expected: &[f64]) -> f64 {
        let square = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
        let difference = square(&mut y.iter().zip(expected).map(|(y, e)| y.to_f64() - e));
        (difference / square(&mut expected.iter().copied())).sqrt()
    }

    #[test]
    fn bf16_rows_go_through_their_own_expert_and_no_other_row_is_written() {
        let job = small();
        let model = Model::new(&job);
        let (capacity, hidden) = (3, job.hidden);
        let x: Vec<bf16> = Model::new(&Job {
            tokens: 4 * capacity,
            ..job.clone()
        })
        .tokens(0);
        let counts = [2, 0, 3, 1];
        let received = Received {
            rows: Rows::Bf16(&x),
            counts: &counts,
        };
        let mut y = vec![bf16::NAN; x.len()];
        HostExperts::new(&job, &model, 1).forward(&received, &mut y);
        for (local, &count) in counts.iter().enumerate() {
            for row in 0..capacity {
                let at = (local * capacity + row) * hidden..(local * capacity + row + 1) * hidden;
                if row < count as usize {
                    let x: Vec<f64> = x[at.clone()].iter().map(|v| v.to_f64()).collect();
                    let error = error(&y[at], &expected(&job, 4 + local, &x));
                    assert!(error < 0.006, "{local} {row}: {error}");
                } else {
                    assert!(y[at].iter().all(|v| v.is_nan()), "{local} {row}");
                }
            }
        }
    }

    #[test]
    fn fp8_rows_are_scaled_by_block_and_row() {
        let job = Job {
            hidden: 256,
            dtype: crate::layer::job::Dtype::Fp8,
            ..small()
        };
        let model = Model::new(&job);
        let capacity = 2;
        let codes: Vec<u8> = (0..4 * capacity * 256)
            .map(|i| (i * 37 % 127) as u8)
            .collect();
        let scales: Vec<f32> = (0..4 * 2 * capacity)
            .map(|i| 0.001 * (i + 1) as f32)
            .collect();
        let received = Received {
            rows: Rows::Fp8 {
                codes: &codes,
                scales: &scales,
            },
            counts: &[2; 4],
        };
        let mut y = vec![bf16::NAN; codes.len()];
        HostExperts::new(&job, &model, 0).forward(&received, &mut y);
        for local in 0..4 {
            for row in 0..capacity {
                let at = (local * capacity + row) * 256;
                let x: Vec<f64> = (0..256)
                    .map(|h| {
                        let scale = scales[(local * 2 + h / 128) * capacity + row];
                        f64::from(e4m3::VALUES[usize::from(codes[at + h])]) * f64::from(scale)
                    })
                    .collect();
                let error = error(&y[at..at + 256], &expected(&job, local, &x));
                assert!(error < 0.008, "{local} {row}: {error}");
            }
        }
    }
}
