//! The layer's data: tokens, router and expert weights, all functions of the seed. Nothing is kept;
//! whoever needs a row makes it again.

use half::bf16;

use super::job::{Job, Routing};
use super::random::{Stream, permutation};

/// The data of one job.
#[derive(Clone, Debug)]
pub(crate) struct Model {
    stream: Stream,
    tokens: usize,
    hidden: usize,
    intermediate: usize,
    experts: usize,
    top_k: usize,
    routing: Routing,
}

/// A weight matrix of a SwiGLU expert: `down · (silu(gate · x) * (up · x))`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Matrix {
    /// `[intermediate, hidden]`
    Gate,
    /// `[intermediate, hidden]`
    Up,
    /// `[hidden, intermediate]`
    Down,
}

// Names of the model's streams.
const TOKENS: u64 = 0;
const ROUTER: u64 = 1;
const BIAS: u64 = 2;
const EXPERTS: u64 = 3;
const POPULAR: u64 = 4;

impl Model {
    pub(crate) fn new(job: &Job) -> Self {
        Self {
            stream: Stream::new(job.seed),
            tokens: job.tokens,
            hidden: job.hidden,
            intermediate: job.intermediate,
            experts: job.experts,
            top_k: job.top_k,
            routing: job.routing.clone(),
        }
    }

    /// The tokens of `rank`, `[tokens, hidden]`: nearly normal, variance 1.
    pub(crate) fn tokens(&self, rank: usize) -> Vec<bf16> {
        let stream = self.stream.child(TOKENS).child(rank as u64);
        let values = (self.tokens * self.hidden) as u64;
        (0..values)
            .map(|i| bf16::from_f64(stream.normal(i)))
            .collect()
    }

    /// A row of the router's weights, `[hidden]`: logits of variance 1.
    pub(crate) fn router_row(&self, expert: usize) -> Vec<f64> {
        let mut row = vec![0.0; self.hidden];
        self.fill_router_row(expert, 0, &mut row);
        row
    }

    /// Writes a part of [`router_row`](Self::router_row), from `column`, a multiple of 8.
    pub(crate) fn fill_router_row(&self, expert: usize, column: usize, out: &mut [f64]) {
        let stream = self.stream.child(ROUTER).child(expert as u64);
        stream.fill(&table(self.hidden), column, out);
    }

    /// The bias that the router adds to scores for selection only, one for each expert: small and
    /// random as left by a trained load balancer, and beside that what makes a routing skewed.
    pub(crate) fn selection_bias(&self) -> Vec<f64> {
        let small = self.stream.child(BIAS);
        let mut bias: Vec<f64> = (0..self.experts)
            .map(|e| 0.01 * small.normal(e as u64))
            .collect();
        let popular = self.stream.child(POPULAR);
        let (experts, chosen) = (self.experts as f64, self.top_k as f64);
        match self.routing {
            Routing::Zipf => {
                let harmonic: f64 = (1..=self.experts).map(|place| 1.0 / place as f64).sum();
                let order = permutation(popular, self.experts);
                for (place, expert) in order.into_iter().enumerate() {
                    bias[expert] += bias_for(chosen / harmonic / (place + 1) as f64);
                }
            }
            Routing::Hot => {
                // As many as a token takes, next to each other; they get three choices in four.
                let first = popular.below(0, self.experts - self.top_k + 1);
                let hot = first..first + self.top_k;
                let other = 0.25 * chosen / (experts - chosen).max(1.0);
                for (expert, bias) in bias.iter_mut().enumerate() {
                    *bias += bias_for(if hot.contains(&expert) { 0.75 } else { other });
                }
            }
            Routing::Uniform | Routing::One | Routing::File(_) => {}
        }
        bias
    }

    /// The experts that [`Routing::One`] sends every token to.
    pub(crate) fn only_experts(&self) -> Vec<usize> {
        let first = self.stream.child(POPULAR).below(0, self.experts);
        (0..self.top_k)
            .map(|k| (first + k) % self.experts)
            .collect()
    }

