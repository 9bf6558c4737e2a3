//! What a run is: plain data, checked once and then the same in every rank.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// One mixture-of-experts layer over a group of ranks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Job {
    pub(crate) ranks: usize,
    /// Per rank.
    pub(crate) tokens: usize,
    pub(crate) hidden: usize,
    /// Channels inside an expert.
    pub(crate) intermediate: usize,
    /// Over all ranks.
    pub(crate) experts: usize,
    pub(crate) top_k: usize,
    pub(crate) dtype: Dtype,
    pub(crate) routing: Routing,
    pub(crate) seed: u64,
    /// Timed dispatches and combines.
    pub(crate) iters: usize,
    /// Threads of a rank for experts on the host and for the reference.
    pub(crate) threads: usize,
}

impl Job {
    pub(crate) fn local_experts(&self) -> usize {
        self.experts / self.ranks
    }

    /// Refuses a shape that no buffer or expert can have.
    pub(crate) fn check(&self) -> Result<(), JobError> {
        let multiple = |option, value: usize, of| {
            if value > 0 && value.is_multiple_of(of) {
                Ok(())
            } else {
                Err(JobError::Multiple { option, value, of })
            }
        };
        range("--ranks", self.ranks, 1, 1024)?;
        range("--tokens", self.tokens, 0, 65_536)?;
        range("--top-k", self.top_k, 1, 32)?;
        range(
            "--experts",
            self.experts,
            self.top_k.max(self.ranks),
            (2048 * self.ranks).min(8192),
        )?;
        range("--hidden", self.hidden, 128, 1 << 16)?;
        range("--intermediate", self.intermediate, 8, 1 << 20)?;
        range("--iters", self.iters, 0, 1_000_000)?;
        multiple("--experts", self.experts, self.ranks)?;
        multiple("--hidden", self.hidden, 128)?;
        multiple("--intermediate", self.intermediate, 8)
    }
}

/// Refuses an option's value that is not from `min` to `max`.
pub(crate) fn range(
    option: &'static str,
    value: usize,
    min: usize,
    max: usize,
) -> Result<(), JobError> {
    if (min..=max).contains(&value) {
        Ok(())
    } else {
        Err(JobError::Range {
            option,
            value,
            min,
            max,
        })
    }
}

/// What dispatch sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Dtype {
    /// The tokens as they are.
    Bf16,
    /// E4M3 with one float32 scale per 128 channels.
    Fp8,
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bf16 => "bf16",
            Self::Fp8 => "fp8",
        })
    }
}

/// Where tokens go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Routing {
    /// As the gate says: near uniform.
    Uniform,
    /// The gate, its selection biased so that an expert's popularity falls with its place in a
    /// random order, as in Zipf's law.
    Zipf,
    /// The gate, its selection biased towards a few neighbouring experts.
    Hot,
    /// The same experts for every token.
    One,
    /// Recorded: int64 `[ranks, tokens, top_k]`.
    File(PathBuf),
}

impl FromStr for Routing {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "uniform" => Ok(Self::Uniform),
            "zipf" => Ok(Self::Zipf),
            "hot" => Ok(Self::Hot),
            "one" => Ok(Self::One),
            _ if text.ends_with(".npy") => Ok(Self::File(text.into())),
            _ => Err("it is uniform, zipf, hot, one, or a file that ends in .npy".to_owned()),
        }
    }
}

impl fmt::Display for Routing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Uniform => f.write_str("uniform"),
            Self::Zipf => f.write_str("zipf"),
            Self::Hot => f.write_str("hot"),
            Self::One => f.write_str("one"),
            Self::File(path) => path.display().fmt(f),
        }
    }
}

/// Why a job cannot be run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum JobError {
    #[error("{option} is {value}; it must be {min} to {max}")]
    Range {
        option: &'static str,
        value: usize,
        min: usize,
        max: usize,
    },
    #[error("{option} is {value}; it must be a multiple of {of}")]
    Multiple {
        option: &'static str,
        value: usize,
        of: usize,
    },
    #[error("{option} is {given}, but the recorded routing has {recorded}; leave the option out")]
    Recorded {
        option: &'static str,
        given: usize,
        recorded: usize,
    },
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn small() -> Job {
        Job {
            ranks: 2,
            tokens: 6,
            hidden: 128,
            intermediate: 16,
            experts: 8,
            top_k: 3,
            dtype: Dtype::Bf16,
            routing: Routing::Uniform,
            seed: 1,
            iters: 2,
            threads: 2,
        }
    }

    #[test]
    fn a_good_job_passes() {
        assert_eq!(small().check(), Ok(()));
        assert_eq!(
            Job {
                tokens: 0,
                ..small()
            }
            .check(),
            Ok(())
        );
    }

    #[test]
    fn refusals_name_the_option() {
        let refused = |job: Job, expected: &str| match job.check() {
            Err(JobError::Range { option, .. } | JobError::Multiple { option, .. }) => {
                assert_eq!(option, expected);
            }
            other => panic!("{other:?} instead of a refusal of {expected}"),
        };
        refused(
            Job {
                ranks: 0,
                ..small()
            },
            "--ranks",
        );
        refused(
            Job {
                ranks: 3,
                ..small()
            },
            "--experts",
        );
        refused(
            Job {
                top_k: 33,
                experts: 64,
                ..small()
            },
            "--top-k",
        );
        refused(
            Job {
                top_k: 9,
                ..small()
            },
            "--experts",
        );
        refused(
            Job {
                tokens: 65_537,
                ..small()
            },
            "--tokens",
        );
        refused(
            Job {
                hidden: 192,
                ..small()
            },
            "--hidden",
        );
        refused(
            Job {
                intermediate: 12,
                ..small()
            },
            "--intermediate",
        );
    }

    #[test]
    fn routing_reads_what_it_prints() {
        for text in ["uniform", "zipf", "hot", "one", "some/where.npy"] {
            assert_eq!(text.parse::<Routing>().unwrap().to_string(), text);
        }
        assert!("zipff".parse::<Routing>().is_err());
    }
}
