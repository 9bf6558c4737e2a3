//! The command line of `ep run`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use crate::layer::npy::{self, NpyError};
use crate::layer::router::{self, RoutingError};
use crate::layer::{Dtype, Job, JobError, Routing};
use crate::ranks::PlaceArgs;

/// Runs one mixture-of-experts layer over several ranks: router, dispatch, SwiGLU experts, combine.
///
/// The result is checked against a dense float64 reference of the same layer; the exit status is
/// zero only if it agrees.
#[derive(Debug, clap::Args)]
#[command(args_override_self = true)]
pub(crate) struct Args {
    /// Ranks in the group [default: 4, or as recorded]
    #[arg(long)]
    ranks: Option<usize>,
    /// Tokens per rank [default: 32, or as recorded]
    #[arg(long)]
    tokens: Option<usize>,
    /// Channels of a token, a multiple of 128
    #[arg(long, default_value_t = 2048)]
    hidden: usize,
    /// Channels inside an expert, a multiple of 8
    #[arg(long, default_value_t = 512)]
    intermediate: usize,
    /// Experts over all ranks, a multiple of the ranks
    #[arg(long, default_value_t = 64)]
    experts: usize,
    /// Experts per token [default: 8, or as recorded]
    #[arg(long)]
    top_k: Option<usize>,
    /// What dispatch sends: BF16, or FP8 (E4M3) with a scale per 128 channels
    #[arg(long, value_enum, default_value_t = Dtype::Bf16)]
    dtype: Dtype,
    /// uniform, zipf, hot, one, or a file of recorded expert ids, int64 [ranks, tokens, top_k]
    #[arg(long, default_value_t = Routing::Uniform, value_name = "ROUTING|FILE.npy")]
    routing: Routing,
    /// Seed of tokens, weights and routing
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Dispatches and combines to time, after the check
    #[arg(long, default_value_t = 20)]
    iters: usize,
    /// End with one line of JSON on standard output
    #[arg(long)]
    pub(crate) json: bool,
    /// Processes that share a GPU, to check groups that are larger than the host: they take turns on
    /// it, and times say nothing
    #[arg(long, default_value = "1", value_name = "RANKS")]
    pub(crate) ranks_per_gpu: NonZeroUsize,
    #[command(flatten)]
    pub(crate) place: PlaceArgs,
}

/// Why arguments make no job.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum ArgsError {
    #[error(transparent)]
    Job(#[from] JobError),
    #[error(transparent)]
    Routing(#[from] RoutingError),
    #[error("{path} is no recorded routing")]
    Recorded {
        path: PathBuf,
        #[source]
        source: NpyError,
    },
}

impl Args {
    /// The job that is asked for. `cores` are shared by all ranks.
    pub(crate) fn job(&self, cores: usize) -> Result<Job, ArgsError> {
        let recorded = match &self.routing {
            Routing::File(path) => Some(npy::read(path).map_err(|source| ArgsError::Recorded {
                path: path.clone(),
                source,
            })?),
            _ => None,
        };
        let size = |option, given: Option<usize>, dimension: usize, default| {
            let recorded = recorded.as_ref().map(|array| array.shape[dimension]);
            match (given, recorded) {
                (Some(given), Some(recorded)) if given != recorded => Err(JobError::Recorded {
                    option,
                    given,
                    recorded,
                }),
                _ => Ok(given.or(recorded).unwrap_or(default)),
            }
        };
        let ranks = size("--ranks", self.ranks, 0, 4)?;
        let job = Job {
            ranks,
            tokens: size("--tokens", self.tokens, 1, 32)?,
            hidden: self.hidden,
            intermediate: self.intermediate,
            experts: self.experts,
            top_k: size("--top-k", self.top_k, 2, 8)?,
            dtype: self.dtype,
            routing: self.routing.clone(),
            seed: self.seed,
            iters: self.iters,
            threads: (cores / ranks.max(1)).max(1),
        };
        job.check()?;
        if let Some(array) = &recorded {
            for rank in 0..ranks {
                router::check(&job, rank, array.matrix(rank))?;
            }
        }
        Ok(job)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(clap::Parser)]
    struct Command {
        #[command(flatten)]
        args: Args,
    }

    fn parse(line: &str) -> Result<Args, clap::Error> {
        Command::try_parse_from(std::iter::once("run").chain(line.split_whitespace()))
            .map(|command| command.args)
    }

    #[test]
    fn defaults_make_a_job() {
        let args = parse("").unwrap();
        assert!(!args.json);
        let job = args.job(2).unwrap();
        assert_eq!(
            (job.ranks, job.tokens, job.top_k, job.threads),
            (4, 32, 8, 1)
        );
        assert_eq!(args.job(64).unwrap().threads, 16);
    }

    #[test]
    fn every_option_is_taken() {
        let args = parse(
            "--ranks 2 --tokens 128 --hidden 7168 --intermediate 2048 --experts 256 --top-k 16 \
             --dtype fp8 --routing zipf --seed 9 --json --iters 3",
        )
        .unwrap();
        assert!(args.json);
        assert_eq!(
            args.job(2).unwrap(),
            Job {
                ranks: 2,
                tokens: 128,
                hidden: 7168,
                intermediate: 2048,
                experts: 256,
                top_k: 16,
                dtype: Dtype::Fp8,
                routing: Routing::Zipf,
                seed: 9,
                iters: 3,
                threads: 1,
            }
        );
    }

    #[test]
    fn refuses_what_it_does_not_know() {
        for line in ["--dtype fp16", "--routing zipff", "--ranks x"] {
            assert!(parse(line).is_err(), "{line}");
        }
        assert!(matches!(
            parse("--hidden 100").unwrap().job(1),
            Err(ArgsError::Job(_))
        ));
    }

    #[test]
    fn sizes_come_from_the_recording_and_must_agree_with_it() {
        let folder = std::env::temp_dir().join(format!("ep-args-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("routing.npy");
        let header = "{'descr': '<i8', 'fortran_order': False, 'shape': (2, 3, 1), }\n";
        let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
        bytes.extend((header.len() as u16).to_le_bytes());
        bytes.extend(header.as_bytes());
        bytes.extend([0; 48]);
        std::fs::write(&path, bytes).unwrap();

        let line = |more: &str| format!("--routing {} {more}", path.display());
        let job = parse(&line("")).unwrap().job(2).unwrap();
        assert_eq!((job.ranks, job.tokens, job.top_k), (2, 3, 1));
        assert!(parse(&line("--tokens 3")).unwrap().job(2).is_ok());
        assert!(matches!(
            parse(&line("--tokens 4")).unwrap().job(2),
            Err(ArgsError::Job(JobError::Recorded {
                option: "--tokens",
                given: 4,
                recorded: 3
            }))
        ));
        std::fs::remove_dir_all(&folder).unwrap();
        assert!(matches!(
            parse(&line("")).unwrap().job(2),
            Err(ArgsError::Recorded { .. })
        ));
    }
}