    /// The experts' weights as `T`, whose values are those of bf16 exactly.
    pub(crate) fn experts<T: Copy + From<bf16>>(&self) -> Experts<T> {
        Experts {
            stream: self.stream.child(EXPERTS),
            from_hidden: table(self.hidden),
            from_intermediate: table(self.intermediate),
        }
    }
}

/// The bias with which an expert's score is above zero with a probability near `p`. A score is the
/// sigmoid of a normal variable, whose quantile is a logit over 1.702.
fn bias_for(p: f64) -> f64 {
    let p = p.clamp(1e-4, 0.95);
    -sigmoid(((1.0 - p) / p).ln() / 1.702)
}

pub(crate) fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// The experts' weights.
#[derive(Clone, Debug)]
pub(crate) struct Experts<T> {
    stream: Stream,
    from_hidden: [T; 256],
    from_intermediate: [T; 256],
}

impl<T: Copy> Experts<T> {
    /// Writes a part of a row, from `column`, a multiple of 8.
    pub(crate) fn fill(
        &self,
        expert: usize,
        matrix: Matrix,
        row: usize,
        column: usize,
        out: &mut [T],
    ) {
        let stream = self
            .stream
            .child(expert as u64)
            .child(matrix as u64)
            .child(row as u64);
        let table = match matrix {
            Matrix::Gate | Matrix::Up => &self.from_hidden,
            Matrix::Down => &self.from_intermediate,
        };
        stream.fill(table, column, out);
    }
}

/// A uniform distribution of mean 0 and variance `1 / fan_in` in 256 bf16 values, so that a product
/// keeps the variance of its input.
fn table<T: From<bf16>>(fan_in: usize) -> [T; 256] {
    let step = (12.0 / (256.0 * 256.0 - 1.0) / fan_in as f64).sqrt();
    std::array::from_fn(|i| bf16::from_f64((i as f64 - 127.5) * step).into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::job::tests::small;

    #[test]
    fn the_same_seed_gives_the_same_data_in_every_precision() {
        let model = Model::new(&small());
        assert_eq!(model.tokens(1), Model::new(&small()).tokens(1));
        assert_ne!(model.tokens(0), model.tokens(1));

        let mut exact = vec![0.0; 128];
        model.experts::<f64>().fill(3, Matrix::Up, 5, 0, &mut exact);
        let mut single = vec![0.0; 120];
        model
            .experts::<f32>()
            .fill(3, Matrix::Up, 5, 8, &mut single);
        let mut half = vec![bf16::ZERO; 120];
        model.experts::<bf16>().fill(3, Matrix::Up, 5, 8, &mut half);
        for i in 0..120 {
            assert_eq!(exact[8 + i], f64::from(single[i]));
            assert_eq!(exact[8 + i], f64::from(half[i]));
        }
        let mut other = vec![0.0; 128];
        model
            .experts::<f64>()
            .fill(3, Matrix::Gate, 5, 0, &mut other);
        assert_ne!(exact, other);
    }

    #[test]
    fn weights_have_the_variance_of_their_fan_in() {
        let values = table::<f64>(512);
        let mean = values.iter().sum::<f64>() / 256.0;
        let variance = values.iter().map(|v| v * v).sum::<f64>() / 256.0;
        assert!(mean.abs() < 1e-9, "{mean}");
        assert!((variance * 512.0 - 1.0).abs() < 0.01, "{variance}");
    }

    #[test]
    fn only_experts_are_distinct() {
        for seed in 0..20 {
            let job = Job {
                top_k: 8,
                experts: 8,
                seed,
                ..small()
            };
            let mut only = Model::new(&job).only_experts();
            only.sort_unstable();
            assert_eq!(only, (0..8).collect::<Vec<_>>());
        }
    }
}
