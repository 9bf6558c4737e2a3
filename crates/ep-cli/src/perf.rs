//! `ep perf`: times dispatch and combine over a sweep of batch sizes, one JSON line each.
//!
//! Random tokens; ranks lined up on the device before every call, its launch hidden; per call the
//! slowest rank counts, and of the calls the median and the 99th percentile.

mod report;

use std::process::ExitCode;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use self::report::{Line, Outcome, Shape};
use crate::failure::{Failure, chain};
use crate::layer::{Dtype, Job, Model, Routes, Routing, router};
use crate::ranks::{self, Member, PlaceArgs, Work, cores};
use crate::session::Session;

/// Times dispatch and combine over a sweep of batch sizes, one JSON line each.
#[derive(Debug, clap::Args)]
#[command(args_override_self = true)]
pub(crate) struct Args {
    /// Ranks in the group
    #[arg(long, default_value_t = 4)]
    ranks: usize,
    /// Tokens per rank, in the order of the lines
    #[arg(long, value_delimiter = ',', default_value = "1,8,32,128,512")]
    tokens: Vec<usize>,
    /// Channels of a token, a multiple of 128
    #[arg(long, default_value_t = 7168)]
    hidden: usize,
    /// Experts over all ranks, a multiple of the ranks
    #[arg(long, default_value_t = 256)]
    experts: usize,
    /// Experts per token
    #[arg(long, default_value_t = 8)]
    top_k: usize,
    /// What dispatch sends: BF16, or FP8 (E4M3) with a scale per 128 channels
    #[arg(long, value_enum, default_value_t = Dtype::Fp8)]
    dtype: Dtype,
    /// uniform, zipf, hot or one
    #[arg(long, default_value_t = Routing::Uniform)]
    routing: Routing,
    /// Most multiprocessors that an operation occupies; 0 sets no bound
    #[arg(long, default_value_t = 0)]
    sms: u32,
    /// Timed calls of a shape
    #[arg(long, default_value_t = 100)]
    iters: usize,
    /// Seed of tokens and routing
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    place: PlaceArgs,
}

/// What is timed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Sweep {
    /// With the most tokens of the sweep.
    job: Job,
    tokens: Vec<usize>,
    sms: u32,
}

/// Why there is nothing to time.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
enum SweepError {
    #[error("--tokens is empty; give at least one number")]
    NoTokens,
    #[error("--iters is 0; at least one call must be timed")]
    NoCalls,
    #[error("--routing takes a recording in `ep run` alone; it has one number of tokens")]
    Recorded,
}

/// Runs the command and says how it went.
pub(crate) fn main(args: &Args) -> ExitCode {
    match lines(args) {
        Ok(lines) => {
            lines.iter().for_each(|line| println!("{line}"));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {}", chain(&*error));
            ExitCode::FAILURE
        }
    }
}

fn lines(args: &Args) -> Result<Vec<String>, Failure> {
    let start = Instant::now();
    let sweep = args.sweep(cores())?;
    let outcomes = ranks::run(&sweep, &args.place, start)?;
    let lines = Line::of_sweep(&sweep, &outcomes)?;
    Ok(lines
        .iter()
        .map(serde_json::to_string)
        .collect::<Result<_, _>>()?)
}

impl Args {
    fn sweep(&self, cores: usize) -> Result<Sweep, Failure> {
        let most = self
            .tokens
            .iter()
            .copied()
            .max()
            .ok_or(SweepError::NoTokens)?;
        if self.iters == 0 {
            return Err(SweepError::NoCalls.into());
        }
        if matches!(self.routing, Routing::File(_)) {
            return Err(SweepError::Recorded.into());
        }
        let job = Job {
            ranks: self.ranks,
            tokens: most,
            hidden: self.hidden,
            // Experts are left out.
            intermediate: 8,
            experts: self.experts,
            top_k: self.top_k,
            dtype: self.dtype,
            routing: self.routing.clone(),
            seed: self.seed,
            iters: self.iters,
            threads: (cores / self.ranks.max(1)).max(1),
        };
        job.check()?;
        Ok(Sweep {
            job,
            tokens: self.tokens.clone(),
            sms: self.sms,
        })
    }
}

