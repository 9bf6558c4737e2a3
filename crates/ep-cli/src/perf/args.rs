//! The command line of `ep perf`.

use std::num::{NonZeroU32, NonZeroUsize};

use serde::{Deserialize, Serialize};

use crate::layer::{Dtype, Job, JobError, Routing, job};
use crate::ranks::PlaceArgs;

/// Times dispatch and combine over several ranks and prints one line of JSON for each shape.
///
/// A time is the median over calls of the slowest rank, with the launch hidden and the ranks aligned
/// on the device. It includes what the method itself costs, which is printed as empty_us.
#[derive(Debug, clap::Args)]
#[command(args_override_self = true)]
pub(crate) struct Args {
    /// Ranks in the group
    #[arg(long, default_value_t = 4)]
    ranks: usize,
    /// Tokens per rank; a shape for each
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "1,8,32,128,512",
        value_name = "TOKENS,…"
    )]
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
    #[arg(long, default_value_t = Routing::Uniform, value_parser = generated)]
    routing: Routing,
    /// Where the tokens' weights come with
    #[arg(long, value_enum, default_value_t = Weights::Dispatch)]
    weights: Weights,
    /// Most multiprocessors that an operation occupies [default: all]
    #[arg(long)]
    sms: Option<NonZeroU32>,
    /// Timed calls
    #[arg(long, default_value = "100")]
    iters: NonZeroUsize,
    /// Calls before the timed ones
    #[arg(long, default_value_t = 5)]
    warmup: usize,
    /// Time replays of a CUDA graph that holds the calls, instead of launches on a stream
    #[arg(long)]
    graph: bool,
    /// Seed of tokens, weights and routing
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    pub(super) place: PlaceArgs,
}

/// Where the tokens' weights come with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Weights {
    /// With the dispatch
    Dispatch,
    /// With the combine
    Combine,
    /// Nowhere: combine sums the rows as they are
    None,
}

/// What is measured: plain data, the same in every rank.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Sweep {
    /// With the most tokens of the sweep.
    pub(crate) job: Job,
    pub(crate) tokens: Vec<usize>,
    pub(crate) weights: Weights,
    /// The cap.
    pub(crate) sms: Option<NonZeroU32>,
    pub(crate) warmup: usize,
    pub(crate) graph: bool,
}

impl Args {
    /// The sweep that is asked for.
    pub(crate) fn sweep(&self) -> Result<Sweep, JobError> {
        let job = Job {
            ranks: self.ranks,
            tokens: self.tokens.iter().copied().max().unwrap_or(0),
            hidden: self.hidden,
            // No expert runs.
            intermediate: 8,
            experts: self.experts,
            top_k: self.top_k,
            dtype: self.dtype,
            routing: self.routing.clone(),
            seed: self.seed,
            iters: self.iters.get(),
            threads: 1,
        };
        job.check()?;
        job::range("--warmup", self.warmup, 0, 1_000_000)?;
        Ok(Sweep {
            job,
            tokens: self.tokens.clone(),
            weights: self.weights,
            sms: self.sms,
            warmup: self.warmup,
            graph: self.graph,
        })
    }
}

/// A routing that there is for every number of tokens.
fn generated(text: &str) -> Result<Routing, String> {
    match text.parse() {
        Ok(Routing::File(_)) | Err(_) => Err("it is uniform, zipf, hot or one".to_owned()),
        generated => generated,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use clap::Parser;

    use super::*;

    #[derive(clap::Parser)]
    struct Command {
        #[command(flatten)]
        args: Args,
    }

    fn try_parse(line: &str) -> Result<Args, clap::Error> {
        Command::try_parse_from(std::iter::once("perf").chain(line.split_whitespace()))
            .map(|command| command.args)
    }

    pub(in crate::perf) fn parse(line: &str) -> Args {
        try_parse(line).unwrap()
    }

    #[test]
    fn the_defaults_are_the_decode_shapes() {
        let args = parse("");
        let sweep = args.sweep().unwrap();
        assert_eq!(sweep.tokens, [1, 8, 32, 128, 512]);
        assert_eq!((sweep.sms, sweep.warmup, sweep.graph), (None, 5, false));
        assert_eq!(sweep.weights, Weights::Dispatch);
        let job = sweep.job;
        assert_eq!((job.ranks, job.tokens, job.hidden), (4, 512, 7168));
        assert_eq!((job.experts, job.top_k, job.iters), (256, 8, 100));
        assert_eq!((job.dtype, job.routing), (Dtype::Fp8, Routing::Uniform));
    }

    #[test]
    fn every_option_is_taken() {
        let args = parse(
            "--ranks 2 --tokens 64,4 --hidden 2048 --experts 64 --top-k 4 --dtype bf16 \
             --routing hot --weights combine --sms 16 --iters 1000 --warmup 0 --graph --seed 9 \
             --backend cuda --timeout 5 --spawn threads",
        );
        let expected = Sweep {
            job: Job {
                ranks: 2,
                tokens: 64,
                hidden: 2048,
                intermediate: 8,
                experts: 64,
                top_k: 4,
                dtype: Dtype::Bf16,
                routing: Routing::Hot,
                seed: 9,
                iters: 1000,
                threads: 1,
            },
            tokens: vec![64, 4],
            weights: Weights::Combine,
            sms: NonZeroU32::new(16),
            warmup: 0,
            graph: true,
        };
        assert_eq!(args.sweep().unwrap(), expected);
    }

    #[test]
    fn refuses_what_cannot_be_measured() {
        for line in [
            "--tokens 1,,8",
            "--tokens 1;8",
            "--routing recorded.npy",
            "--routing zipff",
            "--weights both",
            "--sms 0",
            "--iters 0",
        ] {
            assert!(try_parse(line).is_err(), "{line}");
        }
        for (line, option) in [
            ("--hidden 100", "--hidden"),
            ("--tokens 1,65537", "--tokens"),
            ("--ranks 3", "--experts"),
            ("--warmup 18446744073709551615", "--warmup"),
        ] {
            let error = parse(line).sweep().unwrap_err().to_string();
            assert!(error.starts_with(option), "{error}");
        }
    }
}
