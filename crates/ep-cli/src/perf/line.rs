//! What is printed of a shape.

use serde::{Deserialize, Serialize};

use super::Found;
use super::args::{Sweep, Weights};
use crate::layer::{Dtype, Job};
use crate::statistics::{quantile, rounded, slowest};

/// GB/s that a GPU of an HGX H200 host sends and receives when all send to all, as measured with
/// plain stores: the ceiling that floors are computed with.
const WIRE_GBS: f64 = 356.0;

/// What one rank measured of a shape.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Measurement {
    pub(crate) tokens: usize,
    /// Most multiprocessors that an operation occupies.
    pub(crate) sms: u32,
    /// Tokens that go to each rank, which are rows on the wire: one copy for each rank.
    pub(crate) rows: Vec<usize>,
    pub(crate) times: Times,
}

/// Microseconds of each timed call.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Times {
    pub(crate) dispatch_us: Vec<f64>,
    pub(crate) combine_us: Vec<f64>,
    pub(crate) empty_us: Vec<f64>,
}

impl Times {
    /// Leaves the first calls out.
    pub(super) fn forget(&mut self, calls: usize) {
        let Self {
            dispatch_us,
            combine_us,
            empty_us,
        } = self;
        for times in [dispatch_us, combine_us, empty_us] {
            times.drain(..calls.min(times.len()));
        }
    }
}

/// The line of a shape.
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
    /// Median over the timed calls of the slowest rank.
    dispatch_us: f64,
    combine_us: f64,
    /// 99th percentile of the same.
    dispatch_p99_us: f64,
    combine_p99_us: f64,
    /// Bytes over the busiest link direction per time.
    dispatch_wire_gbs: f64,
    combine_wire_gbs: f64,
    /// The time of those bytes at [`WIRE_GBS`].
    dispatch_floor_us: f64,
    combine_floor_us: f64,
    sms: u32,
    /// Median, in the same way, of a kernel without work.
    empty_us: f64,
    weights: Weights,
    /// `"cuda"`, or `"sim"`: the host's time, which says nothing about a GPU's.
    backend: String,
    /// Kind of the symmetric memory.
    alloc: String,
    /// How many calls were timed.
    iters: usize,
}

impl Line {
    /// Sums up what the ranks measured of a shape.
    pub(crate) fn new(sweep: &Sweep, found: &Found, measured: &[&Measurement]) -> Self {
        let job = &sweep.job;
        let rows: Vec<&[usize]> = measured.iter().map(|m| &m.rows[..]).collect();
        let rows = busiest(&rows);
        let dispatched = Wire::new(rows, dispatch_row(job));
        let combined = Wire::new(rows, 2 * job.hidden);
        let calls =
            |times: fn(&Times) -> &Vec<f64>| slowest(measured.iter().map(|m| times(&m.times)));
        let dispatch = calls(|times| &times.dispatch_us);
        let combine = calls(|times| &times.combine_us);
        let empty = calls(|times| &times.empty_us);
        let median = |calls: &[f64]| quantile(calls, 0.5);
        let p99 = |calls: &[f64]| quantile(calls, 0.99);
        let first = measured.first();
        Self {
            lib: "ep",
            ranks: job.ranks,
            tokens: first.map_or(0, |m| m.tokens),
            hidden: job.hidden,
            experts: job.experts,
            topk: job.top_k,
            fp8: job.dtype == Dtype::Fp8,
            routing: job.routing.to_string(),
            graph: sweep.graph,
            dispatch_us: rounded(median(&dispatch)),
            combine_us: rounded(median(&combine)),
            dispatch_p99_us: rounded(p99(&dispatch)),
            combine_p99_us: rounded(p99(&combine)),
            dispatch_wire_gbs: rounded(dispatched.gbs(median(&dispatch))),
            combine_wire_gbs: rounded(combined.gbs(median(&combine))),
            dispatch_floor_us: rounded(dispatched.floor_us()),
            combine_floor_us: rounded(combined.floor_us()),
            sms: first.map_or(0, |m| m.sms),
            empty_us: rounded(median(&empty)),
            weights: sweep.weights,
            backend: found.backend.clone(),
            alloc: found.alloc.clone(),
            iters: dispatch.len(),
        }
    }
}