impl Work for Sweep {
    type Outcome = Outcome;
    const RANK_COMMAND: &'static str = "perf-rank";

    fn ranks(&self) -> usize {
        self.job.ranks
    }

    fn run(&self, member: &Member<'_>) -> Result<Outcome, Failure> {
        member.progress("connecting");
        let (device, communicator) = member.connect()?;
        let mut session = Session::new(&self.job, &device, &communicator, self.sms)?;
        // Experts do not run; combine reads what stands there, which no number makes slower.
        session.poison()?;
        let facts = session.facts();
        member.progress(&format!("memory: {}", facts.plan));
        let empty_us = session.time_nothing(self.job.iters)?;
        let mut shapes = Vec::with_capacity(self.tokens.len());
        for &tokens in &self.tokens {
            member.progress(&format!("{tokens} tokens"));
            let job = Job {
                tokens,
                ..self.job.clone()
            };
            let model = Model::new(&job);
            let x = model.tokens(member.rank);
            let routes = router::route(&job, &model, member.rank, &x)?;
            session.load(&x, &routes)?;
            shapes.push(Shape {
                rows: rows(&job, &routes),
                times: session.time(job.iters)?,
            });
        }
        session.close()?;
        let all = device
            .driver()
            .device_info(device.ordinal())?
            .multiprocessors;
        Ok(Outcome {
            facts,
            sms: if self.sms == 0 {
                all
            } else {
                self.sms.min(all)
            },
            empty_us,
            shapes,
        })
    }
}

/// Tokens that go to each rank: one row each, however many of its experts they go to.
fn rows(job: &Job, routes: &Routes) -> Vec<u64> {
    let mut rows = vec![0; job.ranks];
    for ids in routes.ids.chunks_exact(job.top_k) {
        let owners = ids.iter().filter_map(|&id| usize::try_from(id).ok());
        let mut owners: Vec<usize> = owners.map(|id| id / job.local_experts()).collect();
        owners.sort_unstable();
        owners.dedup();
        owners.into_iter().for_each(|owner| rows[owner] += 1);
    }
    rows
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::layer::job::tests::small;

    #[derive(clap::Parser)]
    struct Command {
        #[command(flatten)]
        args: Args,
    }

    fn sweep(line: &str) -> Result<Sweep, Failure> {
        Command::parse_from(std::iter::once("perf").chain(line.split_whitespace()))
            .args
            .sweep(2)
    }

    #[test]
    fn buffers_are_made_for_the_most_tokens() {
        let sweep = sweep("--tokens 4,64,1 --ranks 2 --dtype bf16 --sms 16").unwrap();
        assert_eq!((sweep.tokens, sweep.sms), (vec![4, 64, 1], 16));
        assert_eq!((sweep.job.tokens, sweep.job.ranks), (64, 2));
        assert_eq!(sweep.job.dtype, Dtype::Bf16);
    }

    #[test]
    fn what_cannot_be_timed_is_refused() {
        for (line, reason) in [
            ("--iters 0", "--iters is 0"),
            ("--routing recorded.npy", "--routing takes a recording"),
            ("--hidden 64", "--hidden is 64"),
        ] {
            let error = sweep(line).unwrap_err().to_string();
            assert!(error.starts_with(reason), "{line}: {error}");
        }
    }

    #[test]
    fn a_token_is_one_row_for_each_rank_it_goes_to() {
        // 4 experts a rank.
        let job = Job {
            tokens: 3,
            ..small()
        };
        let routes = Routes {
            ids: vec![0, 3, 4, 5, 6, 7, -1, -1, -1],
            weights: vec![0.0; 9],
        };
        assert_eq!(rows(&job, &routes), [1, 2]);
    }
}
