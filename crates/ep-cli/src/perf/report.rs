//! The lines of `ep perf`.

use serde::{Deserialize, Serialize};

use super::Sweep;
use crate::failure::Failure;
use crate::layer::{Dtype, Job};
use crate::session::{Facts, Times};
use crate::statistics::{quantile, rounded, slowest};

/// What all GPUs at once can push to all others, bytes a microsecond and GPU: measured on 4 H200s.
const WIRE: f64 = 356_000.0;

/// What one rank measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Outcome {
    pub(super) facts: Facts,
    /// Multiprocessors that an operation may occupy.
    pub(super) sms: u32,
    /// Of calls that do nothing.
    pub(super) empty_us: Vec<f64>,
    /// In the order of the sweep.
    pub(super) shapes: Vec<Shape>,
}

/// What one rank measured of one batch size.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Shape {
    /// Rows that this rank sends to each rank.
    pub(super) rows: Vec<u64>,
    pub(super) times: Times,
}

/// One line. Times are in microseconds, rates in 10⁹ bytes a second of the busiest rank; a floor is
/// what the busiest rank's bytes take on the wire.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Line {
    lib: &'static str,
    ranks: usize,
    tokens: usize,
    hidden: usize,
    experts: usize,
    topk: usize,
    fp8: bool,
    routing: String,
    graph: bool,
    dispatch_us: f64,
    combine_us: f64,
    dispatch_p99_us: f64,
    combine_p99_us: f64,
    dispatch_wire_gbs: f64,
    combine_wire_gbs: f64,
    dispatch_floor_us: f64,
    combine_floor_us: f64,
    sms: u32,
    empty_us: f64,
    backend: String,
    alloc: String,
    iters: usize,
}

/// A rank brought back something else than it was asked for.
#[derive(Debug, thiserror::Error)]
#[error("the ranks disagree about the shapes; check that all processes are of one build")]
struct Disagreement;

impl Line {
    /// The lines of a sweep, from what each rank measured.
    pub(super) fn of_sweep(sweep: &Sweep, outcomes: &[Outcome]) -> Result<Vec<Self>, Failure> {
        let whole = |o: &Outcome| o.shapes.len() == sweep.tokens.len();
        let first = match outcomes {
            [first, ..] if outcomes.iter().all(whole) => first,
            _ => return Err(Disagreement.into()),
        };
        let empty = slowest(outcomes.iter().map(|o| &o.empty_us));
        let line = |(index, &tokens): (usize, &usize)| {
            let job = &sweep.job;
            let shapes = || outcomes.iter().map(|o| &o.shapes[index]);
            let dispatch = slowest(shapes().map(|s| &s.times.dispatch_us));
            let combine = slowest(shapes().map(|s| &s.times.combine_us));
            let rows = busiest(&shapes().map(|s| s.rows.as_slice()).collect::<Vec<_>>()) as f64;
            let dispatch_bytes = rows * dispatch_row(job);
            let combine_bytes = rows * 2.0 * job.hidden as f64;
            Self {
                lib: "ep",
                ranks: job.ranks,
                tokens,
                hidden: job.hidden,
                experts: job.experts,
                topk: job.top_k,
                fp8: job.dtype == Dtype::Fp8,
                routing: job.routing.to_string(),
                graph: false,
                dispatch_us: rounded(quantile(&dispatch, 0.5)),
                combine_us: rounded(quantile(&combine, 0.5)),
                dispatch_p99_us: rounded(quantile(&dispatch, 0.99)),
                combine_p99_us: rounded(quantile(&combine, 0.99)),
                dispatch_wire_gbs: rate(dispatch_bytes, quantile(&dispatch, 0.5)),
                combine_wire_gbs: rate(combine_bytes, quantile(&combine, 0.5)),
                dispatch_floor_us: rounded(dispatch_bytes / WIRE),
                combine_floor_us: rounded(combine_bytes / WIRE),
                sms: outcomes.iter().map(|o| o.sms).min().unwrap_or(0),
                empty_us: rounded(quantile(&empty, 0.5)),
                backend: first.facts.backend.clone(),
                alloc: first.facts.alloc.clone(),
                iters: job.iters,
            }
        };
        Ok(sweep.tokens.iter().enumerate().map(line).collect())
    }
}

