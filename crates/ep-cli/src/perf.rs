//! `ep perf`: what dispatch and combine cost, shape by shape.
//!
//! The head makes a [`Sweep`] of its arguments, starts the ranks, and prints a [`Line`] for each
//! shape. A rank makes its data from the seed and times every call.
//!
//! The method: data is random; the launch of a timed call hides behind a spinning barrier, in which
//! the ranks meet on the device; a call's time is that between an event before and one after it; of
//! each call the slowest rank counts.

mod args;
mod bench;
#[cfg(feature = "cuda")]
mod graph;
mod line;
mod routes;

use std::num::NonZeroUsize;
use std::process::ExitCode;
use std::time::Instant;

use serde::{Deserialize, Serialize};

pub(crate) use self::args::{Args, Sweep};
use self::bench::Bench;
use self::line::{Line, Measurement};
use crate::failure::{self, Failure};
use crate::layer::Model;
use crate::output::print;
use crate::ranks::{self, Member, Work};

/// Runs the command and says how it went.
pub(crate) fn main(args: &Args) -> ExitCode {
    failure::exit_code(measure(args).map(|()| true))
}

fn measure(args: &Args) -> Result<(), Failure> {
    let start = Instant::now();
    let sweep = args.sweep()?;
    let found = ranks::run(&sweep, &args.place, NonZeroUsize::MIN, start)?;
    for shape in 0..sweep.tokens.len() {
        let measured: Vec<&Measurement> = found.iter().map(|rank| &rank.shapes[shape]).collect();
        let line = Line::new(&sweep, &found[0], &measured);
        print(serde_json::to_string(&line)?)?;
    }
    Ok(())
}

/// What one rank found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Found {
    /// `"cuda"` or `"sim"`.
    backend: String,
    /// Kind of the symmetric memory.
    alloc: String,
    /// As many as the sweep has.
    shapes: Vec<Measurement>,
}

/// Why a sweep cannot be measured where it runs.
#[derive(Debug, thiserror::Error)]
#[error("only GPUs replay CUDA graphs; leave out --graph")]
struct NoGraphs;

impl Work for Sweep {
    type Outcome = Found;
    const RANK_COMMAND: &'static str = "perf-rank";

    fn ranks(&self) -> usize {
        self.job.ranks
    }

    fn run(&self, member: &Member<'_>) -> Result<Found, Failure> {
        let model = Model::new(&self.job);
        let routes = routes::routes(&self.job, &model, member.rank);
        let x = model.tokens(member.rank);
        let (device, communicator) = member.connect()?;
        if self.graph && device.backend() != "cuda" {
            return Err(NoGraphs.into());
        }
        let all = device.info()?.multiprocessors;
        let sms = self.sms.map_or(all, |cap| all.min(cap.get()));

        let mut bench = Bench::new(self, &device, &communicator, &x, &routes)?;
        let alloc = bench.plan().backend.name().to_owned();
        member.progress(&format!("memory: {}", bench.plan()));
        let mut shapes = Vec::with_capacity(self.tokens.len());
        for &tokens in &self.tokens {
            member.progress(&format!("{tokens} tokens"));
            shapes.push(Measurement {
                tokens,
                sms,
                rows: routes::rows(&self.job, &routes.ids[..tokens * self.job.top_k]),
                times: member.tell(bench.time(self, tokens))?,
            });
        }
        bench.close()?;
        Ok(Found {
            backend: match device.backend() {
                "host" => "sim".to_owned(),
                other => other.to_owned(),
            },
            alloc,
            shapes,
        })
    }
}