/// Bytes of a dispatched row. Combine sends BF16.
fn dispatch_row(job: &Job) -> usize {
    match job.dtype {
        Dtype::Bf16 => 2 * job.hidden,
        Dtype::Fp8 => job.hidden + job.hidden / 128 * size_of::<f32>(),
    }
}

/// Rows over the busiest direction of a rank's link, of `rows[from][to]`. Combine has the same with
/// the directions exchanged.
fn busiest(rows: &[&[usize]]) -> usize {
    let others = |rank: usize| (0..rows.len()).filter(move |&other| other != rank);
    (0..rows.len())
        .flat_map(|rank| {
            let sent: usize = others(rank).map(|to| rows[rank][to]).sum();
            let received: usize = others(rank).map(|from| rows[from][rank]).sum();
            [sent, received]
        })
        .max()
        .unwrap_or(0)
}

/// Bytes over one direction of a link.
#[derive(Clone, Copy, Debug)]
struct Wire {
    bytes: usize,
}

impl Wire {
    fn new(rows: usize, row: usize) -> Self {
        Self { bytes: rows * row }
    }

    fn floor_us(self) -> f64 {
        self.bytes as f64 / (WIRE_GBS * 1e3)
    }

    fn gbs(self, us: f64) -> f64 {
        self.bytes as f64 / (us * 1e3)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::Model;
    use crate::perf::args::tests::parse;
    use crate::perf::routes;

    #[test]
    fn the_busiest_direction_counts_what_leaves_a_rank() {
        // To itself a rank sends nothing over the wire.
        assert_eq!(busiest(&[&[100]]), 0);
        assert_eq!(busiest(&[&[9, 1, 2], &[3, 9, 4], &[5, 6, 9]]), 11);
        // Rank 1 receives more than any rank sends.
        assert_eq!(busiest(&[&[0, 8, 1], &[0, 0, 0], &[0, 8, 0]]), 16);
    }

    #[test]
    fn a_line_has_the_slowest_rank_and_the_floor_of_the_busiest_link() {
        let sweep = parse("--ranks 2 --tokens 128 --iters 3").sweep().unwrap();
        let measured = [
            Measurement {
                tokens: 128,
                sms: 132,
                rows: vec![127, 100],
                times: Times {
                    dispatch_us: vec![10.0, 30.0, 12.0],
                    combine_us: vec![20.0, 20.0, 20.0],
                    empty_us: vec![4.5, 4.0, 4.0],
                },
            },
            Measurement {
                tokens: 128,
                sms: 132,
                rows: vec![125, 128],
                times: Times {
                    dispatch_us: vec![11.0, 13.0, 14.0],
                    combine_us: vec![19.0, 25.0, 21.0],
                    empty_us: vec![4.0, 4.5, 4.5],
                },
            },
        ];
        let found = Found {
            backend: "cuda".to_owned(),
            alloc: "posix_fd".to_owned(),
            shapes: Vec::new(),
        };
        let line = Line::new(&sweep, &found, &[&measured[0], &measured[1]]);
        let line = serde_json::to_string(&line).unwrap();
        // 125 rows of 7168 + 56 · 4 = 7392 bytes are 924,000 bytes: 2.596 µs; 66.0 GB/s in 14 µs.
        // 125 rows of 14,336 bytes are 1,792,000 bytes: 5.034 µs; 85.3 GB/s in 21 µs.
        assert_eq!(
            line,
            concat!(
                r#"{"lib":"ep","ranks":2,"tokens":128,"hidden":7168,"experts":256,"topk":8,"#,
                r#""fp8":true,"routing":"uniform","graph":false,"dispatch_us":14.0,"#,
                r#""combine_us":21.0,"dispatch_p99_us":30.0,"combine_p99_us":25.0,"#,
                r#""dispatch_wire_gbs":66.0,"combine_wire_gbs":85.33,"dispatch_floor_us":2.6,"#,
                r#""combine_floor_us":5.03,"sms":132,"empty_us":4.5,"weights":"dispatch","#,
                r#""backend":"cuda","alloc":"posix_fd","iters":3}"#
            )
        );
    }

    /// The line of a shape whose rows are those of the routing that `ep perf` draws.
    fn drawn(options: &str) -> (Line, Vec<Vec<usize>>) {
        let sweep = parse(options).sweep().unwrap();
        let job = &sweep.job;
        let model = Model::new(job);
        let measured: Vec<Measurement> = (0..job.ranks)
            .map(|rank| Measurement {
                tokens: job.tokens,
                rows: routes::rows(job, &routes::routes(job, &model, rank).ids),
                ..Measurement::default()
            })
            .collect();
        let measured: Vec<&Measurement> = measured.iter().collect();
        let found = Found {
            backend: "sim".to_owned(),
            alloc: "malloc".to_owned(),
            shapes: Vec::new(),
        };
        let rows = measured.iter().map(|m| m.rows.clone()).collect();
        (Line::new(&sweep, &found, &measured), rows)
    }

    #[test]
    fn the_floor_of_one_owner_is_that_of_its_receiving_link() {
        // Neither expert has a neighbour on its rank: each owner receives the 100 tokens of 3 ranks,
        // while a rank sends 200 rows at most.
        for seed in 0..4 {
            let (line, rows) = drawn(&format!(
                "--ranks 4 --experts 4 --top-k 2 --tokens 100 --routing one --seed {seed}"
            ));
            for rows in rows {
                assert_eq!(rows.iter().sum::<usize>(), 200);
            }
            // 300 rows of 7392 bytes at 356 GB/s; of 14,336 bytes on the way back.
            assert_eq!(line.dispatch_floor_us, 6.23);
            assert_eq!(line.combine_floor_us, 12.08);
        }
    }

    #[test]
    fn the_floor_of_a_hot_routing_is_that_of_the_rank_with_the_hot_experts() {
        let (line, rows) = drawn("--ranks 4 --experts 64 --top-k 2 --tokens 400 --routing hot");
        let received = |to: usize| rows.iter().map(|from| from[to]).sum::<usize>() - rows[to][to];
        let most = (0..4).map(received).max().unwrap();
        // The two hot experts have 3 choices in 4, so their rank gets nearly every token.
        assert!(most > 900 && most <= 1200, "{rows:?}");
        let sent = |from: usize| rows[from].iter().sum::<usize>() - rows[from][from];
        assert!((0..4).all(|from| sent(from) < most), "{rows:?}");
        assert_eq!(
            line.dispatch_floor_us,
            rounded(most as f64 * 7392.0 / 356e3)
        );
    }

    #[test]
    fn the_99th_percentile_of_1000_calls_is_the_990th() {
        let sweep = parse("--ranks 1 --iters 1000").sweep().unwrap();
        // 7 has no divisor in common with 1000: every number once, in disorder.
        let calls: Vec<f64> = (0..1000)
            .map(|call| f64::from(call * 7 % 1000 + 1))
            .collect();
        let mut times = Times {
            dispatch_us: [vec![9e9; 5], calls].concat(),
            ..Times::default()
        };
        times.forget(5);
        let measured = Measurement {
            rows: vec![1],
            times: Times {
                combine_us: times.dispatch_us.clone(),
                ..times
            },
            ..Measurement::default()
        };
        let found = Found {
            backend: "cuda".to_owned(),
            alloc: "malloc".to_owned(),
            shapes: Vec::new(),
        };
        let line = Line::new(&sweep, &found, &[&measured]);
        assert_eq!((line.dispatch_us, line.dispatch_p99_us), (500.0, 990.0));
        assert_eq!((line.combine_us, line.combine_p99_us), (500.0, 990.0));
        assert_eq!(line.iters, 1000);
    }

    #[test]
    fn bf16_rows_are_twice_the_channels() {
        let job = parse("--dtype bf16 --hidden 2048").sweep().unwrap().job;
        assert_eq!(dispatch_row(&job), 4096);
        let fp8 = Job {
            dtype: Dtype::Fp8,
            ..job
        };
        assert_eq!(dispatch_row(&fp8), 2048 + 64);
    }
}