/// Bytes of a row that dispatch sends: the token, and its scales with FP8.
fn dispatch_row(job: &Job) -> f64 {
    let bytes = match job.dtype {
        Dtype::Bf16 => 2 * job.hidden,
        Dtype::Fp8 => job.hidden + job.hidden / 128 * size_of::<f32>(),
    };
    bytes as f64
}

/// Rows that the busiest rank sends to others, or receives from others, whichever are more.
/// `rows[s][d]` go from `s` to `d`. They come back in combine.
fn busiest(rows: &[&[u64]]) -> u64 {
    let link = |from: usize, to: usize| {
        let rows = rows.get(from).and_then(|rows| rows.get(to));
        if from == to {
            0
        } else {
            rows.copied().unwrap_or(0)
        }
    };
    let ranks = 0..rows.len();
    let sent = |rank| ranks.clone().map(|peer| link(rank, peer)).sum();
    let received = |rank| ranks.clone().map(|peer| link(peer, rank)).sum();
    ranks
        .clone()
        .map(|rank| u64::max(sent(rank), received(rank)))
        .max()
        .unwrap_or(0)
}

fn rate(bytes: f64, us: f64) -> f64 {
    (bytes / us / 100.0).round() / 10.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::job::tests::small;

    #[test]
    fn the_busiest_rank_sends_or_receives() {
        assert_eq!(busiest(&[&[9, 1, 2], &[3, 9, 4], &[5, 6, 9]]), 11);
        assert_eq!(busiest(&[&[9, 7, 0], &[0, 9, 0], &[0, 7, 9]]), 14);
        assert_eq!(busiest(&[&[5]]), 0);
    }

    #[test]
    fn a_line_has_the_keys_of_its_kind_in_order() {
        let sweep = Sweep {
            job: Job {
                hidden: 7168,
                dtype: Dtype::Fp8,
                ..small()
            },
            tokens: vec![6],
            sms: 0,
        };
        let outcome = |rows: [u64; 2], dispatch: [f64; 3]| Outcome {
            facts: Facts {
                backend: "cuda".to_owned(),
                alloc: "malloc".to_owned(),
                plan: String::new(),
                symmetric_bytes: 0,
            },
            sms: 132,
            empty_us: vec![4.5; 3],
            shapes: vec![Shape {
                rows: rows.to_vec(),
                times: Times {
                    dispatch_us: dispatch.to_vec(),
                    combine_us: vec![20.0; 3],
                },
            }],
        };
        let outcomes = [
            outcome([4, 100], [9.0, 12.0, 8.0]),
            outcome([90, 4], [10.0, 11.0, 13.0]),
        ];
        let lines = Line::of_sweep(&sweep, &outcomes).unwrap();
        // 100 rows of 7168 + 56 * 4 bytes, and back as 14336 bytes.
        let expected = r#"{"lib":"ep","ranks":2,"tokens":6,"hidden":7168,"experts":8,"topk":3,"fp8":true,"routing":"uniform","graph":false,"dispatch_us":12.0,"combine_us":20.0,"dispatch_p99_us":13.0,"combine_p99_us":20.0,"dispatch_wire_gbs":61.6,"combine_wire_gbs":71.7,"dispatch_floor_us":2.08,"combine_floor_us":4.03,"sms":132,"empty_us":4.5,"#;
        let line = serde_json::to_string(&lines[0]).unwrap();
        assert!(line.starts_with(expected), "{line}");
        assert!(Line::of_sweep(&sweep, &[]).is_err());
    }
}
