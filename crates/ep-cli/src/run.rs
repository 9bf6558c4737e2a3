//! `ep run`: one mixture-of-experts layer over several ranks, checked.
//!
//! The head makes a [`Job`] of its arguments, starts the ranks, and sums up what they found. A rank
//! makes its data from the seed, runs the layer through a [`Transport`], the only door to the code
//! under test, and compares the result with the [reference](mod@reference).

mod args;
mod check;
#[cfg(feature = "cuda")]
mod cublas;
mod dense;
mod e4m3;
mod experts;
#[cfg(feature = "cuda")]
mod gpu;
mod reference;
mod report;
mod transport;

use std::process::ExitCode;
use std::time::Instant;

use half::bf16;

pub(crate) use self::args::Args;
use self::check::Comparison;
use self::report::{Outcome, Report};
use self::transport::Transport;
use crate::failure::{self, Failure};
use crate::layer::{Job, Model, Routes, router};
use crate::output::print;
use crate::ranks::{self, Member, Work, cores};
use crate::session::Times;

/// Runs the command and says how it went.
pub(crate) fn main(args: &Args) -> ExitCode {
    failure::exit_code(launch(args))
}

/// Whether the layer was right.
fn launch(args: &Args) -> Result<bool, Failure> {
    let start = Instant::now();
    let job = args.job(cores())?;
    let outcomes = ranks::run(&job, &args.place, args.ranks_per_gpu, start)?;
    let report = Report::new(&job, &outcomes);
    if args.json {
        eprintln!("{report}");
        print(serde_json::to_string(&report)?)?;
    } else {
        print(&report)?;
    }
    Ok(report.verified())
}

impl Work for Job {
    type Outcome = Outcome;
    const RANK_COMMAND: &'static str = "run-rank";

    fn ranks(&self) -> usize {
        self.ranks
    }

    fn run(&self, member: &Member<'_>) -> Result<Outcome, Failure> {
        let connect = |model: &Model| {
            let (device, communicator) = member.connect()?;
            transport::connect(self, member.rank, model, &device, &communicator)
        };
        let progress = |text: &str| member.progress(text);
        run(self, member.rank, connect, progress, |layer| {
            member.tell(layer)
        })
    }
}

/// Runs the layer as `rank`, times it, and compares its output with the reference.
fn run(
    job: &Job,
    rank: usize,
    connect: impl FnOnce(&Model) -> Result<Box<dyn Transport>, Failure>,
    progress: impl Fn(&str),
    tell: impl FnOnce(Result<Passes, Failure>) -> Result<Passes, Failure>,
) -> Result<Outcome, Failure> {
    let model = Model::new(job);
    let x = model.tokens(rank);
    let routes = router::route(job, &model, rank, &x)?;
    progress("connecting");
    let mut transport = connect(&model)?;
    let facts = transport.facts();
    progress(&format!("memory: {}", facts.plan));

    let passes = tell(passes(job, &mut *transport, &x, &routes, &progress));
    let Passes {
        output,
        times,
        again,
    } = passes?;
    transport.close()?;

    progress("float64 reference");
    let expected = reference::layer(job, &model, &x, &routes)?;
    Ok(Outcome {
        facts,
        comparison: Comparison::of(&output, &expected, job.hidden),
        repeatable: bits(&again).eq(bits(&output)),
        times,
    })
}

/// What came of the layer.
struct Passes {
    output: Vec<bf16>,
    times: Times,
    /// The same once more.
    again: Vec<bf16>,
}

fn passes(
    job: &Job,
    transport: &mut dyn Transport,
    x: &[bf16],
    routes: &Routes,
    progress: &impl Fn(&str),
) -> Result<Passes, Failure> {
    progress("router, dispatch, experts, combine");
    let output = transport.layer(x, routes)?;
    if job.iters > 0 {
        progress(&format!("timing {} dispatches and combines", job.iters));
    }
    Ok(Passes {
        output,
        times: transport.time(job.iters)?,
        again: transport.layer(x, routes)?,
    })
}

fn bits(values: &[bf16]) -> impl Iterator<Item = u16> + '_ {
    values.iter().map(|v| v.to_bits())
}

#[cfg(test)]
mod tests {
    use super::experts::{HostExperts, Received, Rows};
    use super::*;
    use crate::layer::job::tests::small;
    use crate::layer::{Dtype, Routing};
    use crate::session::Facts;

    /// All ranks' experts in one place: dispatch is a copy, combine a sum.
    struct Local {
        job: Job,
        model: Model,
        /// Leaves this (token, top-k entry) out.
        lost: Option<(usize, usize)>,
    }

    impl Transport for Local {
        fn facts(&self) -> Facts {
            Facts {
                backend: "local".to_owned(),
                alloc: "heap".to_owned(),
                plan: String::new(),
                symmetric_bytes: 0,
            }
        }

        fn layer(&mut self, x: &[bf16], routes: &Routes) -> Result<Vec<bf16>, Failure> {
            let (hidden, top_k) = (self.job.hidden, self.job.top_k);
            let mut output = vec![bf16::NAN; x.len()];
            for (token, output) in output.chunks_exact_mut(hidden).enumerate() {
                let x = &x[token * hidden..(token + 1) * hidden];
                let mut sum = vec![0.0; hidden];
                for k in 0..top_k {
                    let id = routes.ids[token * top_k + k];
                    if id < 0 || self.lost == Some((token, k)) {
                        continue;
                    }
                    let expert = id as usize;
                    let locals = self.job.local_experts();
                    let mut counts = vec![0; locals];
                    counts[expert % locals] = 1;
                    let mut rows = vec![bf16::ZERO; locals * hidden];
                    rows[expert % locals * hidden..][..hidden].copy_from_slice(x);
                    let mut y = vec![bf16::NAN; rows.len()];
                    let received = Received {
                        rows: Rows::Bf16(&rows),
                        counts: &counts,
                    };
                    HostExperts::new(&self.job, &self.model, expert / locals)
                        .forward(&received, &mut y);
                    let weight = routes.weights[token * top_k + k];
                    for (sum, y) in sum.iter_mut().zip(&y[expert % locals * hidden..]) {
                        *sum += weight * y.to_f32();
                    }
                }
                for (output, sum) in output.iter_mut().zip(sum) {
                    *output = bf16::from_f32(sum);
                }
            }
            Ok(output)
        }

        fn time(&mut self, iters: usize) -> Result<Times, Failure> {
            Ok(Times {
                dispatch_us: vec![1.0; iters],
                combine_us: vec![2.0; iters],
            })
        }

        fn close(self: Box<Self>) -> Result<(), Failure> {
            Ok(())
        }
    }

    fn report(job: &Job, lost: Option<(usize, usize)>) -> Report {
        let outcomes: Vec<Outcome> = (0..job.ranks)
            .map(|rank| {
                let connect = |model: &Model| -> Result<Box<dyn Transport>, Failure> {
                    Ok(Box::new(Local {
                        job: job.clone(),
                        model: model.clone(),
                        lost,
                    }))
                };
                run(job, rank, connect, |_| {}, |passes| passes).unwrap()
            })
            .collect();
        Report::new(job, &outcomes)
    }

    #[test]
    fn a_right_layer_is_verified() {
        for routing in [Routing::Uniform, Routing::Zipf, Routing::Hot, Routing::One] {
            let job = Job { routing, ..small() };
            let report = report(&job, None);
            assert!(report.verified(), "{report}");
        }
    }

    #[test]
    fn a_layer_that_loses_one_row_is_not() {
        for dtype in [Dtype::Bf16, Dtype::Fp8] {
            let job = Job {
                dtype,
                tokens: 64,
                ..small()
            };
            let report = report(&job, Some((40, 2)));
            assert!(!report.verified(), "{report}");
        }
    }
}
